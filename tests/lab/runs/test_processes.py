"""Classifiers that several processes train, as torchrun starts them: one run, to rounding; the first process writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import classifiers
import pytest
import torch
from processes import Job, results_by_job

from streamnorm.lab.cli import main
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.processes import Share

BY = 1e-9
"""float64: 12 updates at a rate of 0.1, each of which may multiply what rounding has changed by some."""
ARMS = {
    "streaming": Run(arm="streaming", width=8, samples_per_batch=4, batches_per_update=4, epochs=3),
    "paper": Run(arm="paper", width=8, samples_per_batch=2, batches_per_update=8, epochs=3),
    "batch": Run(arm="batch", width=8, samples_per_batch=16, batches_per_update=1, epochs=3),
    "layer": Run(arm="layer", width=8, samples_per_batch=2, batches_per_update=8, epochs=3),
    "loops": Run(arm="streaming", architecture="D", width=4, samples_per_batch=8, batches_per_update=2, epochs=3),
}
STOP = 6
"""Updates; an epoch has 4."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one and two processes make of every run, and the folders."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[str, Any] = {"folder": folder}
    for size in (1, 2):
        jobs: dict[str, Job] = {arm: (classifiers.trained, run, folder / f"{arm}{size}") for arm, run in ARMS.items()}
        if size == 2:
            jobs["stopped"] = (classifiers.trained, ARMS["streaming"], folder / "stopped", STOP)
            jobs["resumed"] = (classifiers.stopped_and_resumed, ARMS["streaming"], folder / "resumed", STOP)
        made[str(size)] = results_by_job(size, jobs)
    copytree(folder / "stopped", folder / "alone")
    made["alone"] = classifiers.trained(0, 1, ARMS["streaming"], folder / "alone")
    return made


def expect_close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) == 3
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=BY, abs=BY)


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_make_the_run_of_one(arm: str, found: dict[str, Any]) -> None:
    (want,), (first, other) = found["1"][arm], found["2"][arm]
    assert first == other
    expect_close(first, want)
    alone, together = (classifiers.weights(found["folder"] / f"{arm}{size}") for size in (1, 2))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=BY, atol=BY, msg=f"{name}: {{}}".format)


def test_a_resumed_run_is_equal_whatever_the_number_of_processes(found: dict[str, Any]) -> None:
    assert found["2"]["resumed"] == found["2"]["streaming"]
    expect_close(found["alone"], found["2"]["streaming"][0])


def test_every_sample_has_one_process() -> None:
    index = torch.randperm(24)
    parts = [Share(rank, 3).of(index, 6).reshape(4, 2) for rank in range(3)]
    assert torch.equal(torch.cat(parts, 1).flatten(), index)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="--samples-per-batch is a multiple of 2, got 1"):
        Share(0, 2).samples(1)


@pytest.mark.parametrize(
    ("command", "why"),
    [(["learn", "drift"], "has learned every row before it"), (["compare"], "run it without torchrun")],
)
def test_other_commands_say_that_they_run_in_one_process(
    command: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{command[0]} runs in one process, and torchrun has started 2" in said
    assert why in said


def test_torchrun_trains_one_network(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["train", "--train-limit", "32", "--test-limit", "16", "--epochs", "1", "--samples-per-batch", "4"]
    command = [*torchrun, "-m", "streamnorm", *run, "--batches-per-update", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
