"""The runs of the study ``pipeline``, and what is measured on each of them once it is trained."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.calibration.recalibrate import recalibrate
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.studies.study import Record, reopened
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


# --- What is measured


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


def examine(records: Mapping[str, Sequence[Record]], data: Data, out: Path, sizes: Sequence[int]) -> None:
    """Add to the records what is measured on the trained networks, passes with mini-batches of these sizes among it."""
    for name, of_seeds in records.items():
        for record in of_seeds:
            trainer = reopened(record, data, out)
            record["cost"] = cost(trainer)
            if name == NORMALIZED and not record["failed"]:
                record["measures"] = measured(trainer, sizes)
            if name == NORMALIZED:
                record["epsilon"] = {f"{eps:g}": with_epsilon(data, eps, record["seed"]) for eps in EPSILONS}
