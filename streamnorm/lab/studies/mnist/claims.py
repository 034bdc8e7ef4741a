"""What the talk says about sigmoid units, checked on the records of ``mnist``."""

from __future__ import annotations

import math

import torch

from streamnorm.lab.studies.mnist.runs import NAIVE, SCALES, identity_error, scaled
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    below,
    end_errors,
    first_at,
    judge,
    spread,
    together,
)


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
