"""From training to testing with batch normalization: "Batch Normalization: The Untold Story" (seed 001).

    streamnorm reproduce pipeline --data-root DATA --tier reduced

Method ONE tests with the running average of training, method TWO with statistics of a pass over the training data after
it. Architecture A, trained with mini-batches of 64; then the pass with mini-batches of several sizes, beside the exact
statistics of all data. A stopped study goes on with the same command.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.calibration.recalibrate import recalibrate
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import CHECKPOINT, finite
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.study import (
    Claim,
    Records,
    Verdict,
    alike,
    below,
    carry_out,
    final,
    folder_of,
    judge,
    mean,
    number,
    spread,
    together,
)
from streamnorm.nn.layers import BatchNorm
from streamnorm.nn.norm import norms

NORMALIZED, PLAIN = "batch 64", "none 64"
EPSILONS = (0.0, 1e-8, 1e-5, 1e-3)
BATCH = 64
"""Samples of a mini-batch in training."""
SMALL = 4
"""A mini-batch of which the text says that it may be too small, after training with more."""


@dataclass(frozen=True)
class Tier:
    """The size of a study; ``sizes`` are those of the mini-batches of the pass, the last one that of training."""

    data: str
    width: int
    epochs: int
    limit: int | None
    sizes: tuple[int, ...]


TIERS = {
    "smoke": Tier("digits", 8, 1, 256, (SMALL, BATCH)),
    "reduced": Tier("mnist", 256, 5, 10_000, (2, 4, 8, 16, 32, BATCH)),
    "full": Tier("mnist", 256, 20, None, (2, 4, 8, 16, 32, BATCH)),
}


def runs(tier: Tier) -> dict[str, Run]:
    """With batch normalization and, for what it costs, without; at a rate that the latter bears."""
    base = Run(
        data=tier.data,
        architecture="A",
        width=tier.width,
        epochs=tier.epochs,
        train_limit=tier.limit,
        samples_per_batch=BATCH,
        batches_per_update=1,
    )
    return {
        NORMALIZED: replace(base, arm="batch"),
        PLAIN: replace(base, arm="none", learning_rate=0.01),
    }


# --- what is measured ---


def tables(model: nn.Module) -> list[Tensor]:
    """What testing uses in each layer: means and sigmas ``(2, c)``."""
    return [norm.H1.estimate.double() for norm in norms(model) if norm.H1 is not None]


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """How far statistics are from the exact ones: root mean square over all features of the mean's error in sigmas and
    of the logarithm of sigma's ratio; and the geometric mean of that ratio in the first layer."""
    means = torch.cat([(a[0] - b[0]) / b[1] for a, b in zip(found, exact, strict=True)])
    ratios = torch.cat([(a[1] / b[1]).log() for a, b in zip(found, exact, strict=True)])
    first = (found[0][1] / exact[0][1]).log().mean().exp()
    return {
        "mean": means.square().mean().sqrt().item(),
        "sigma": ratios.square().mean().sqrt().item(),
        "first": first.item(),
    }


def expected_ratio(m: int) -> float:
    """``E[sigma_m] / sigma`` of m independent normal values, ``sqrt(2/m) Gamma(m/2) / Gamma((m-1)/2)``.

    >>> [round(expected_ratio(m), 3) for m in (2, 4, 8, 16, 32)]
    [0.564, 0.798, 0.903, 0.952, 0.976]
    """
    return math.sqrt(2 / m) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2))


def measured(trainer: Trainer, sizes: Sequence[int]) -> dict[str, Any]:
    """Test error and distance of every way to come by the statistics of testing, for one trained network."""
    data, model = trainer.data, trainer.model
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(trainer.run.seed))
    x = data.train_x[order]

    def tested(candidate: nn.Module) -> dict[str, float]:
        loss, error = evaluate(candidate, data.test_x, data.test_y)
        return finite({"test_loss": loss, "test_error": error, **distance(tables(candidate), exact)})

    def anew(size: int, **options: Any) -> nn.Module:
        candidate = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few mini-batches, in the smallest tier
            recalibrate(candidate, x.split(size), **options)
        return candidate

    start = time.perf_counter()
    whole = copy.deepcopy(model)
    passes = recalibrate(whole, x.split(BATCH))
    seconds, exact = time.perf_counter() - start, tables(whole)
    found: dict[str, Any] = {"passes": passes, "seconds": seconds, "one": tested(model), "exact": tested(whole)}
    for size in sizes:
        found[f"moving {size}"] = tested(anew(size, estimator="moving"))
        found[f"corrected {size}"] = tested(anew(size, estimator="corrected"))
        found[f"single {size}"] = tested(anew(size, passes=1))
    return found


def cost(trainer: Trainer) -> dict[str, float]:
    """Parameters, numbers kept beside them, and the seconds that testing takes, the least of five."""
    model, data = trainer.model, trainer.data
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        evaluate(model, data.test_x, data.test_y)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept": sum(b.numel() for b in model.buffers()),
        "test_seconds": min(seconds),
    }


def with_epsilon(data: Data, eps: float, seed: int, updates: int = 20) -> float | None:
    """The loss after some updates of a network that normalizes the pixels themselves, of which some are constant; None
    where it is not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        c = data.train_x[0].numel()
        model = nn.Sequential(nn.Flatten(), BatchNorm(c, eps=eps), nn.Linear(c, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = torch.tensor(math.nan)
    for i in range(updates):
        part = slice(i * BATCH % len(data.train_x), None)
        x, y = data.train_x[part][:BATCH], data.train_y[part][:BATCH]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() if math.isfinite(loss.item()) else None


# --- claims ---


def _of(records: Records, way: str, key: str) -> list[float]:
    """A figure of each seed; nan for a run that failed."""
    return [number(r["measures"][way][key]) if not r["failed"] else math.nan for r in records[NORMALIZED]]


def _c42(records: Records) -> tuple[Verdict, str]:
    one, exact = _of(records, "one", "test_error"), _of(records, "exact", "test_error")
    two = _of(records, f"moving {BATCH}", "test_error")
    same = alike(below(two, one), 0.005)
    figures = [f"test error: ONE {spread(one)}, TWO {spread(two)}, exact {spread(exact)}"]
    closer: list[Verdict] = []
    for key, what in (("mean", "means off by (sigmas)"), ("sigma", "sigmas off by (log)")):
        first, second = _of(records, "one", key), _of(records, f"moving {BATCH}", key)
        closer.append(judge(below(second, first), 0.0))
        figures.append(f"{what}: ONE {spread(first)}, TWO {spread(second)}")
    return together([same, *closer]), "; ".join(figures)


def _sizes(records: Records) -> list[int]:
    ways = {way for record in records[NORMALIZED] if not record["failed"] for way in record["measures"]}
    return sorted(int(way.split()[1]) for way in ways if way.startswith("moving"))


def _c43(records: Records) -> tuple[Verdict, str]:
    sizes, figures = _sizes(records), []
    errors = {m: mean(_of(records, f"moving {m}", "sigma")) for m in sizes}
    grows = bool(sizes) and all(errors[a] > errors[b] for a, b in pairwise(sizes))
    for m in sizes:
        ratio = mean(_of(records, f"corrected {m}", "first"))
        figures.append(
            f"m = {m}: test error {spread(_of(records, f'moving {m}', 'test_error'))}, sigmas off by {errors[m]:.3f} "
            f"(log), in the first layer {ratio:.3f} of the exact ones ({expected_ratio(m):.3f} if normal)"
        )
    hurt = [
        a - b
        for a, b in zip(
            _of(records, f"moving {SMALL}", "test_error"), _of(records, f"moving {BATCH}", "test_error"), strict=True
        )
    ]
    figures = figures or [spread(hurt)]
    return together(["reproduced" if grows else "contradicted", judge(hurt, 0.005)]), "; ".join(figures)


def _c44(records: Records) -> tuple[Verdict, str]:
    losses = {eps: [record["epsilon"][f"{eps:g}"] for record in records[NORMALIZED]] for eps in EPSILONS}
    breaks = all(loss is None for loss in losses[0.0])
    holds = all(loss is not None for eps in EPSILONS[1:] for loss in losses[eps])
    lost = {eps: sum(loss is None for loss in of_seeds) for eps, of_seeds in losses.items()}
    figures = [
        f"eps = {eps:g}: " + (f"not finite in {lost[eps]} of {len(of_seeds)} seeds" if lost[eps] else spread(of_seeds))
        for eps, of_seeds in losses.items()
    ]
    return together([("reproduced" if good else "contradicted") for good in (breaks, holds)]), (
        f"loss after 20 updates on normalized pixels, {', '.join(figures)}"
    )


def _c45(records: Records) -> tuple[Verdict, str]:
    costs = {name: [record["cost"] for record in records[name]] for name in (NORMALIZED, PLAIN)}
    a, b = costs[NORMALIZED][0], costs[PLAIN][0]
    seconds = {name: mean(final(records, name, "seconds")) for name in costs}
    test = {name: mean([one["test_seconds"] for one in costs[name]]) for name in costs}
    passes, took = _passes(records)
    return "reported", (
        f"{a['parameters']} parameters with BN, {b['parameters']} with gain and bias alone; {a['kept']} numbers kept "
        f"beside them, {b['kept']}; an epoch takes {seconds[NORMALIZED] / seconds[PLAIN]:.2f} times as long, testing "
        f"{test[NORMALIZED] / test[PLAIN]:.2f} times; exact statistics took {passes:g} passes, {took:.2f} of the time "
        "of a training epoch"
    )


def _passes(records: Records) -> tuple[float, float]:
    whole = [record for record in records[NORMALIZED] if not record["failed"]]
    if not whole:
        return math.nan, math.nan
    took = mean([record["measures"]["seconds"] / record["metrics"][-1]["seconds"] for record in whole])
    return mean([record["measures"]["passes"] for record in whole]), took


CLAIMS = [
    Claim("C-42", "Methods ONE and TWO test alike, and TWO is closer to the statistics of all data (001).", _c42),
    Claim("C-43", "Mini-batches of 4 or 8 are too small for the statistics of training with 64 (001).", _c43),
    Claim("C-44", "BN needs an epsilon: without one some networks end in NaN (001).", _c44),
    Claim("C-45", "BN costs space, parameters and time, and its postprocessing passes (001).", _c45),
]


def table(records: Records) -> str:
    """Every way to come by the statistics of testing, one a row."""
    lines = [
        "| statistics of testing | test error | test loss (nats) | means off by (sigmas) | sigmas off by (log) |",
        "| :--- | ---: | ---: | ---: | ---: |",
    ]
    words = {"moving": "moving average", "corrected": "the same, corrected", "single": "pooled, a single pass"}
    named: Mapping[str, str] = {
        "one": "running average of training (ONE)",
        "exact": "of all data, exact",
        **{f"{way} {m}": f"{what}, m = {m}" for way, what in words.items() for m in _sizes(records)},
    }
    for way, what in named.items():
        cells = [spread(_of(records, way, key)) for key in ("test_error", "test_loss", "mean", "sigma")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Arguments) -> Path:
    """Train what is missing, measure, check the claims, write the report."""
    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.studies.record import write_results

    tier, out = begin(arguments, "pipeline", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.limit)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out)
    for name, of_seeds in records.items():
        for record in of_seeds:
            trainer = Trainer(Run.from_json(record["run"]), data)
            trainer.restore(checkpoint.load(folder_of(out, name, record["seed"]) / CHECKPOINT))
            record["cost"] = cost(trainer)
            if name == NORMALIZED and not record["failed"]:
                record["measures"] = measured(trainer, tier.sizes)
            if name == NORMALIZED:
                record["epsilon"] = {f"{eps:g}": with_epsilon(data, eps, record["seed"]) for eps in EPSILONS}
    title = f"Batch normalization from training to testing: {data.name}, architecture A, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title, table(records))
