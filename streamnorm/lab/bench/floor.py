"""The memory floor: how fast this machine moves bytes, measured in the run that it is used in.

Two of the classical streams in torch, into tensors that are there already: copy (one read, one written) and triad
``a = b + s c`` (two read, one written), over sizes inside the caches and beyond.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypedDict

import torch

from streamnorm.lab.bench.case import Traffic

SIZES = tuple(1 << k for k in range(17, 29))
"""Bytes of one tensor, 128 KB to 256 MB."""
SECONDS = 0.04
"""That a sample lasts at least."""


class Row(TypedDict):
    """Bytes of one tensor, and the bytes a second that copy and triad read and write of them."""

    size: int
    copy: float
    triad: float


def measure(
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    seconds: float = SECONDS,
    device: str = "cpu",
    wait: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The median over rounds, size by size. ``wait`` as in ``timing.measure``."""

    def taken(run: Callable[[], object]) -> float:
        return _seconds(run, rounds, seconds, wait)

    rows: list[Row] = []
    for size in sizes:
        a, b, c = (torch.full((size // 4,), float(i), device=device) for i in range(3))
        rows.append(
            {
                "size": size,
                "copy": 2 * size / taken(lambda a=a, b=b: a.copy_(b)),
                "triad": 3 * size / taken(lambda a=a, b=b, c=c: torch.add(b, c, alpha=3.0, out=a)),
            }
        )
    return rows


def _seconds(run: Callable[[], object], rounds: int, least: float, wait: Callable[[], None]) -> float:
    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    repeats = max(1, math.ceil(least / max(time.perf_counter() - start, 1e-9)))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        taken.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken)


def bandwidth(rows: Sequence[Row], resident: int, allocate: bool) -> float:
    """Bytes a second for a step whose tensors take ``resident`` bytes together: the better of copy and triad at that
    size, between two sizes on a logarithmic scale. With ``allocate``, counted as triad's ordinary stores move them:
    four tensors in the place of three."""
    if allocate:
        return _at([(3 * row["size"], row["triad"] * 4 / 3) for row in rows], resident)
    copy, triad = ([(k * row["size"], row[n]) for row in rows] for k, n in ((2, "copy"), (3, "triad")))
    return max(_at(copy, resident), _at(triad, resident))


def _at(points: Sequence[tuple[int, float]], size: int) -> float:
    """The value at ``size``; outside of the points, that of the nearest."""
    for (low, a), (high, b) in pairwise(points):
        if low <= size <= high:
            share = math.log(size / low) / math.log(high / low)
            return a * (b / a) ** share
    return points[0][1] if size < points[0][0] else points[-1][1]


def distance(seconds: float, traffic: Traffic, rows: Sequence[Row], allocate: bool) -> float:
    """How many times longer than moving the bytes alone: 1 is the floor."""
    return seconds * bandwidth(rows, traffic.resident, allocate) / traffic.bytes(allocate)
