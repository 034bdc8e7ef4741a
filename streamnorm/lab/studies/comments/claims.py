"""What the two comments say, checked on the records of ``comments``."""

from __future__ import annotations

import math
import statistics

from streamnorm.lab.studies.comments.arrangement import AFTER, ARRANGEMENTS, BEFORE
from streamnorm.lab.studies.comments.runs import EPSILONS, RATES, rated
from streamnorm.lab.studies.study import Claim, Record, Records, Verdict, alike, below, final, judge, spread, together


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
