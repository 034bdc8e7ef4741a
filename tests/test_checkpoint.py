"""Checkpoints: whole or not at all, every damage noticed, and a run resumes bit for bit wherever it was stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import small, toy

from streamnorm.training import checkpoint, keeping, loop
from streamnorm.training.checkpoint import CheckpointError
from streamnorm.training.loop import Trainer, train
from streamnorm.training.run import Run

TESTS = Path(__file__).resolve().parent
NAMES = {"run.json", "metrics.jsonl", "checkpoint.safetensors"}


def same(a: Any, b: Any) -> bool:
    """Whether two nests are equal to the bit: in structure, types, dtypes, shapes and values; "seconds" may differ."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(k == "seconds" or same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def snapshot(trainer: Trainer, path: Path) -> dict[str, Any]:
    """The state as a file keeps it: a copy that goes on no more."""
    checkpoint.save(path, trainer.state())
    return checkpoint.load(path)


def to_the_end(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


NEST = {
    "weights": {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int64), "none yet": torch.zeros(2, 0)},
    "scalars": [torch.tensor(3), torch.tensor(True), torch.tensor(0.5, dtype=torch.float64)],
    "narrow": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "plain": {"done": 7, "lr": 0.1 + 0.2, "failed": None, "nesterov": False, "text": 'é "quoted" / \n', "empty": []},
    "by number": {0: {"momentum": torch.ones(2)}, 1: {}},
    "lines": [{"epoch": 1, "loss": 1e-300}, {"epoch": 2, "loss": float("inf")}],
}


# --- A file


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", NEST)
    assert same(checkpoint.load(tmp_path / "c"), NEST)


def test_a_state_of_views_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    state = {"transposed": base.t(), "row": base[1], "again": base, "wide": torch.ones(1).expand(5)}
    checkpoint.save(tmp_path / "c", state)
    loaded = checkpoint.load(tmp_path / "c")
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert not any(v.requires_grad for v in loaded.values())


def test_two_tensors_of_one_name_are_refused_instead_of_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors of this state are called '/a/b'"):
        checkpoint.save(tmp_path / "c", {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "c")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, NEST)
    with path.open("ab") as file:
        file.write(b"\0")
    for length in (path.stat().st_size, *reversed(range(path.stat().st_size - 1))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_noticed(bit: int, tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, NEST)
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
            with pytest.raises(CheckpointError, match=r"damaged|no checkpoint of this version"):
                checkpoint.load(path)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert same(checkpoint.load(path), NEST)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"dtype":"F64"', b'"dtype":"I64"'), (b'"shape":[3,2]', b'"shape":[2,3]'), (b'"/weights/a"', b'"/weights/c"')],
    ids=["dtype", "shape", "name"],
)
def test_a_header_that_tells_something_else_of_a_tensor_is_noticed(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, NEST)
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def foreign_tensors() -> bytes:
    from safetensors.torch import save

    return save({"weight": torch.ones(3)}, {"format": "pt"})


def no_header() -> bytes:
    from safetensors.torch import save

    return save({"weight": torch.ones(3)})


def of_another_version() -> bytes:
    from safetensors.torch import save

    return save({}, {"format": "streamnorm checkpoint 0", "state": '{"dict": []}'})


def without_its_digest() -> bytes:
    from safetensors.torch import save

    return save({}, {"format": checkpoint.FORMAT, "state": '{"dict": []}'})


def pickled() -> bytes:
    import pickle

    return pickle.dumps({"weight": [1.0]})


FOREIGN = {
    "empty": bytes,
    "short": lambda: b"hello",
    "zeros": lambda: bytes(5000),
    "ones": lambda: b"\xff" * 5000,
    "pickle": pickled,
    "safetensors": foreign_tensors,
    "safetensors without metadata": no_header,
    "another version": of_another_version,
    "no digest": without_its_digest,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_checkpoint_of_ours_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(content())
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(path)
    assert str(path) in str(refusal.value)


# --- Writing


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in ("first, and longer", "second"):
        checkpoint.write(path, content)
        assert path.read_text() == content
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    checkpoint.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, "old")

    def full(*_: Any) -> None:
        half = [p.name for p in tmp_path.iterdir() if p != path]
        assert len(half) == 1, "the failure comes after something was written"
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, "old")
    synced: list[tuple[str, str]] = []
    fsync = os.fsync

    def watch(entry: int) -> None:
        status = os.fstat(entry)
        if stat.S_ISDIR(status.st_mode):
            assert os.path.samestat(status, tmp_path.stat())
        synced.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", path.read_text()))
        fsync(entry)

    monkeypatch.setattr(os, "fsync", watch)
    checkpoint.write(path, "new")
    assert synced == [("file", "old"), ("folder", "new")]


def test_a_folder_that_cannot_be_synced_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuses_folders(entry: int) -> None:
        if stat.S_ISDIR(os.fstat(entry).st_mode):
            raise OSError("invalid argument")
        fsync(entry)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    checkpoint.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_state_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, NEST)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(path, {"weights": torch.ones(3), "set": {1, 2}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sweeping_removes_the_parts_of_killed_writers_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint.write(tmp_path / "file", "whole")
    (tmp_path / ".hidden").write_text("somebody's")

    def die(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "fsync", die)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
    with pytest.raises(SystemExit):
        checkpoint.write(tmp_path / "file", "part")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    checkpoint.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".hidden"}
    assert (tmp_path / "file").read_text() == "whole"


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


def test_a_field_that_only_the_checkpoint_has_is_a_difference(tmp_path: Path) -> None:
    trainer = Trainer(small(), toy())
    state = snapshot(trainer, tmp_path / "c")
    state["run"]["dropout"] = 0.5
    with pytest.raises(CheckpointError, match=r"dropout 0\.5 there and None here"):
        trainer.restore(state)


def test_training_in_the_folder_of_another_run_is_refused_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    train(small(), toy(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="epochs 2 there and 3 here"):
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
        ({"arm": "layer"}, {"arm": "streaming"}, r"missing there: 2.H1.count, 2.H1.estimate, .* \.\.\."),
        ({"arm": "streaming"}, {"arm": "layer"}, r"unknown here: 2.H1.count"),
        ({"architecture": "B"}, {"architecture": "A"}, r"missing there: 1.weight.*unknown here: 0.0.weight"),
        # the same names and the same weights: only the memories differ
        ({"arm": "BA2-S"}, {"arm": "streaming"}, r"of another shape: 2.H1.long \(2, 1\) there and \(2, 8\) here"),
        ({"arm": "BA6-S"}, {"arm": "BA2-S"}, r"of another shape: 2.H1.long \(2, 8\) there and \(2, 1\) here"),
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
        loop.load_model(mine.model, dict(other.model.state_dict()))
    assert same(dict(mine.model.state_dict()), before)


def test_weights_of_the_same_architecture_are_loaded_where_memories_have_no_shape_yet() -> None:
    other, mine = Trainer(small(arm="BA6-S"), toy()), Trainer(small(arm="BA6-S", seed=1), toy())
    other.step()
    loop.load_model(mine.model, dict(other.model.state_dict()))
    assert same(dict(mine.model.state_dict()), dict(other.model.state_dict()))


# --- A process that is really killed


VICTIM = f"""
import sys, torch
sys.path.insert(0, {str(TESTS)!r})
torch.set_num_threads(1)
from pathlib import Path
from toy import small, toy
from streamnorm.training import keeping, loop
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
