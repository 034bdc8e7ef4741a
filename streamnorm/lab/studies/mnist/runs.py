"""The runs of the study ``mnist``: networks of sigmoids, and what is looked at while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_finite
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import evaluate
from streamnorm.lab.runs.classifier.models import norm_factory
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.traced import TracedTrainer
from streamnorm.monitoring.sites import PERCENTILES, SATURATED
from streamnorm.nn.norm import Norm

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
UNITS = 10
"""Units of the last hidden layer that are followed."""
LOOKED_AT = 1000
"""Test samples that their inputs are taken of."""
NAIVE = ("no gradients", "no gradients, slow")
"""Normalization by running averages that no gradient goes through."""


@dataclass(frozen=True)
class Tier:
    """The size of a study: which data, for how long, and after how many updates each look at the network."""

    data: str
    width: int
    epochs: int
    every: int


TIERS = {
    "smoke": Tier("digits", 12, 1, 8),
    "reduced": Tier("mnist", 100, 6, 200),
    "full": Tier("mnist", 100, 50, 500),
}


@dataclass(frozen=True)
class SigmoidRun(Run):
    """A run whose hidden units are sigmoids.

    Attributes:
        scale: deviation of the initial weights before the normalizations, in units of 1 / sqrt(inputs).
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_finite("scale", self.scale, above=True)


def runs(tier: Tier) -> dict[str, SigmoidRun]:
    """Every run of the study by name."""
    base = SigmoidRun(data=tier.data, width=tier.width, epochs=tier.epochs, samples_per_batch=60, batches_per_update=1)
    arms = {arm: replace(base, arm=arm) for arm in ("none", "batch", "streaming")}
    ungraded = replace(arms["streaming"], beta=(0.0, 0.0, 0.0))
    return {
        **arms,
        "streaming 1 x 60": replace(arms["streaming"], samples_per_batch=1, batches_per_update=60),
        NAIVE[0]: ungraded,
        NAIVE[1]: replace(ungraded, alpha=(1.0, 0.0), kappa=(0.99, 0.01, 0.99, 0.01)),
        **{
            scaled(arm, scale): replace(run, scale=scale)
            for arm, run in arms.items()
            for scale in SCALES
            if scale != base.scale
        },
    }


def scaled(arm: str, scale: float) -> str:
    """The name of a run."""
    return arm if scale == 1 else f"{arm}, scale {scale:g}"


class SigmoidTrainer(TracedTrainer):
    """A run under way, whose test error, sigmoids and weights are looked at."""

    def network(self, run: Run, data: Data) -> nn.Module:
        assert isinstance(run, SigmoidRun)
        model = super().network(run, data)
        assert isinstance(model, nn.Sequential)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            for i, module in enumerate(model):
                if isinstance(module, nn.ReLU):
                    model[i] = nn.Sigmoid()
                elif isinstance(module, nn.Linear):
                    scale = 1.0 if module is model[-1] else run.scale
                    nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
        return model

    def look(self) -> None:
        inputs = self.last_inputs(self.data.test_x[:LOOKED_AT])
        loss, error = evaluate(self.model, self.data.test_x, self.data.test_y)
        if not (math.isfinite(loss) and inputs.isfinite().all()):
            self.failed = f"diverged: the test loss became {loss} after update {self.done}"
            return
        assert isinstance(self.model, nn.Sequential)
        followed = inputs[:, :: max(1, inputs.shape[1] // UNITS)][:, :UNITS]
        weights = [module.weight.detach().norm().square() for module in self.model if isinstance(module, nn.Linear)]
        self.trace.append(
            {
                "updates": self.done,
                "test_error": error,
                "percentiles": followed.quantile(torch.tensor(PERCENTILES) / 100, 0).tolist(),
                "unsaturated": (inputs.abs() < SATURATED).float().mean().item(),
                "weights": torch.stack(weights).sum().sqrt().item(),
            }
        )

    @torch.no_grad()
    def last_inputs(self, x: Tensor) -> Tensor:
        """What goes into the sigmoids of the last hidden layer in testing, ``(n, width)``."""
        assert isinstance(self.model, nn.Sequential)
        self.model.eval()
        try:
            for module in list(self.model)[:-2]:  # but the last sigmoid and the read-out
                x = module(x)
            return x
        finally:
            self.model.train()


def identity_error(arm: str) -> float:
    """How far a normalization is from the identity once its gain is sigma and its bias mu, of the largest value."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(60, 100, generator=generator, dtype=torch.float64)
    norm = norm_factory(SigmoidRun(arm=arm))(100).double()
    assert isinstance(norm, Norm)
    assert norm.affine is not None
    assert norm.affine.bias is not None
    norm(x)
    assert norm.H1 is not None
    with torch.no_grad():
        norm.affine.bias.copy_(norm.H1.estimate[0])
        norm.affine.weight.copy_(norm.H1.estimate[1])
        return ((norm.eval()(x) - x).abs().max() / x.abs().max()).item()
