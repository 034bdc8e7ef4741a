"""Benchmarks: nothing is timed that is not right, figures are what they say, a record is whole and goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamnorm import StreamingNorm
from streamnorm.lab.bench import floor, registry, run, timing, worker
from streamnorm.lab.bench.case import Case, Shared, Traffic, Variant, WrongError
from streamnorm.lab.bench.gate import check_cycle, check_layer
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.layers import OURS
from streamnorm.lab.bench.record import sentences, write_record
from streamnorm.lab.bench.results import curves, median_ratio, rows, totals, verdicts
from streamnorm.lab.bench.settings import Bench
from streamnorm.lab.bench.targets import TARGETS, geometric_mean
from streamnorm.lab.cli import main

FACTS = {"processor": "some cpu", "torch": "2.13.0"}
ASKED = {"rounds": 3, "threads": 2, "quick": False, "compile": False}
PNG = b"\x89PNG\r\n"


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


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "2026-01-31-some-cpu.jsonl")
    journal.start(ASKED, FACTS)
    return journal


work = partial(worker.work, quick=True)


# The registry


@pytest.mark.parametrize("quick", [True, False])
def test_registry_is_well_formed(quick: bool) -> None:
    cases = registry.cases(quick=quick, compiled=True)
    assert {case.group for case in cases} == set(registry.GROUPS)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert any(variant.check for variant in case.variants.values()), (
            f"{case} has nothing of ours, or no gate for it"
        )
        assert case.variants[case.reference].check is None, f"{case}: the reference is another library's"
        assert len(case.variants) > 1
    series = [(case.series, case.size) for case in cases if case.series]
    assert series == sorted(series, key=lambda s: [t for t, _ in series].index(s[0]) * 1e6 + s[1]), "curves grow"
    curves = {"batch", "features", "map side", "cycle length", "time steps", "hidden size"}
    assert {name for name, _ in series} == curves


def test_every_target_is_measured() -> None:
    cases = registry.cases()
    for target in TARGETS:
        mine = [case for case in cases if case.group == target.group and target.cases in case.name]
        assert any({target.variant, target.reference} <= set(case.variants) for case in mine), target


def test_tiny_cases_are_right_and_run() -> None:
    for case in registry.cases(quick=True):
        if case.group != "growth" or case.size <= 4:
            case.gate()
            for variant in case.variants.values():
                with variant.within():
                    variant.make().step()


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'features'"):
        registry.cases(["feature"])


def test_a_case_needs_its_reference_and_its_place_on_a_curve() -> None:
    with pytest.raises(ValueError, match="the reference 'best' is none of"):
        Case("features", "one", "best", {"ours": Variant(lambda: Idle("", []))})
    with pytest.raises(ValueError, match="a point of a curve has a series and a size"):
        Case("growth", "one", "ours", {"ours": Variant(lambda: Idle("", []))}, series="batch")


def test_what_is_shared_lives_as_long_as_its_holders() -> None:
    class Value:
        pass

    made: list[int] = []
    shared = Shared(lambda: made.append(1) or Value())
    held = shared()
    assert shared() is held
    del held
    shared()
    assert len(made) == 2


# The gate


class Off(StreamingNorm):
    """Wrong in the sixth digit of what it returns, beyond what float32 explains."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-4)


class Forgetful(StreamingNorm):
    """Right in what it returns, wrong in what it remembers for testing."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.H1 is not None:
            self.H1.estimate.mul_(1.001)
        return y


class Broken(StreamingNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 4, 3)], ids=str)
def test_gate_is_green_for_what_is_right(name: str, shape: tuple[int, ...]) -> None:
    check_layer(OURS[name], shape)
    check_layer(OURS[name], shape, torch.bfloat16)
    if name != "BatchNorm" and " A" not in name and name != "full":
        check_cycle(OURS[name], 5)


@pytest.mark.parametrize(
    ("layer", "what"),
    [(Off, r"y of a .* is off by \S+e-0\d"), (Forgetful, r"H1\.estimate of a"), (Broken, "no such kernel")],
)
def test_a_wrong_layer_turns_the_gate_red_and_nothing_is_timed(layer: Any, what: str, journal: Journal) -> None:
    calls: list[str] = []
    wrong = idle(name="wrong", calls=calls, check=partial(check_layer, layer, (4, 6)))
    with pytest.raises(WrongError, match=what) as caught:
        work([idle(calls=calls), wrong], journal, "tuned", 1)
    assert "features, wrong: ours: " in str(caught.value)
    assert not calls
    assert {line["kind"] for line in journal.lines()} == {"start", "green"}


def test_a_red_gate_fails_the_command(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, worker.RED))
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 2
    assert "do not compute what they should; nothing was timed" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.md"))


# Timing


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


# The record

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


def test_results_are_medians_of_the_same_rounds(journal: Journal) -> None:
    fill(journal)
    cases = journal.cases()
    first = cases[0]
    full = rows(first)[0]
    assert (full.variant, full.is_ours, full.seconds, full.ratio) == ("full", True, 1.0, (0.5, 0.5, 0.5))
    assert full.forward == pytest.approx(0.2)
    assert full.backward == pytest.approx(0.8)
    assert full.floor == pytest.approx((1e10 / (5 << 20), 1e10 * 4 / 3 / (7 << 20)))
    assert median_ratio(first, "full", "nn.LayerNorm") == 2.0
    mine = [case for case in cases if case.allocator == "tuned"]
    assert [(t.variant, t.mean, t.worst) for t in totals(mine[:1])] == [
        *(("full", 0.5, 0.5), ("one-pass", 0.2, 0.2), ("nn.LayerNorm", 0.25, 0.25)),
    ]
    judged = [(t.group, t.variant, t.reference, total.mean, met) for t, total, met in verdicts(mine)]
    assert judged == [
        ("contiguous", "full", "nn.BatchNorm2d", 0.5, False),
        ("contiguous", "one-pass", "nn.BatchNorm2d", 0.2, True),
        ("features", "full", "nn.BatchNorm1d", 0.5, True),
        ("features", "one-pass", "nn.BatchNorm1d", 0.2, True),
        ("features", "full", "nn.LayerNorm", 2.0, False),
    ]
    assert {(c.variant, c.exponent, c.low, c.high) for c in curves(mine)} == {
        ("full", 1.5, 4, 8),
        ("nn.BatchNorm2d", 1.5, 4, 8),
    }


def test_record_has_tables_and_pictures(journal: Journal) -> None:
    fill(journal)
    path = write_record(journal)
    text = path.read_text()
    assert path.name == "2026-01-31-some-cpu.md"
    assert "| processor | some cpu |" in text
    assert "| contiguous | full | nn.BatchNorm2d | 0.50 | 0.50 | ≤ 0.35, worst ≤ 0.60 | **missed** |" in text
    assert "| full | 1,000,000 | 0.50 | [0.50, 0.50] | 0.20 | 0.80 | 5 (7) | 1907.3 (1816.5) |" in text
    assert "| exponent | 1.50 (4 to 8) | 1.50 (4 to 8) |" in text
    assert text.count("### ") == 6, "a table each way to keep memory"
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [image.rpartition("-")[2] for image in images] == ["contiguous.png", "features.png", "growth.png"]
    assert all((path.parent / image).read_bytes().startswith(PNG) for image in images)
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert sentences(journal)[0] == (
        "contiguous, full, to nn.BatchNorm2d, mean 0.50, worst 0.50, target ≤ 0.35, worst ≤ 0.60, missed"
    )


def test_other_thread_counts_are_not_judged(journal: Journal) -> None:
    journal.start({**ASKED, "threads": 1}, FACTS)
    fill(journal)
    text = write_record(journal).read_text()
    assert "missed" not in text
    assert "nothing is judged by this run" in text
    assert not sentences(journal)


# Going on


def test_what_is_in_the_journal_is_not_timed_again(journal: Journal) -> None:
    calls: list[str] = []
    work([idle(calls=calls)], journal, "tuned", 2)
    assert "ours" in calls
    with journal.path.open("a") as file:
        file.write('{"kind": "case", "allocator": "tun')  # the process was killed here
    calls.clear()
    other: list[str] = []
    work([idle(calls=calls), idle(name="two", calls=other)], journal, "tuned", 2)
    assert not calls
    assert "ours" in other
    work([idle(calls=calls)], journal, "default", 2)
    assert "ours" in calls
    assert [(c.allocator, c.name) for c in journal.cases()] == [("tuned", "one"), ("tuned", "two"), ("default", "one")]


def test_a_command_asks_the_gate_once_for_both_allocators(journal: Journal) -> None:
    asked: list[int] = []
    case = idle(check=lambda: asked.append(1))
    for command, allocator in (("a", "tuned"), ("a", "default")):
        work([case], journal, allocator, 1, command)
    assert len(asked) == 1
    work([idle(name="two", check=lambda: asked.append(1))], journal, "tuned", 1, "b")
    assert len(asked) == 2


def test_a_record_is_neither_overwritten_nor_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []

    def timed(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        wishes = json.loads(command[-1])
        work([idle()], Journal(Path(wishes["journal"])), wishes["allocator"], wishes["rounds"], wishes["command"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", timed)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    asked = Bench(rounds=1, out=tmp_path)
    path, _ = run.bench(asked)
    assert environments[0].items() >= run.TUNED.items()
    assert not set(run.TUNED) & set(environments[1]), "the default allocator, whatever was set outside"
    with pytest.raises(ValueError, match="is there already; --resume goes on with it"):
        run.bench(asked)
    with pytest.raises(ValueError, match="measured otherwise: rounds 1 there and 2 here"):
        run.bench(Bench(rounds=2, out=tmp_path, resume=True))
    monkeypatch.setattr("streamnorm.lab.bench.run.date", type("Tomorrow", (), {"today": lambda: None}))
    assert run.bench(Bench(rounds=1, out=tmp_path, resume=True))[0] == path


def test_quick_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamnorm", "bench", "--quick", "--groups", "single", "--threads", "1"]
    command += ["--allocator", "tuned"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    record = next(tmp_path.glob("*.md"))
    assert f"Record: {record}" in done.stdout
    text = record.read_text()
    assert "A quick run on tiny inputs" in text
    assert "| full B eager |" in text
    assert "streamnorm bench --quick --groups single" in text
    assert len(list(tmp_path.glob("*.png"))) == 1
