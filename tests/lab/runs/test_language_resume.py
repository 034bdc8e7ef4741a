"""Language models that are stopped go on from their folder as if they had not been; other folders are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from close import same
from texts import small, snapshot, tiny, to_the_end

from streamnorm.lab.runs import checkpoint, keeping
from streamnorm.lab.runs.checkpoint import CheckpointError
from streamnorm.lab.runs.language.loop import TextTrainer, train_text
from streamnorm.lab.runs.language.run import TextRun


@pytest.mark.parametrize(
    ("arch", "arm"), [("gru", "streaming"), ("lstm", "streaming"), ("rnn", "tsbn"), ("rnn", "layer")]
)
def test_a_run_stopped_anywhere_and_resumed_ends_as_if_it_had_not_been(arch: str, arm: str, tmp_path: Path) -> None:
    run, text = small(arch=arch, arm=arm), tiny()
    walker = TextTrainer(run, text)
    states = [snapshot(walker, tmp_path / "c")]
    while not walker.finished:
        walker.step()
        states.append(snapshot(walker, tmp_path / "c"))
    assert len(states) == 1 + 2 * walker.per_epoch
    for done in range(0, len(states) - 1, 5):
        torch.manual_seed(1000 + done)
        resumed = TextTrainer(run, text)
        checkpoint.save(tmp_path / "stopped", states[done])
        resumed.restore(checkpoint.load(tmp_path / "stopped"))
        end = snapshot(to_the_end(resumed), tmp_path / "c")
        for part, value in states[-1].items():
            assert part == "seconds" or same(end[part], value), f"{part} after a stop at update {done}"


def test_warming_up_is_resumed_too(tmp_path: Path) -> None:
    run = small(warmup=3)
    whole = to_the_end(TextTrainer(run, tiny()))
    half = TextTrainer(run, tiny())
    for _ in range(2):
        half.step()
    resumed = TextTrainer(run, tiny())
    resumed.restore(snapshot(half, tmp_path / "c"))
    assert same(to_the_end(resumed).metrics, whole.metrics)


class StopError(Exception):
    """What interrupts a run in these tests."""


def stop_at(update: int) -> Callable[[TextTrainer], None]:
    def interrupt(trainer: TextTrainer) -> None:
        if trainer.done == update:
            raise StopError

    return interrupt


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["a checkpoint each update", "at validations"])
def test_training_goes_on_in_its_folder(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    run, text = small(), tiny()
    through = train_text(run, text, tmp_path / "through")
    for stop in (4, 9):
        with pytest.raises(StopError):
            train_text(run, text, tmp_path / "stopped", stop_at(stop))
    seen: list[int] = []
    record = train_text(run, text, tmp_path / "stopped", lambda trainer: seen.append(trainer.done))
    assert seen[0] == (9 if seconds == 0 else 7), "it begins after its last checkpoint"
    assert same(record["metrics"], through["metrics"])
    ends = [checkpoint.load(tmp_path / which / "checkpoint.safetensors") for which in ("through", "stopped")]
    assert all(same(ends[0][k], ends[1][k]) for k in ends[0] if k != "seconds")
    names = {p.name for p in (tmp_path / "stopped").iterdir()}
    assert names == {"run.json", "metrics.jsonl", "checkpoint.safetensors"}
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["metrics"]
    assert TextRun.from_json(json.loads((tmp_path / "stopped" / "run.json").read_text())["run"]) == run


def test_another_run_or_text_is_refused_and_the_folder_stays(tmp_path: Path) -> None:
    train_text(small(epochs=1), tiny(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"epochs 1 there and 2 here \(the learning rate falls late, .*; give another folder"
    ):
        train_text(small(), tiny(), tmp_path)
    with pytest.raises(CheckpointError, match=r"text 'made by tests/helpers/texts\.py' there and 'another' here"):
        train_text(small(epochs=1), dataclasses.replace(tiny(), source="another"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
