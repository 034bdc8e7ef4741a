"""Sigmoid units on MNIST with and without normalization, after the talk on batch normalization (Ioffe 2015).

    streamnorm reproduce mnist --data-root DATA --tier reduced

3 x 100 sigmoid units, 60 samples an update. The talk and its paper leave open, and we chose: learning rate 0.1 (a tenth
of it in the last sixth), momentum 0.9, gray images of mean 0 and variance 1, weights from a Gaussian of deviation
``scale / sqrt(inputs)`` with ``scale`` 1 where a name says nothing else. The scale is that of the normalized layers;
the read-out keeps 1. ``none`` has a gain and a bias where the others normalize before them. A stopped study goes on
with the same command.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_finite
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.architectures import norm_factory
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import evaluate
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.summary import summarize, table
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.mnist.figures import picture
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    below,
    carry_out,
    end_errors,
    first_at,
    judge,
    spread,
    together,
)
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


# --- Claims


def growth(record: Record, beside: Record) -> float:
    """How many times the norm of all weights is that of another run at its end; inf for a run that failed, nan beside
    one that did."""
    if record["failed"] or beside["failed"]:
        return math.inf if record["failed"] else math.nan
    return record["trace"][-1]["weights"] / beside["trace"][-1]["weights"]


def drift(record: Record) -> float:
    """How far the percentiles of a sigmoid's input range over training, the mean over percentiles and units; nan for a
    run that failed."""
    if record["failed"]:
        return math.nan
    seen = torch.tensor([look["percentiles"] for look in record["trace"]])
    return (seen.amax(0) - seen.amin(0)).mean().item()


def reaches(record: Record, level: float) -> float:
    """The share of its updates after which a run first has this test error; inf if never."""
    curve = [(look["updates"], look["test_error"]) for look in record["trace"]]
    return first_at(curve, level) / curve[-1][0] if curve else math.inf


def _c52(records: Records) -> tuple[Verdict, str]:
    parts: list[Verdict] = []
    figures = [f"test error batch {spread(end_errors(records, 'batch'))}"]
    for name in NAIVE:
        grown = [growth(r, other) for r, other in zip(records[name], records["batch"], strict=True)]
        worse = below(end_errors(records, "batch"), end_errors(records, name))
        fails = [g >= 10 or w >= 0.1 for g, w in zip(grown, worse, strict=True)]
        parts.append(judge([float(fail) for fail in fails], 2 / 3))
        lost = sum(bool(r["failed"]) for r in records[name])
        times = ", ".join(f"{g:.3g}" for g in grown)
        figures.append(
            f"{name}: {lost} of {len(fails)} diverged, weights {times} times those of batch, test error "
            + spread(end_errors(records, name))
        )
    return together(parts), "; ".join(figures)


def spreads(records: Records, arm: str) -> list[float]:
    """The largest less the smallest test error over the scales of the initial weights, of each seed."""
    errors = zip(*(end_errors(records, scaled(arm, scale)) for scale in SCALES), strict=True)
    return [max(seed) - min(seed) for seed in errors]


def _c53(records: Records) -> tuple[Verdict, str]:
    by_arm = {arm: spreads(records, arm) for arm in ("none", "batch", "streaming")}
    parts: list[Verdict] = [judge([0.02 - s for s in by_arm["batch"]], 0), judge([s - 0.1 for s in by_arm["none"]], 0)]
    return together(parts), "test errors apart by " + ", ".join(f"{a} {spread(s)}" for a, s in by_arm.items())


def _c54(records: Records) -> tuple[Verdict, str]:
    plain, batch = end_errors(records, "none"), end_errors(records, "batch")
    shares = [reaches(r, level) for r, level in zip(records["batch"], plain, strict=True)]
    drifts = {arm: [drift(r) for r in records[arm]] for arm in ("none", "batch", "streaming")}
    parts: list[Verdict] = [
        judge([0.5 - share for share in shares], 0, sign_alone_is_partly=False),
        judge(below(batch, plain), 0, sign_alone_is_partly=False),
        judge(below(drifts["batch"], drifts["none"]), 0, sign_alone_is_partly=False),
    ]
    moved = ", ".join(f"{arm} {spread(values)}" for arm, values in drifts.items())
    open_units = {arm: [r["trace"][-1]["unsaturated"] for r in records[arm] if r["trace"]] for arm in drifts}
    reached = ", ".join("never" if math.isinf(share) else f"{share:.2f}" for share in shares)
    figures = f"test error none {spread(plain)}, batch {spread(batch)}; share of updates after which batch has that "
    figures += f"of none: {reached}; percentiles range over {moved}; unsaturated in the end: "
    return together(parts), figures + ", ".join(f"{arm} {spread(v)}" for arm, v in open_units.items() if v)


def identity_error(arm: str) -> float:
    """How far a normalization is from the identity once its gain is sigma and its bias mu, of the largest value."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(60, 100, generator=generator, dtype=torch.float64)
    norm = norm_factory(SigmoidRun(arm=arm))(100).double()
    assert isinstance(norm, Norm)
    assert norm.affine is not None
    norm(x)
    assert norm.H1 is not None
    with torch.no_grad():
        norm.affine.bias.copy_(norm.H1.estimate[0])
        norm.affine.weight.copy_(norm.H1.estimate[1])
        return ((norm.eval()(x) - x).abs().max() / x.abs().max()).item()


def _c58(records: Records) -> tuple[Verdict, str]:
    off = {arm: identity_error(arm) for arm in ("batch", "streaming")}
    figures = "off from the identity by " + ", ".join(f"{arm} {value:.1e}" for arm, value in off.items())
    return ("reproduced" if max(off.values()) <= 1e-6 else "contradicted"), figures


CLAIMS = [
    Claim("C-52", "Running averages without gradients through them blow up (talk).", _c52),
    Claim("C-53", "The scale of the weights is normalized out: their initial deviation matters less (talk).", _c53),
    Claim("C-54", "Sigmoid inputs stay more stable; training is faster and ends more accurate (talk).", _c54),
    Claim("C-58", "Scale and shift restore what normalization took away (talk).", _c58),
]


# --- The record


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it ``results.json`` and ``curves.png``."""
    checkpoint.write(out / "results.json", json.dumps({"title": title, "records": records}) + "\n")
    by_scale = {arm: {s: end_errors(records, scaled(arm, s)) for s in SCALES} for arm in ("none", "batch", "streaming")}
    checkpoint.write(out / "curves.png", picture(records, by_scale, NAIVE))
    lines = [*opening(records["none"][0], title), *verdicts(records, CLAIMS), ""]
    lines += [table(summarize([r for seeds in records.values() for r in seeds])), "", "![Curves](curves.png)", ""]
    checkpoint.write(out / "results.md", "\n".join(lines))
    return out / "results.md"


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "mnist", TIERS)
    data = load(tier.data, arguments.data_root)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out, make=partial(SigmoidTrainer, every=tier.every))
    return write_results(records, out, f"Sigmoid units: {data.name}, tier {arguments.tier}")
