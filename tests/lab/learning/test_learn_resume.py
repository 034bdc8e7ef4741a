"""What is killed while it learns from a stream goes on at the very next row, and nothing else goes on there."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from close import same
from rows_of import job, learned, mixed, state

from streamnorm.lab.learning.lines import Lines
from streamnorm.lab.learning.session import Session, session
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.checkpoint import CheckpointError

TEXT = mixed(600)
ARMS = ("none", "layer", "streaming")


class StopError(Exception):
    """What a killed process comes to, here."""


def killed(folder: Path, at: int, **other: Any) -> None:
    """Learn until so many rows are learned, then end without a word."""

    def end() -> None:
        if made.learner.rows >= at:
            raise StopError

    with pytest.raises(StopError), session(job(**other), folder, io.BytesIO(TEXT.encode()), lambda _: None) as made:
        made.run(end)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}, {"scale": True}], ids=str)
def test_it_ends_as_if_it_had_not_been_killed(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"arms": ("layer",) if "optimizer" in settings else ARMS, "checkpoint_every": 70, **settings}
    whole, _ = learned(TEXT, tmp_path / "whole", **settings)
    made = random.Random(0)
    for name, stops in (("a", [made.randrange(600)]), ("b", sorted(made.sample(range(600), 3)))):
        for stop in stops:
            killed(tmp_path / name, stop, **settings)
        end, _ = learned(TEXT, tmp_path / name, **settings)
        assert end.resumed % 70 == 0 < end.resumed
        assert same(state(end), state(whole))


def test_it_goes_on_at_every_row(tmp_path: Path) -> None:
    """A limit ends at any row, and the same command without it goes on behind it."""
    whole, _ = learned(TEXT, tmp_path / "whole")
    for limit in (1, 2, 3, 299, 300, 301, 302, 599, 600):
        folder = tmp_path / str(limit)
        part, _ = learned(TEXT, folder, limit=limit)
        assert part.learner.rows == limit
        end, _ = learned(TEXT, folder)
        assert end.resumed == limit
        assert same(state(end), state(whole))


def test_a_regression_goes_on_too(tmp_path: Path) -> None:
    made = random.Random(0)
    text = "x,y\n" + "".join(f"{made.gauss(0, 1)},{made.gauss(50, 9)}\n" for _ in range(120))
    whole, _ = learned(text, tmp_path / "whole")
    learned(text, tmp_path / "part", limit=77)
    assert same(state(learned(text, tmp_path / "part")[0]), state(whole))


def test_rows_that_were_skipped_are_not_counted_twice(tmp_path: Path) -> None:
    text = TEXT.replace("\n", "\nx\n")
    whole, _ = learned(text, tmp_path / "whole")
    learned(text, tmp_path / "part", limit=100)
    end, _ = learned(text, tmp_path / "part")
    assert end.skipped == whole.skipped
    assert end.skipped.count == 601


def test_a_file_may_grow_and_may_not_change(tmp_path: Path) -> None:
    longer, _ = learned(TEXT, tmp_path / "longer")
    learned("".join(TEXT.splitlines(keepends=True)[:301]), tmp_path / "run")
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    for text, message in [
        (TEXT.replace("red", "rad", 1), "has changed: 301 lines of it"),
        (TEXT[:1000], "it has only 1,000"),
        (TEXT.replace("color", "colour", 1), "its columns were"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            learned(text, tmp_path / "run")
        assert "give another folder with --out" in str(caught.value)
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    end, _ = learned(TEXT, tmp_path / "run")
    assert same(state(end), state(longer))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    learned(TEXT, tmp_path, limit=10)
    for other in ({"arms": ("layer",)}, {"seed": 1}, {"width": 9}, {"scale": True}, {"ignore": ("a",)}):
        with pytest.raises(CheckpointError, match=r"other learning: .* there and .* here; give another"):
            learned(TEXT, tmp_path, **other)


def test_all_that_comes_is_new_where_that_was_said(tmp_path: Path) -> None:
    head, *lines = TEXT.splitlines(keepends=True)
    whole, _ = learned(TEXT, tmp_path / "whole")
    learned(head + "".join(lines[:200]), tmp_path / "run")
    end, _ = learned(head + "".join(lines[200:]), tmp_path / "run", fresh=True)
    assert same(state(end), state(whole))


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    learned(TEXT, tmp_path, limit=10)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is damaged .*; delete it to start over; give another folder"):
        learned(TEXT, tmp_path)


def test_killed_while_it_writes_a_checkpoint_it_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = learned(TEXT, tmp_path / "whole", checkpoint_every=100)
    learned(TEXT, tmp_path / "run", checkpoint_every=100, limit=100)
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target.name == "checkpoint.safetensors":
            raise StopError
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(StopError):
            learned(TEXT, tmp_path / "run", checkpoint_every=100)
    (tmp_path / "run/.checkpoint.safetensors.1.part").write_bytes(b"half")
    end, _ = learned(TEXT, tmp_path / "run", checkpoint_every=100)
    assert end.resumed == 100
    assert same(state(end), state(whole))
    assert not [*(tmp_path / "run").glob(".*.part")]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with session(job(), tmp_path, io.BytesIO(TEXT.encode()), lambda _: None) as made:
        made.run(lambda: None)
        said = f"is in use by process {os.getpid()}: learning from rows; wait until it ends, or give another folder"
        with pytest.raises(ValueError, match=said):
            learned(TEXT, tmp_path)
    assert learned(TEXT, tmp_path)[0].resumed == 600


BEGIN = [sys.executable, "-c", "import sys; from streamnorm.lab.cli import main; sys.exit(main())", "learn"]


def reached(folder: Path, process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 60
    while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)


def test_a_process_is_killed_at_any_moment(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    file.write_text(mixed(8_000))
    flags = [str(file), "--target", "y", "--width", "8", "--checkpoint-every", "50", "--words", "16"]
    work = job(name=str(file))
    made = random.Random(4)
    for _ in range(2):
        process = subprocess.Popen([*BEGIN, *flags, "--out", str(tmp_path / "run")], stdout=subprocess.DEVNULL)
        reached(tmp_path / "run", process)
        time.sleep(made.random())
        process.kill()
        process.wait()
    at = checkpoint.load(tmp_path / "run/checkpoint.safetensors")["learner"]["rows"]
    assert 0 < at <= 8_000
    assert at % 50 == 0
    end, _ = learned(file.read_bytes(), tmp_path / "run", work)
    whole, _ = learned(file.read_bytes(), tmp_path / "whole", work)
    assert same(state(end), state(whole))


def test_ctrl_c_loses_no_row_that_came_through_a_pipe(tmp_path: Path) -> None:
    flags = ["-", "--target", "y", "--task", "classification", "--width", "8", "--words", "16"]
    flags += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*BEGIN, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    head, *lines = TEXT.splitlines(keepends=True)
    process.stdin.write(head + "".join(lines[:300]))
    process.stdin.flush()
    until = time.monotonic() + 60
    while not (tmp_path / "run/run.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped at row 300, all of them kept; the same command goes on at the next row" in said
    assert "300 rows" in output
    assert (tmp_path / "run/report.html").exists()
    work = job(name="-", task="classification")
    end, _ = learned(TEXT, tmp_path / "run", work)
    assert end.resumed == 300
    assert same(state(end), state(learned(TEXT, tmp_path / "whole", work)[0]))


def test_a_row_is_learned_as_soon_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that has three rows and stays open: they are a chunk."""
    here, there = os.pipe()
    os.write(there, "".join(TEXT.splitlines(keepends=True)[:4]).encode())
    chunks: list[int] = []
    take = Session._chunk

    def watched(self: Session, most: int) -> Any:
        rows = take(self, most)
        chunks.append(len(rows))
        os.close(there)
        monkeypatch.setattr(Session, "_chunk", take)
        return rows

    monkeypatch.setattr(Session, "_chunk", watched)
    with os.fdopen(here, "rb") as file, session(job(task="classification"), tmp_path, file, lambda _: None) as made:
        made.run(lambda: None)
    assert chunks == [3]
    assert made.learner.rows == 3
    assert not Lines(io.BytesIO(b""), "nothing").would_wait
