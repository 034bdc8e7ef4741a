"""Benchmarks of a device: where tensors stand, what is known of it, one run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import idle, work
from streamnorm import StreamingNorm
from streamnorm.lab.bench import compiled, device, layers, machine, registry, resnet, run
from streamnorm.lab.bench.gate import check_cycle
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.layers import OURS
from streamnorm.lab.bench.settings import Bench
from streamnorm.lab.cli import main


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
