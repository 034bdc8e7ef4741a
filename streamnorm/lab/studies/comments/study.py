"""Two comments on batch normalization, by BorisG below "Batch Normalization: Warm-Up" (seed 003).

    streamnorm reproduce comments --data-root DATA --tier reduced

The first: normalization and "scale and shift" are two techniques, and right before a convolution one does without the
second. Architecture B as in ``convolutional``, in four arrangements. The second: going back, the gradient is divided by
the deviation, and the loss is curved otherwise so that it over-fits less. Architecture A with batch normalization and
without, mini-batches of 64, at two learning rates that both bear; its curvature is that of the loss of one batch of
training data, normalized by its own statistics. A stopped study goes on with the same command.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.summary import summarize, table
from streamnorm.lab.studies.architecture_b import BASE
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.comments.arrangement import AFTER, ARRANGEMENTS, BEFORE, ArrangedRun, ArrangedTrainer
from streamnorm.lab.studies.comments.curvature import (
    exact_copy,
    hessian,
    largest_eigenvalue,
    loss_and_gradient,
    relative,
)
from streamnorm.lab.studies.comments.figures import picture
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    alike,
    below,
    carry_out,
    final,
    judge,
    spread,
    together,
)
from streamnorm.lab.studies.traced import TracedTrainer
from streamnorm.nn.norm import norms

RATES = (0.01, 0.03)
"""Learning rates of architecture A; at 0.1 it diverges without normalization."""
FACTORS = (0.01, 0.1, 10.0, 100.0)
"""What weights are multiplied by."""
EPSILONS = (0.0, 1e-5)
"""None, and the one that the layers have by default."""


@dataclass(frozen=True)
class Tier:
    """The size of a study: what its runs have in common, then the width and the epochs of B and of A.

    Attributes:
        every: updates from one look at the curvature to the next.
        samples: training samples that it is taken on.
        steps: products of the Hessian for one eigenvalue.
    """

    common: Mapping[str, Any]
    convolutional: Mapping[str, int]
    connected: Mapping[str, int]
    every: int
    samples: int
    steps: int


TIERS = {
    "smoke": Tier(
        {"data": "digits", "train_limit": 128, "test_limit": 64},
        {"width": 4, "epochs": 1},
        {"width": 16, "epochs": 2},
        every=2,
        samples=64,
        steps=4,
    ),
    "reduced": Tier({}, {"width": 16, "epochs": 4}, {"width": 64, "epochs": 20}, every=312, samples=512, steps=20),
    "full": Tier(
        {"train_limit": None}, {"width": 32, "epochs": 30}, {"width": 128, "epochs": 60}, 2346, samples=1024, steps=30
    ),
}


def runs(tier: Tier) -> dict[str, Run]:
    """Every run of the study by name: B in its arrangements, then A."""
    base = replace(BASE, **tier.common, samples_per_batch=32, batches_per_update=1)
    arranged = ArrangedRun(**{**base.to_json(), **tier.convolutional, "arm": "batch"})
    plain = replace(base, architecture="A", **tier.connected, samples_per_batch=64)
    return {
        **{name: replace(arranged, arrangement=name) for name in ARRANGEMENTS},
        **{
            rated(arm, rate): replace(plain, arm=arm, learning_rate=rate) for rate in RATES for arm in ("none", "batch")
        },
    }


def rated(arm: str, rate: float) -> str:
    """The name of a run of architecture A."""
    return f"{arm}, rate {rate:g}"


class CurvedTrainer(TracedTrainer):
    """A run of architecture A under way, whose errors and curvature are looked at, first before any update: by then its
    statistics of testing are those of its weights."""

    def __init__(self, run: Run, data: Data, tier: Tier) -> None:
        super().__init__(run, data, tier.every, first=1)
        self.tier = tier

    def look(self) -> None:
        train_loss, train_error = evaluate(self.model, self.data.train_x, self.data.train_y)
        test_loss, test_error = evaluate(self.model, self.data.test_x, self.data.test_y)
        if not (math.isfinite(train_loss) and math.isfinite(test_loss)):
            self.failed = f"diverged: the loss became {train_loss}, in testing {test_loss}, at update {self.done}"
            return
        product = hessian(self.model, *self.looked_at())
        size = sum(p.numel() for p in self.model.parameters())
        self.trace.append(
            {
                "updates": self.done - 1,
                "train_loss": train_loss,
                "train_error": train_error,
                "test_loss": test_loss,
                "test_error": test_error,
                "curvature": largest_eigenvalue(product, size, self.tier.steps),
                "relative": largest_eigenvalue(relative(product, self.model), size, self.tier.steps),
            }
        )

    def looked_at(self) -> tuple[Tensor, Tensor]:
        """The training samples of which the curvature is taken: the first of the file."""
        return self.data.train_x[: self.tier.samples], self.data.train_y[: self.tier.samples]

    def record(self) -> dict[str, Any]:
        measured = {} if self.failed else {"scaling": scaling(self.model, *self.looked_at())}
        return {**super().record(), **measured}


def scaling(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[dict[str, float]]]:
    """For each epsilon and factor a: how far ``E(a W)`` is from ``E(W)`` and ``a dE/dW(a W)`` from ``dE/dW(W)``, in
    shares of these, in float64; the largest over the linear layers but the read-out, one scaled at a time.

    eps is added to the variance, so ``sigma = |a| sqrt(var + eps / a^2)`` after scaling: with an eps it is as if that
    had changed.
    """
    model, x = exact_copy(model), x.double()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    found: dict[str, list[dict[str, float]]] = {}
    for eps in EPSILONS:
        for norm in norms(model):
            norm.definition = replace(norm.definition, moment=replace(norm.moment, eps=eps))
        found[f"{eps:g}"] = []
        for a in FACTORS:
            off = [_off(model, model.get_submodule(name), a, x, y) for name in names]
            found[f"{eps:g}"].append(
                {"factor": a, "loss": max(loss for loss, _ in off), "gradient": max(gradient for _, gradient in off)}
            )
    return found


def _off(model: nn.Module, layer: nn.Module, a: float, x: Tensor, y: Tensor) -> tuple[float, float]:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    own = torch.cat([torch.full((p.numel(),), p is weight) for p in model.parameters()])
    kept = weight.detach().clone()
    loss, gradient = loss_and_gradient(model, x, y)
    with torch.no_grad():
        weight.mul_(a)
    scaled, rescaled = loss_and_gradient(model, x, y)
    with torch.no_grad():
        weight.copy_(kept)
    apart = (a * rescaled[own] - gradient[own]).norm() / gradient[own].norm()
    return ((scaled - loss).abs() / loss).item(), apart.item()


def trainer_of(run: Run, data: Data, tier: Tier) -> Trainer:
    """The trainer of an arrangement of B, or of A."""
    return ArrangedTrainer(run, data) if isinstance(run, ArrangedRun) else CurvedTrainer(run, data, tier)


# --- Claims


def _c49(records: Records) -> tuple[Verdict, str]:
    errors = {name: final(records, name) for name in ARRANGEMENTS}
    better = below(errors[BEFORE], errors[AFTER])
    figures = "test error " + "; ".join(f"{name}: {spread(of_seeds)}" for name, of_seeds in errors.items())
    return alike(better, 0.015), f"{figures}; {BEFORE}, lower than {AFTER} by {spread(better)}"


def _c50(records: Records) -> tuple[Verdict, str]:
    figures, exact = [], True
    for arm in ("batch", "none"):
        for eps in (f"{eps:g}" for eps in EPSILONS[: None if arm == "batch" else 1]):
            of_seeds = [r["scaling"][eps] for rate in RATES for r in records[rated(arm, rate)] if not r["failed"]]
            largest = {
                key: max((line[key] for one in of_seeds for line in one), default=math.nan)
                for key in ("loss", "gradient")
            }
            exact = exact and (arm == "none" or eps != "0" or max(largest.values()) <= 1e-6)
            what = f"{arm}, eps {eps}" if arm == "batch" else arm
            figures.append(f"{what}: loss off by {largest['loss']:.1e}, gradient by {largest['gradient']:.1e}")
    return ("reproduced" if exact else "contradicted"), "; ".join(figures)


def along(records: Records, name: str, key: str) -> list[float]:
    """The median of what was seen along the path of each seed; nan for a run that failed."""
    return [math.nan if r["failed"] else statistics.median(look[key] for look in r["trace"]) for r in records[name]]


def share_below(record: Record, other: Record, key: str) -> float:
    """At which share of the looks the first is lower; nan if one of the runs failed."""
    if record["failed"] or other["failed"]:
        return math.nan
    pairs = zip(record["trace"], other["trace"], strict=True)
    return statistics.fmean(float(a[key] < b[key]) for a, b in pairs)


def at_the_same_loss(record: Record, other: Record, key: str) -> tuple[float, float]:
    """Both at their first look with a training loss that both reach: the higher one of their lowest."""
    if record["failed"] or other["failed"]:
        return math.nan, math.nan
    level = max(min(look["train_loss"] for look in r["trace"]) for r in (record, other))
    first, second = (next(look[key] for look in r["trace"] if look["train_loss"] <= level) for r in (record, other))
    return first, second


def gap(records: Records, name: str, key: str) -> list[float]:
    """How much larger a figure of the test data is than that of the training data in the end, both in testing."""
    return [
        math.nan if r["failed"] else r["trace"][-1][f"test_{key}"] - r["trace"][-1][f"train_{key}"]
        for r in records[name]
    ]


def _c51(records: Records) -> tuple[Verdict, str]:
    parts: list[Verdict] = []
    figures: list[str] = []
    for rate in RATES:
        none, batch = rated("none", rate), rated("batch", rate)
        parts.append(
            judge(
                below(along(records, batch, "curvature"), along(records, none, "curvature")),
                0,
                sign_alone_is_partly=False,
            )
        )
        said = []
        for key, what in (("curvature", "largest eigenvalue"), ("relative", "the same of relative changes")):
            pairs = list(zip(records[batch], records[none], strict=True))
            lower = [share_below(a, b, key) for a, b in pairs]
            level = [at_the_same_loss(a, b, key) for a, b in pairs]
            said.append(
                f"{what}, median along the path: none {spread(along(records, none, key))}, batch "
                f"{spread(along(records, batch, key))}, lower at a share of {spread(lower)} of the looks, at the same "
                f"training loss {spread([b for _, b in level])} and {spread([a for a, _ in level])}"
            )
        for key, what in (("error", "test less training error"), ("loss", "test less training loss")):
            said.append(f"{what}: none {spread(gap(records, none, key))}, batch {spread(gap(records, batch, key))}")
        figures.append(f"rate {rate:g}: " + "; ".join(said))
    return together(parts), ". ".join(figures)


CLAIMS = [
    Claim("C-49", "Right before a convolution, BN does without gain and bias: two techniques (003, BorisG).", _c49),
    Claim("C-50", "Weights a times as large: the same loss, the gradient divided by a (003, BorisG).", _c50),
    Claim("C-51", "BN lowers the curvature of the loss; how much it over-fits is reported (003, BorisG).", _c51),
]


# --- The record


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the tables; beside it ``results.json`` and ``curves.png``."""
    checkpoint.write(out / "results.json", json.dumps({"title": title, "records": records}) + "\n")
    arranged = {name: records[name] for name in ARRANGEMENTS}
    curved = {name: seeds for name, seeds in records.items() if name not in ARRANGEMENTS}
    checkpoint.write(out / "curves.png", picture(arranged, curved))
    lines = [*opening(records[AFTER][0], title), *verdicts(records, CLAIMS)]
    for architecture, part in (("B", arranged), ("A", curved)):
        rows = summarize([r for seeds in part.values() for r in seeds])
        lines += ["", f"Architecture {architecture}:", "", table(rows)]
    checkpoint.write(out / "results.md", "\n".join([*lines, "", "![Curves](curves.png)", ""]))
    return out / "results.md"


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "comments", TIERS)
    named = runs(tier)
    first = named[AFTER]
    data = load(first.data, arguments.data_root, train_limit=first.train_limit, test_limit=first.test_limit)
    records = carry_out(named, arguments.seeds_or(), data, out, make=partial(trainer_of, tier=tier))
    return write_results(records, out, f"Two comments on batch normalization: {data.name}, tier {arguments.tier}")
