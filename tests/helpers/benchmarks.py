"""Subjects of a benchmark that do nothing, and a journal with made-up times."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from streamnorm.lab.bench import floor, worker
from streamnorm.lab.bench.case import Case, Traffic, Variant
from streamnorm.lab.bench.journal import Journal

FACTS = {"processor": "some cpu", "torch": "2.13.0"}


ASKED = {"rounds": 3, "threads": 2, "quick": False, "compile": False, "device": "cpu"}


class Idle:
    """A subject that does nothing, and says when it was asked to."""

    def __init__(self, name: str, calls: list[str], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds

    def step(self) -> None:
        self.calls.append(self.name)
        time.sleep(self.seconds)


class Halves(Idle):
    def forward(self) -> None:
        self.calls.append(f"{self.name} forward")

    def rest(self) -> None:
        self.calls.append(f"{self.name} rest")


def idle(group: str = "features", name: str = "one", calls: list[str] | None = None, check: Any = None) -> Case:
    calls = [] if calls is None else calls
    variants = {"ours": Variant(partial(Halves, "ours", calls), check or (lambda: None))}
    variants |= {n: Variant(partial(Idle, n, calls)) for n in ("peer", "reference")}
    return Case(group, name, "reference", variants)


work = partial(worker.work, quick=True)


NAMES = {"contiguous": "32x64x56x56 float32 contiguous", "features": "128x1024 float32"}


def fill(journal: Journal) -> None:
    """Made-up times: round i takes i + 1 seconds, times a factor for each variant."""
    table: list[floor.Row] = [{"size": 1 << 20, "copy": 1e10, "triad": 1e10}]
    for allocator in ("tuned", "default"):
        journal.add_floor(allocator, table)
        for group, reference in (("contiguous", "nn.BatchNorm2d"), ("features", "nn.BatchNorm1d")):
            factors = {"full": 0.5, "one-pass": 0.2, "nn.LayerNorm": 0.25, reference: 1.0}
            traffic = Traffic(3 << 20, 2 << 20, 4 << 20)
            variants = {
                name: Variant(lambda: Idle("", []), (lambda: None) if "nn" not in name else None, traffic=traffic)
                for name in factors
            }
            times = {n: {h: [f * (i + 1) for i in range(3)] for h in ("both", "forward")} for n, f in factors.items()}
            times["full"]["forward"] = [0.1 * (i + 1) for i in range(3)]
            times[reference]["forward"] = [0.5 * (i + 1) for i in range(3)]
            journal.add_case(allocator, Case(group, NAMES[group], reference, variants), times)
        for size in (1, 2, 4, 8):
            variants = {
                n: Variant(lambda: Idle("", []), c) for n, c in (("full", lambda: None), ("nn.BatchNorm2d", None))
            }
            case = Case("growth", f"batch {size}", "nn.BatchNorm2d", variants, "batch", size)
            journal.add_case(allocator, case, {n: {"both": [size**1.5 * 1e-6] * 3} for n in variants})
