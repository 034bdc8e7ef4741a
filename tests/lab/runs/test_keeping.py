"""A run in its folder resumes bit for bit wherever it was stopped or killed, and no other run goes on there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from close import same
from toy import small, to_the_end, toy

from streamnorm.lab.runs import checkpoint, keeping, underway
from streamnorm.lab.runs.checkpoint import CheckpointError
from streamnorm.lab.runs.classifier.loop import Trainer, train
from streamnorm.lab.runs.classifier.run import Run

NAMES = {"run.json", "metrics.jsonl", "checkpoint.safetensors"}


def snapshot(trainer: Trainer, path: Path) -> dict[str, Any]:
    """The state as a file keeps it: a copy that goes on no more."""
    checkpoint.save(path, trainer.state())
    return checkpoint.load(path)


# --- Resuming


ARMS = [
    ("A", "streaming", 1, 12),
    ("A", "batch", 3, 4),
    ("A", "layer", 3, 4),
    ("A", "BA6-S", 1, 12),
    ("B", "BA6-S", 3, 4),  # its memories get their shapes at first use
]


@pytest.mark.parametrize(("architecture", "arm", "m", "n"), ARMS)
def test_a_run_stopped_at_any_update_and_resumed_ends_as_if_it_had_not_been(
    architecture: str, arm: str, m: int, n: int, tmp_path: Path
) -> None:
    data = toy(52 if architecture == "A" else 28)
    run = small(architecture=architecture, arm=arm, samples_per_batch=m, batches_per_update=n, weight_decay=1e-3)
    walker = Trainer(run, data)
    states = [snapshot(walker, tmp_path / "c")]
    while not walker.finished:
        walker.step()
        states.append(snapshot(walker, tmp_path / "c"))
    assert len(states) == 1 + 2 * walker.per_epoch
    for done, state in enumerate(states[:-1]):
        assert state["done"] == done
        torch.manual_seed(1000 + done)
        resumed = Trainer(run, data)
        checkpoint.save(tmp_path / "stopped", state)
        resumed.restore(checkpoint.load(tmp_path / "stopped"))
        to_the_end(resumed)
        end = snapshot(resumed, tmp_path / "c")
        for part, value in states[-1].items():
            assert same(end[part], value), f"{part} after a stop at update {done}"


def test_the_random_state_goes_on_too(tmp_path: Path) -> None:
    trainer = Trainer(small(), toy())
    torch.manual_seed(123)
    checkpoint.save(tmp_path / "c", trainer.state())
    want = torch.rand(3)
    torch.manual_seed(0)
    Trainer(small(), toy()).restore(checkpoint.load(tmp_path / "c"))
    assert torch.equal(torch.rand(3), want)


class StopError(Exception):
    """What interrupts a run in these tests."""


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["a checkpoint each update", "at the ends of epochs"])
@pytest.mark.parametrize("stops", [(1,), (3,), (4,), (5, 7), (2, 3, 6, 8)], ids=str)
def test_training_goes_on_in_its_folder(
    stops: tuple[int, ...], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    run, data = small(), toy()
    through = train(run, data, tmp_path / "through")
    for stop in stops:

        def interrupt(done: int, of: int, stop: int = stop) -> None:
            if done == stop:
                raise StopError

        with pytest.raises(StopError):
            train(run, data, tmp_path / "stopped", interrupt)
    seen: list[int] = []
    record = train(run, data, tmp_path / "stopped", lambda done, of: seen.append(done))
    last = stops[-1] - 1 if seconds == 0 else (stops[-1] - 1) // 4 * 4
    assert seen == list(range(last + 1, 9)), "it begins after its last checkpoint, not at the start"
    assert same(record["metrics"], through["metrics"])
    ends = [checkpoint.load(tmp_path / which / "checkpoint.safetensors") for which in ("through", "stopped")]
    assert same(ends[1], ends[0])


def test_epochs_are_told_as_they_close_and_those_before_a_checkpoint_first(tmp_path: Path) -> None:
    told: list[Any] = []

    def progress(done: int, of: int) -> None:
        told.append(done)
        if done == 6 and told[0] == "begin":
            raise StopError

    def begin(finished: bool) -> None:
        assert not tmp_path.joinpath("run.json").exists() or told == ["again"], "before anything is written"
        assert not finished
        told.append("begin")

    def tell(line: dict[str, Any]) -> None:
        told.append(f"epoch {line['epoch']}")

    with pytest.raises(StopError):
        train(small(), toy(), tmp_path, progress, None, begin, tell)
    assert told == ["begin", 1, 2, 3, 4, "epoch 1", 5, 6]
    told[:] = ["again"]
    record = train(small(), toy(), tmp_path, progress, None, begin, tell)
    assert told == ["again", "begin", "epoch 1", 5, 6, 7, 8, "epoch 2"]
    assert same(record["metrics"], train(small(), toy())["metrics"])
    train(small(), toy(), tmp_path, begin=lambda finished: told.append(finished))
    assert told[-1] is True, "nothing is left to do"


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for folder in (path, path / "run" / "seed0"):
        with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file, and the run needs a folder; .* --out"):
            train(small(), toy(), folder, begin=lambda: pytest.fail("it was refused"))
    assert path.read_text() == "mine"


def test_a_finished_folder_is_read_and_trained_no_more(tmp_path: Path) -> None:
    run, data = small(), toy()
    first = train(run, data, tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    calls: list[int] = []
    again = train(run, data, tmp_path, lambda done, of: calls.append(done))
    assert calls == []
    assert again["metrics"] == first["metrics"]
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("changes", [{"arm": "batch", "samples_per_batch": 1}, {"arm": "none", "learning_rate": 1e20}])
def test_a_failed_run_stays_failed_and_says_why_again(changes: dict[str, Any], tmp_path: Path) -> None:
    first = train(small(**changes), toy(), tmp_path)
    assert first["failed"]
    calls: list[int] = []
    again = train(small(**changes), toy(), tmp_path, lambda done, of: calls.append(done))
    assert calls == []
    assert again["failed"] == first["failed"]
    assert again["metrics"] == first["metrics"]


def test_a_folder_holds_the_run_its_metrics_and_its_checkpoint(tmp_path: Path) -> None:
    run = small(seed=5)
    record = train(run, toy(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == NAMES
    described = json.loads((tmp_path / "run.json").read_text())
    assert Run.from_json(described["run"]) == run
    assert described["versions"]["torch"] == torch.__version__
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == record["metrics"]


def test_metrics_that_a_kill_left_behind_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    record = train(small(), toy(), tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    train(small(), toy(), tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == record["metrics"]


# --- Another run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_checkpoint_of_another_run_is_refused_with_every_difference_and_changes_nothing(tmp_path: Path) -> None:
    train(small(), toy(), tmp_path)
    state = checkpoint.load(tmp_path / "checkpoint.safetensors")
    other = Trainer(small(arm="layer", seed=3, alpha=(0.5, 0.5)), toy())
    other.step()
    before, random_state = snapshot(other, tmp_path / "other"), torch.get_rng_state()
    with pytest.raises(CheckpointError, match="of another run") as refusal:
        other.restore(state)
    message = str(refusal.value)
    for difference in (
        "arm 'streaming' there and 'layer' here",
        "seed 0 there and 3 here",
        "alpha [0.7, 0.3] there and [0.5, 0.5] here",
    ):
        assert difference in message
    assert "width" not in message
    assert same(snapshot(other, tmp_path / "other"), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_checkpoint_of_another_kind_of_trainer_is_refused_before_any_change() -> None:
    class Tracing(Trainer):
        KEPT = (*Trainer.KEPT, "trace")
        trace: tuple[int, ...] = ()

    plain, tracing = Trainer(small(), toy()), Tracing(small(), toy())
    plain.step()
    before = {name: value.clone() for name, value in tracing.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="of another kind of run: it lacks trace"):
        tracing.restore(plain.state())
    assert same(dict(tracing.model.state_dict()), before)
    assert tracing.done == 0


def test_a_field_that_only_the_checkpoint_has_is_a_difference(tmp_path: Path) -> None:
    trainer = Trainer(small(), toy())
    state = snapshot(trainer, tmp_path / "c")
    state["run"]["dropout"] = 0.5
    with pytest.raises(CheckpointError, match=r"dropout 0\.5 there and None here"):
        trainer.restore(state)


def test_training_in_the_folder_of_another_run_is_refused_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    train(small(), toy(), tmp_path)
    before = contents(tmp_path)
    said = r"epochs 2 there and 3 here \(the learning rate falls late, .*\); give another folder with --out"
    with pytest.raises(CheckpointError, match=said):
        train(small(epochs=3), toy(), tmp_path)
    assert contents(tmp_path) == before


def test_training_from_a_damaged_checkpoint_is_refused_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    train(small(), toy(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # a byte of a tensor, which safetensors itself does not notice
    path.write_bytes(damaged)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        train(small(), toy(), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"width": 16}, {"width": 8}, r"of another shape: 1.weight \(16, 16\) there and \(8, 16\) here"),
        (
            {"arm": "layer"},
            {"arm": "streaming"},
            r"missing there: 2.H1.counter_count_updates_seen_skipped, 2.H1.running_.* \.\.\.",
        ),
        ({"arm": "streaming"}, {"arm": "layer"}, r"unknown here: 2.H1.counter_count"),
        ({"architecture": "B"}, {"architecture": "A"}, r"missing there: 1.weight.*unknown here: 0.0.weight"),
        # the same names and the same weights: only the memories differ
        (
            {"arm": "BA2-S"},
            {"arm": "streaming"},
            r"of another shape: 2.H1.running_long_short_estimate \(3, 2, 1\) there and \(3, 2, 8\) here",
        ),
        (
            {"arm": "BA6-S"},
            {"arm": "BA2-S"},
            r"of another shape: 2.H1.running_long_short_estimate \(3, 2, 8\) there and \(3, 2, 1\) here",
        ),
    ],
)
def test_the_weights_of_another_architecture_are_refused_by_name_and_change_nothing(
    there: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    other, mine = Trainer(small(**there), toy()), Trainer(small(**here), toy())
    other.step()
    mine.step()
    before = {k: v.clone() for k, v in mine.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"of another architecture; {message}"):
        underway.load_model(mine.model, dict(other.model.state_dict()))
    assert same(dict(mine.model.state_dict()), before)


def test_weights_of_the_same_architecture_are_loaded_where_memories_have_no_shape_yet() -> None:
    other, mine = Trainer(small(arm="BA6-S"), toy()), Trainer(small(arm="BA6-S", seed=1), toy())
    other.step()
    underway.load_model(mine.model, dict(other.model.state_dict()))
    assert same(dict(mine.model.state_dict()), dict(other.model.state_dict()))


# --- A process that is really killed

HELPERS = Path(__file__).resolve().parents[2] / "helpers"
VICTIM = f"""
import sys, torch
sys.path.insert(0, {str(HELPERS)!r})
torch.set_num_threads(1)
from pathlib import Path
from toy import small, toy
from streamnorm.lab.runs import keeping
from streamnorm.lab.runs.classifier import loop
keeping.SECONDS_BETWEEN_CHECKPOINTS = 0.0
loop.train(small(epochs=20), toy(240), Path(sys.argv[1]))
"""
KILLS = 3


def kill_while_training(folder: Path, delay: float) -> bool:
    """Train in another process, and kill it ``delay`` seconds after it wrote something; whether it was still alive."""
    path = folder / "checkpoint.safetensors"
    before = path.stat().st_mtime_ns if path.is_file() else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen([sys.executable, "-c", VICTIM, str(folder)], env=environment) as process:
        limit = time.monotonic() + 60
        while process.poll() is None and not (path.is_file() and path.stat().st_mtime_ns > before):
            assert time.monotonic() < limit, "the process wrote no checkpoint"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_whole_files_and_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run, data, folder = small(epochs=20), toy(240), tmp_path / "killed"
    seed = random.SystemRandom().randrange(10**6)
    delays = random.Random(seed)
    done, killed = 0, 0
    for _ in range(KILLS):
        killed += kill_while_training(folder, delays.uniform(0.0, 0.1))
        where = f"delays from random.Random({seed})"
        state = checkpoint.load(folder / "checkpoint.safetensors")
        assert state["done"] > done, f"it went on from where it was; {where}"
        done = state["done"]
        assert json.loads((folder / "run.json").read_text())["run"] == run.to_json(), where
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["epoch"] >= 1, where
        assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == NAMES, where
    assert killed, "no process was killed before its end: more epochs are needed"
    record = train(run, data, folder)
    through = train(run, data, tmp_path / "through")
    assert same(record["metrics"], through["metrics"]), where
    ends = [checkpoint.load(tmp_path / which / "checkpoint.safetensors") for which in ("through", "killed")]
    assert same(ends[1], ends[0]), where
    assert {p.name for p in folder.iterdir()} == NAMES, where
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20, where
