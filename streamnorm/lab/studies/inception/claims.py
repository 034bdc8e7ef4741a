"""What the talk says about its network, checked on the records of ``inception``."""

from __future__ import annotations

import math
import statistics

from streamnorm.lab.studies.inception.runs import ARMS, ENSEMBLE, FACTORS, SIGMOID_FACTOR, named
from streamnorm.lab.studies.study import (
    CHANCE,
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
    with_failures,
)

LEARNED, NEAR_CHANCE = CHANCE - 0.2, CHANCE - 0.05
"""Errors of a network that learned, at most, and of one that did not, at least."""


def errors_by_factor(records: Records, arm: str, nonlinearity: str = "relu") -> list[tuple[float, ...]]:
    """For each seed the last test errors at the learning rates x1, x5 and x30."""
    return list(zip(*(end_errors(records, named(arm, f, nonlinearity)) for f in FACTORS), strict=True))


def best_of_plain(records: Records) -> list[tuple[float, float]]:
    """For each seed the lowest test error that the network without normalization ever had, at any learning rate, and
    after how many updates; chance after infinitely many if no test ever came."""
    looks = zip(*(map(curve, records[named("none", factor)]) for factor in FACTORS), strict=True)
    tests = ([(error, updates) for look in seed for updates, error in look] for seed in looks)
    return [min(own, default=(CHANCE, math.inf)) for own in tests]


def curve(record: Record) -> list[tuple[float, float]]:
    """Test error by updates."""
    return [(line["updates"], line["test_error"]) for line in record["metrics"]]


def shares(records: Records, name: str) -> list[float]:
    """For each seed, in what share of the updates that ``best_of_plain`` took a run has that error; inf if never."""
    best = best_of_plain(records)
    return [first_at(curve(r), error) / updates for r, (error, updates) in zip(records[name], best, strict=True)]


def _c55(records: Records) -> tuple[Verdict, str]:
    fastest = FACTORS[-1]
    batch, plain = (end_errors(records, named(arm, fastest)) for arm in ("batch", "none"))
    parts: list[Verdict] = [
        judge([LEARNED - error for error in batch], 0),
        judge([1 - share for share in shares(records, named("batch", fastest))], 0.01),
        judge([error - LEARNED for error in plain], 0),
    ]
    figures = ["test error " + ", ".join(_told(records, named(arm, f)) for arm in ARMS for f in FACTORS)]
    reached = ", ".join(
        f"{named(arm, f)} {' '.join('never' if math.isinf(s) else f'{s:.2f}' for s in shares(records, named(arm, f)))}"
        for arm in ARMS[1:]
        for f in FACTORS
    )
    best = spread([error for error, _ in best_of_plain(records)])
    return together(parts), "; ".join([*figures, f"share of updates to the best of none ({best}): {reached}"])


def _c56(records: Records) -> tuple[Verdict, str]:
    least = [min(seed) for seed in errors_by_factor(records, "none", "sigmoid")]
    batch = end_errors(records, named("batch", SIGMOID_FACTOR, "sigmoid"))
    relu = end_errors(records, named("batch", SIGMOID_FACTOR))
    parts: list[Verdict] = [
        judge([error - NEAR_CHANCE for error in least], 0),
        judge([LEARNED - error for error in batch], 0),
        judge(below(relu, batch), 0),
    ]
    sigmoids = [name for name in records if name.endswith("sigmoid")]
    beside = [named(arm, SIGMOID_FACTOR) for arm in ARMS[1:]]
    return together(parts), "test error " + ", ".join(_told(records, name) for name in (*sigmoids, *beside))


def _c57(records: Records) -> tuple[Verdict, str]:
    own, averages = zip(*((r["members"], r["test_error"]) for r in records[ENSEMBLE]), strict=True)
    means = [statistics.fmean(errors) for errors in own]
    gap = below(averages, means)
    best = below(averages, [min(errors) for errors in own])
    figures = f"test error of ensembles {spread(averages)}, of members {spread(means)}; below their mean by "
    return judge(gap, 0.001), figures + f"{spread(gap)}, below the best of six by {spread(best)}"


def _told(records: Records, name: str) -> str:
    return f"{with_failures(name, records[name])} {spread(end_errors(records, name))}"


CLAIMS = [
    Claim("C-55", "The learning rate can be 30 times as high; what plain reaches is reached sooner (talk).", _c55),
    Claim("C-56", "Logistic units are trainable only with BN, and not as good as ReLUs (talk).", _c56),
    Claim("C-57", "An ensemble of six is better than its members (talk).", _c57),
]
