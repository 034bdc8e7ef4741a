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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamnorm import StreamingNorm
from streamnorm.lab.bench import compiled, device, floor, layers, machine, registry, resnet, run, timing, worker
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
ASKED = {"rounds": 3, "threads": 2, "quick": False, "compile": False, "device": "cpu"}
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
    cases = registry.cases(asked=registry.Asked(quick, compiled=True))
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
    cases = registry.cases(asked=registry.Asked(compiled=True))
    for target in TARGETS:
        mine = [case for case in cases if case.group == target.group and target.cases in case.name]
        measured = [case for case in mine if {target.variant, target.reference} <= set(case.variants)]
        assert measured, target
        if target.of == "peak":
            assert all(case.variants[name].peak for case in measured for name in (target.variant, target.reference))


def test_tiny_cases_are_right_and_run() -> None:
    for case in registry.cases(asked=registry.Asked(quick=True)):
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
    assert "peak MB" not in text
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


def test_a_run_on_a_device_is_not_judged_and_names_it(journal: Journal) -> None:
    journal.start({**ASKED, "device": "cuda"}, {"device": "some GPU, 16 GB", "CUDA": "12.9", **FACTS})
    fill(journal)
    text = write_record(journal).read_text()
    assert "| device | some GPU, 16 GB |\n| CUDA | 12.9 |" in text
    assert "Layers, inputs and gradients are on the device" in text
    assert "glibc" not in text
    assert "missed" not in text
    assert not sentences(journal)


def test_memory_stands_in_the_record_and_is_judged(journal: Journal) -> None:
    sizes = {"default": 1_500_000, "nn.BatchNorm2d": 1_000_000}
    variants = {
        name: Variant(partial(Idle, name, []), None if "nn" in name else (lambda: None), peak=partial(int, size))
        for name, size in sizes.items()
    }
    work([Case("resnet", "tiny", "nn.BatchNorm2d", variants)], journal, "tuned", 1)
    case = journal.cases()[0]
    assert case.peaks == sizes
    judged = [(t.of, round(total.mean, 6), met) for t, total, met in verdicts([case]) if t.of == "peak"]
    assert judged == [("peak", 1.5, False)]
    text = write_record(journal).read_text()
    assert re.search(r"\| floor \| peak MB \|\n.*\n\| default \|.*\| 1\.5 \|\n", text)
    assert "| resnet | default | nn.BatchNorm2d | 1.50 | 1.50 | ≤ 1.00, peak memory | **missed** |" in text


# Devices


def test_a_device_that_is_not_there_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "xpu:7", "--out", str(tmp_path / "never")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("streamnorm: there is no device 'xpu:7' for torch ")
    assert f"--device takes {', '.join(device.there())}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "never").exists()


def test_devices_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, names in ((0, ["cpu"]), (2, ["cpu", "cuda", "cuda:0", "cuda:1"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device.there() == names
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device.waiting("cpu")()
    device.waiting("cuda:1")()
    assert waited == ["cuda:1"]


def test_groups_are_left_out_with_a_line() -> None:
    groups = list(registry.GROUPS)
    slow, on_cpu = ["compiled", "resnet"], ["online", "cycle", "monitor"]
    names, lines = registry.chosen([], registry.Asked())
    assert names == [name for name in groups if name not in slow]
    assert lines == ["left out, takes minutes to compile: compiled, resnet (--compile, or --groups)"]
    assert registry.chosen([], registry.Asked(compiled=True)) == (groups, [])
    assert registry.chosen(["resnet"], registry.Asked()) == (["resnet"], [])
    names, lines = registry.chosen([], registry.Asked(compiled=True, device="cuda"))
    assert names == [name for name in groups if name not in on_cpu]
    assert lines == ["left out, of the CPU alone: online, cycle, monitor"]
    assert registry.chosen(["online", "single"], registry.Asked(device="cuda"))[0] == ["single"]
    with pytest.raises(ValueError, match="nothing is left to time on cuda; left out, of the CPU alone: online"):
        registry.chosen(["online"], registry.Asked(device="cuda"))


def test_samples_and_the_memory_floor_end_when_the_device_is_done() -> None:
    calls: list[str] = []
    case = Case("features", "one", "a", {"a": Variant(partial(Idle, "step", calls, 1e-2))})
    timing.measure(case, rounds=1, wait=lambda: calls.append("wait"))
    assert calls == ["step", "wait"] * 2 * (timing.WARM_UP + 1), "once before the clock, once before it is read"
    calls.clear()
    floor.measure([1 << 12], rounds=2, seconds=0, wait=lambda: calls.append("wait"))
    assert len(calls) == 2 * (2 + 2)


@pytest.mark.parametrize("group", [name for name, g in registry.GROUPS.items() if g.anywhere and not g.compiles])
def test_layers_and_what_arrives_stand_on_the_device(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" computes nothing, and takes no tensor of another."""
    monkeypatch.setattr(layers, "second_cache", lambda device: 1 << 20)
    monkeypatch.setattr(layers, "free_memory", lambda device: 1 << 30)
    case = next(registry.GROUPS[group].cases(registry.Asked(quick=True, device="meta")))
    ours = next(name for name, variant in case.variants.items() if variant.check)
    check = case.variants[ours].check
    assert check is not None
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        check()
    assert not any(name.endswith((" eager", " loop")) and "norm" not in name for name in case.variants)
    for name in (ours, case.reference):
        if group in ("recurrent", "over_time") and name == ours:
            continue  # its loop asks for values, which "meta" has not
        subject: Any = case.variants[name].make()
        subject.step()
        net = getattr(subject, "layer", None) or subject.net
        tensors = [subject.pair.x, subject.pair.dy, *net.parameters(), *net.buffers()]
        assert {str(tensor.device) for tensor in tensors} == {"meta"}


def test_a_cycle_is_checked_on_the_device() -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        check_cycle(OURS["full B"], 4, device="meta")


def test_the_facts_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU-1", total_memory=16 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(machine, "subprocess", SimpleNamespace(run=nothing_there, CalledProcessError=ValueError))
    found = machine.facts("cuda")
    assert machine.name("cuda") == "some-gpu-1"
    assert [found[key] for key in ("device", "driver", "CUDA")] == ["Some GPU-1, 16 GB", "unknown", "12.9"]
    assert "torch" in found
    assert machine.second_cache("cuda") == 50 << 20
    assert "device" not in machine.facts()


def nothing_there(*command: Any, **options: Any) -> Any:
    raise FileNotFoundError("nvidia-smi")


def test_a_device_is_timed_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[dict[str, Any]] = []

    def timed(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        wishes.append(json.loads(command[-1]))
        work([idle()], Journal(Path(wishes[-1]["journal"])), wishes[-1]["allocator"], 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", timed)
    monkeypatch.setattr(run, "check_device", lambda name: None)
    monkeypatch.setattr(run, "facts", lambda device: {"device": device})
    monkeypatch.setattr(run, "name", lambda device: f"some-{device}")
    path, verdicts = run.bench(Bench(rounds=1, out=tmp_path, device="cuda"))
    assert path.name.endswith("-some-cuda.md")
    assert [(wish["device"], wish["allocator"]) for wish in wishes] == [("cuda", "tuned")]
    assert "online" not in wishes[0]["groups"]
    assert not verdicts
    with pytest.raises(ValueError, match="--allocator is of the CPU; leave it out with --device cuda"):
        run.bench(Bench(out=tmp_path / "never", device="cuda", allocator="tuned"))


# Compiled networks and memory


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that only trace, one layer a network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled, "DEPTH", 1)
    torch._dynamo.reset()


@pytest.mark.usefixtures("quickly")
def test_peers_are_compiled_too() -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    for make in (nn.BatchNorm2d, lambda c: nn.Sequential(nn.BatchNorm2d(c))):
        graphs.clear()
        layers.whole(make(3))(torch.randn(2, 3, 4, 4))
        assert graphs["unique_graphs"] == 1


class OffCompiled(StreamingNorm):
    """Wrong where a compiler sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * torch.compiler.is_compiling())


@pytest.mark.usefixtures("quickly")
def test_a_compiled_network_that_is_not_the_plain_one_is_refused() -> None:
    network = compiled.Network(nn.Tanh, "contiguous", 1, 4)
    network.check(StreamingNorm, "cpu")
    with pytest.raises(WrongError, match=r"update 0 in torch\.float32, y: off by"):
        network.check(OffCompiled, "cpu")


def test_networks_on_a_device() -> None:
    for network in (compiled.Network(nn.ReLU, "channels_last", 2, 4, 8), compiled.Network(nn.Tanh, "contiguous", 1, 4)):
        pair = network.pair("meta")
        subject = layers.LayerStep(network.make(nn.BatchNorm2d if network.side else nn.LayerNorm), pair)
        subject.step()
        assert {str(tensor.device) for tensor in (pair.x, pair.dy, *subject.parameters)} == {"meta"}
    training = resnet.Training("meta", 2, 16, 4, (4, 8), 1)
    subject = training.step(StreamingNorm, False, training.samples)
    subject.step()
    found = [*subject.model.parameters(), *subject.model.buffers(), *(t for pair in subject.pairs for t in pair)]
    assert {str(tensor.device) for tensor in found} == {"meta"}


def test_the_residual_network_has_the_shape_of_resnet18() -> None:
    with torch.device("meta"):
        model = resnet.resnet(nn.BatchNorm2d, 1000)
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
        assert model[:-3](torch.empty(8, 3, 64, 64)).shape == (8, 512, 2, 2)
        assert model(torch.empty(8, 3, 64, 64)).shape == (8, 1000)


@pytest.mark.filterwarnings("ignore")
def test_peak_memory_is_counted_to_the_byte() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        both = torch.empty(1 << 19), torch.empty(1 << 18)
        kept.clear()  # what the step before has left
        kept.append(both[0])

    step()
    kept.clear()
    assert device.peak(step, "cpu") == (2 + 2 + 1) << 20


def test_a_step_of_ours_holds_hardly_more_than_batch_normalization() -> None:
    """Beside the maps, statistics of each layer, which these small maps do not make negligible."""
    training = resnet.Training("cpu", 2, 16, 4, (4, 8), 1)
    ours, peer = (training.peak(norm, False) for norm in (StreamingNorm, nn.BatchNorm2d))
    assert peer < ours * 1.05
    assert ours < peer * 1.05


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
