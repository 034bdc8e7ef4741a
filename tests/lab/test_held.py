"""A folder is held by one command at a time, and holds one thing: nothing of it is replaced by another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy import small, toy

from streamnorm.lab.cli import main
from streamnorm.lab.runs import lock
from streamnorm.lab.runs.classifier.loop import train
from streamnorm.lab.runs.lock import describe, expect_own, held

BEGIN = [sys.executable, "-c", "import sys; from streamnorm.lab.cli import main; sys.exit(main())"]
TINY = ["--epochs", "1", "--width", "4", "--train-limit", "128", "--test-limit", "20"]
COMPARE = ["compare", "--arms", "layer", "--seeds", "0", *TINY]


def test_a_folder_is_held_once_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with held(folder, "the first"):
        for _ in range(2):
            said = rf"{folder} is in use by process {os.getpid()}: the first; wait until it ends, or give .* --out"
            with pytest.raises(ValueError, match=said), held(folder, "the second"):
                pytest.fail("two of them")
    assert not folder.exists(), "it was made, and nothing came into it"
    with held(folder, "again"):
        (folder / "file").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_lock_that_was_let_go_while_another_waited_for_the_file_is_not_held_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened, its holder ends and takes it away, a third one makes another: only that one counts."""
    flock = lock.fcntl.flock  # type: ignore[union-attr]
    others: list[Path] = []

    def late(file: object, how: int) -> None:
        flock(file, how)
        if not others:
            others.append((tmp_path / lock.LOCK).rename(tmp_path / "gone"))

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with held(tmp_path, "this"):
        assert (tmp_path / lock.LOCK).read_text() == f"process {os.getpid()}: this"


def test_a_file_system_without_locks_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\): start one command at a time"):
        train(small(), toy(), tmp_path)


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from streamnorm.lab.runs.lock import held\n"
    code += "with held(Path(sys.argv[1]), 'sleep'): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is in use by process {process.pid}: sleep"), held(tmp_path, "this"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with held(tmp_path, "this"):
        pass


COMMANDS = {
    "train": ["train", *TINY],
    "compare": COMPARE,
    "language": ["train", "--arch", "rnn", "--limit", "3000", "--steps", "20"],
    "autoencoder": ["train", "--arch", "autoencoder", "--hidden", "4"],
    "learn": ["learn", "drift", "--limit", "10"],
    "reproduce": ["reproduce", "online", "--tier", "smoke"],
    "bench": ["bench", "--quick", "--groups", "single"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path, "something"):
        assert main([*COMMANDS[command], "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert said.count("\n") == 1
    assert f"{tmp_path} is in use by process {os.getpid()}: something; wait until it ends" in said


def test_recalibration_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "--out", str(run), *TINY]) == 0
    command = ["recalibrate", str(run), "--out", str(out), "--limit", "40"]
    with held(out, "something"):
        assert main(command) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert main(command) == 0
    other = tmp_path / "other"
    assert main(["train", "--out", str(other), "--seed", "1", *TINY]) == 0
    before = (out / "checkpoint.safetensors").read_bytes()
    for taker in (["recalibrate", str(other), "--out", str(out)], ["train", "--out", str(out), *TINY]):
        capsys.readouterr()
        assert main(taker) == 2
        assert f"{out} holds a" in capsys.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_what_a_folder_holds_is_not_replaced_by_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMPARE, "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in ("train", "learn", "reproduce", "autoencoder"):
        capsys.readouterr()
        assert main([*COMMANDS[command], "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path} holds a comparison, which would be lost; give another folder with --out" in said
        assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_study_and_a_folder_from_before_there_was_a_word_for_it(tmp_path: Path) -> None:
    describe(tmp_path, "the study online, tier smoke", {})
    with pytest.raises(ValueError, match="holds the study online, tier smoke, which would be lost"):
        expect_own(tmp_path, "the study online, tier full")
    (tmp_path / "run.json").write_text('{"run": {}}')
    expect_own(tmp_path, "anything")


def test_two_runs_started_together(tmp_path: Path) -> None:
    """Of two that differ one trains to its end and the other is refused."""
    rates = ("0.1", "0.2")
    command = [*BEGIN, "train", "--out", str(tmp_path), *TINY, "--epochs", "60", "--learning-rate"]
    both = [
        subprocess.Popen([*command, rate], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rate in rates
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    winner = next(i for i, process in enumerate(both) if not process.returncode)
    refusal = said[1 - winner]
    assert refusal.count("\n") == 1
    assert str(tmp_path) in refusal
    assert "is in use by process" in refusal or "the checkpoint is of another run: learning_rate" in refusal
    assert f'"learning_rate": {rates[winner]}' in (tmp_path / "run.json").read_text()
