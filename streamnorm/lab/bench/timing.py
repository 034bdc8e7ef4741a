"""Timing: all variants of a case in one process, round by round, each round in another random order.

A figure is the median over rounds of the ratio to the reference's time in the same round, so what slows a machine down
for a while slows both. Imports torch for nothing: it times whatever has a ``step``.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from streamnorm.lab.bench.case import Case, Subject

Times = dict[str, list[float]]
"""Seconds of a step, a value a round: ``both``, and ``forward`` where a subject has halves."""

LEAST = 5e-3
"""Seconds that a sample lasts at least: shorter steps are repeated inside of it."""
MOST_REPEATS = 900
WARM_UP = 3


def measure(
    case: Case,
    rounds: int,
    seed: int = 0,
    say: Callable[[int], None] = lambda done: None,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """The times of every variant. ``case.gate()`` comes first, and is the caller's to call.

    ``wait``: returns when all work that was given to a device is done.
    """
    subjects: dict[str, Subject] = {}
    for name, variant in case.variants.items():
        with variant.within():
            subjects[name] = variant.make()
    repeats = {}
    for name, subject in subjects.items():
        with case.variants[name].within():
            repeats[name] = _repeats(subject, wait)
    times: dict[str, Times] = {name: {"both": []} for name in subjects}
    order = random.Random(f"{seed}, {case}")
    for done in range(rounds):
        for name in order.sample(list(subjects), len(subjects)):
            subject = subjects[name]
            with case.variants[name].within():
                for half, run in (("forward", getattr(subject, "forward", None)), ("both", subject.step)):
                    if run is not None:
                        times[name].setdefault(half, []).append(_sample(subject, run, repeats[name], wait))
        say(done + 1)
    return times


def _repeats(subject: Subject, wait: Callable[[], None]) -> int:
    """Steps that make a sample last long enough."""
    taken = [_sample(subject, subject.step, 1, wait) for _ in range(WARM_UP)]
    once = min(taken) * getattr(subject, "count", 1)
    return max(1, min(MOST_REPEATS, math.ceil(LEAST / max(once, 1e-9))))


def _sample(subject: Subject, run: Callable[[], Any], repeats: int, wait: Callable[[], None]) -> float:
    """Seconds of a step, over ``repeats`` runs, after one that is not counted: caches and memory as left by the
    subject itself, not by the one before."""
    rest = getattr(subject, "rest", None)
    if rest is not None:
        rest()
    run()
    wait()
    with _uncollected():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        return (time.perf_counter() - start) / (repeats * getattr(subject, "count", 1))


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def backward(times: Times) -> list[float]:
    """What a step takes beyond its forward half, round by round."""
    return [both - forward for both, forward in zip(times["both"], times["forward"], strict=True)]


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of the same rounds."""
    return [a / b for a, b in zip(times, reference, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile.

    >>> quartiles([4, 1, 3, 2, 5])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def exponent(costs: Mapping[int, float]) -> tuple[float, int, int]:
    """The slope of log cost over log size in the upper half of the sizes, counted on the logarithmic scale; and the
    smallest and largest size that it is taken over.

    >>> exponent({1: 9.0, 2: 9.0, 4: 16.0, 8: 64.0, 16: 256.0})
    (2.0, 4, 16)

    Raises:
        ValueError: for fewer than two sizes.
    """
    if len(costs) < 2:
        raise ValueError(f"a slope needs two sizes, got {sorted(costs)}")
    middle = math.sqrt(min(costs) * max(costs))
    upper = sorted(size for size in costs if size >= middle * 0.999)
    upper = upper if len(upper) > 1 else sorted(costs)[-2:]
    x, y = [math.log(size) for size in upper], [math.log(costs[size]) for size in upper]
    return round(statistics.linear_regression(x, y).slope, 12), upper[0], upper[-1]
