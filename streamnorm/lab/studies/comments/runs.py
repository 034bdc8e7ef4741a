"""The runs of the study ``comments``: arrangements of architecture B, and A with a look at its curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.architecture_b import BASE
from streamnorm.lab.studies.comments.arrangement import ARRANGEMENTS, ArrangedRun, ArrangedTrainer
from streamnorm.lab.studies.comments.curvature import (
    exact_copy,
    hessian,
    largest_eigenvalue,
    loss_and_gradient,
    relative,
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
