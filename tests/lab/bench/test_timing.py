"""Timing: rounds, repetitions, and the figures that are derived from them."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from benchmarks import Idle, idle
from streamnorm.lab.bench import floor, timing
from streamnorm.lab.bench.case import Case, Traffic, Variant
from streamnorm.lab.bench.targets import geometric_mean


def test_a_round_times_everything_once_in_random_order() -> None:
    calls: list[str] = []
    case = idle(calls=calls)
    times = timing.measure(case, rounds=8)
    assert {name: sorted(halves) for name, halves in times.items()} == {
        "ours": ["both", "forward"],
        "peer": ["both"],
        "reference": ["both"],
    }
    assert {len(values) for halves in times.values() for values in halves.values()} == {8}
    # A rest, a step that is not counted, then the counted ones: the turns of a round are runs of one name.
    turns = [name for i, name in enumerate(calls) if i == 0 or name.split()[0] != calls[i - 1].split()[0]]
    assert len({tuple(turns[-i - 3 : len(turns) - i]) for i in range(0, 12, 3)}) > 1, "always the same order"
    assert Counter(calls)["ours rest"] == timing.WARM_UP + 2 * 8
    assert timing.measure(case, rounds=1, seed=1).keys() == times.keys()


def test_short_steps_are_repeated_and_long_ones_are_not() -> None:
    short, long = Idle("short", []), Idle("long", [], 0.01)
    case = Case("features", "one", "long", {"short": Variant(lambda: short), "long": Variant(lambda: long)})
    times = timing.measure(case, rounds=2)
    assert len(short.calls) > len(long.calls) * 2
    assert len(long.calls) == 2 * (timing.WARM_UP + 2)  # each counted step after one that is not
    assert min(times["long"]["both"]) >= 0.01
    long.count = 10  # type: ignore[attr-defined]
    assert 1e-3 <= min(timing.measure(case, rounds=1)["long"]["both"]) < 5e-3


def test_samples_and_the_memory_floor_end_when_the_device_is_done() -> None:
    calls: list[str] = []
    case = Case("features", "one", "a", {"a": Variant(partial(Idle, "step", calls, 1e-2))})
    timing.measure(case, rounds=1, wait=lambda: calls.append("wait"))
    assert calls == ["step", "wait"] * 2 * (timing.WARM_UP + 1), "once before the clock, once before it is read"
    calls.clear()
    floor.measure([1 << 12], rounds=2, seconds=0, wait=lambda: calls.append("wait"))
    assert len(calls) == 2 * (2 + 2)


def test_figures() -> None:
    assert timing.ratios([1.0, 6.0], [2.0, 3.0]) == [0.5, 2.0]
    assert timing.backward({"both": [3.0, 5.0], "forward": [1.0, 2.0]}) == [2.0, 3.0]
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert timing.exponent({2**k: 3.0 * 2 ** (1.5 * k) for k in range(9)}) == (1.5, 16, 256)
    assert timing.exponent({4: 1.0, 64: 16.0}) == (1.0, 4, 64)
    with pytest.raises(ValueError, match="a slope needs two sizes"):
        timing.exponent({4: 1.0})
    assert geometric_mean([0.25, 4.0, 1.0]) == 1.0
    table: list[floor.Row] = [{"size": 100, "copy": 10.0, "triad": 6.0}, {"size": 400, "copy": 40.0, "triad": 6.0}]
    assert floor.bandwidth(table, 400, allocate=False) == pytest.approx(20.0), "copy, halfway on the logarithmic scale"
    assert floor.bandwidth(table, 9999, allocate=True) == 8.0
    traffic = Traffic(read=300, written=200, resident=400)
    assert floor.distance(50.0, traffic, table, allocate=False) == pytest.approx(2.0)
    assert floor.distance(50.0, traffic, table, allocate=True) == pytest.approx(50 * 8 / 700)
    assert all(row["copy"] > 1e6 and row["triad"] > 1e6 for row in floor.measure([1 << 12], rounds=1, seconds=1e-4))
