"""Checkpoints: a state comes back as it was, every damage is noticed, and files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from close import same

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.checkpoint import CheckpointError

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


def test_of_new_folders_each_name_is_on_the_disk_before_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure a file is not found in a folder whose own name was lost."""
    synced: list[str] = []
    fsync = os.fsync

    def watch(entry: int) -> None:
        if stat.S_ISDIR(os.fstat(entry).st_mode):
            status = os.fstat(entry)
            synced.extend(str(p) for p in (tmp_path, *tmp_path.rglob("*")) if os.path.samestat(status, p.stat()))
        fsync(entry)

    monkeypatch.setattr(os, "fsync", watch)
    checkpoint.write(tmp_path / "a" / "b" / "file", "new")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


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
