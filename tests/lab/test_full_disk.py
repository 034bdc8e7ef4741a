"""A disk that is full, a folder that is read-only: one line that names the file, and the next command goes on."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from close import same
from rows_of import learned, mixed, state
from toy import small, toy

from streamnorm import files
from streamnorm.lab.cli import main
from streamnorm.lab.runs import keeping
from streamnorm.lab.runs.classifier.loop import train

TINY = ["--epochs", "2", "--width", "4", "--train-limit", "128", "--test-limit", "20"]


@contextmanager
def failing(at: int, code: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Inside, the file that is made lasting as number ``at`` is not, nor any later one; the names of all."""
    fsync, seen = os.fsync, list[str]()

    def full(entry: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{entry}"):  # noqa: PTH112
            seen.append(os.readlink(f"/proc/self/fd/{entry}"))  # noqa: PTH115
            if len(seen) > at:
                raise OSError(code, os.strerror(code))
        fsync(entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield seen


def names_a_file(said: str, folder: Path) -> bool:
    """Whether a line says which file of a folder cannot be written, and what to do."""
    path, found, rest = said.partition(" cannot be written: ")
    return bool(found) and str(folder) in path and "\n" not in said and "; " in rest


def until_it_ends(run: Callable[[], Any], folder: Path) -> tuple[Any, int]:
    """What a run ends as whose disk is full again and again; how often it was."""
    made = random.Random(1)
    for i in range(100):
        with failing(made.randrange(6)):
            try:
                return run(), i
            except OSError as error:
                refused = error
        assert names_a_file(str(refused), folder), refused
        assert refused.errno == errno.ENOSPC
        assert not [*folder.rglob("*.part")]
    raise AssertionError("it does not come to an end")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files")
def test_runs_go_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole = train(small(), toy(), tmp_path / "whole")["metrics"]
    metrics, stops = until_it_ends(lambda: train(small(), toy(), tmp_path / "run")["metrics"], tmp_path / "run")
    assert stops > 2
    assert same([{**line, "seconds": 0} for line in metrics], [{**line, "seconds": 0} for line in whole])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files")
def test_learning_goes_on_after_a_full_disk(tmp_path: Path) -> None:
    whole, _ = learned(mixed(200), tmp_path / "whole")

    def learn() -> Any:
        return learned(mixed(200), tmp_path / "run", checkpoint_every=20)[0]

    end, stops = until_it_ends(learn, tmp_path / "run")
    assert stops > 2
    assert same(state(end), state(whole))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files")
def test_commands_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["learn", "drift", "--limit", "20", "--checkpoint-every", "20"]
    named: list[str] = []
    for at in range(6):
        capsys.readouterr()
        with failing(at):
            status = main([*command, "--out", str(tmp_path / str(at))])
        if status == 0:
            break
        assert status == 2
        said = capsys.readouterr().err.strip().removeprefix("streamnorm: ")
        assert names_a_file(said, tmp_path / str(at)), said
        named.append(Path(said.split(" cannot be written")[0]).name)
        assert main([*command, "--out", str(tmp_path / str(at))]) == 0
    assert named == ["run.json", "checkpoint.safetensors", "results.json", "curves.png", "report.html"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room on the disk; the same command goes on then"),
        (errno.EDQUOT, "make room in your quota; the same command goes on then"),
        (errno.EROFS, "make it writable, or give another folder with --out"),
        (errno.EACCES, "make it writable, or give another folder with --out"),
    ],
)
def test_each_says_what_to_do(code: int, remedy: str, tmp_path: Path) -> None:
    with failing(0, code), pytest.raises(OSError, match=f"file cannot be written: {os.strerror(code)}; {remedy}"):
        files.write(tmp_path / "file", "x")


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_line_that_does_not_fit_leaves_none_of_it(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes the first bytes of it."""
    path = tmp_path / "lines"
    files.append(path, b"first")
    opened = Path.open

    def small_disk(self: Path, *args: Any, **options: Any) -> Any:
        file = opened(self, *args, **options)
        if "a" not in args[0]:
            return file

        class Small:
            left = at

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def write(self, data: memoryview) -> int:
                if not self.left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                taken = file.write(data[: self.left])
                self.left -= taken
                return taken

        return Small()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", small_disk)
        with pytest.raises(OSError, match=r"lines cannot be written: No space left on device; make room"):
            files.append(path, b"second")
    assert path.read_bytes() == b"first\n"
    path.write_bytes(b"first\nsec")
    files.append(path, b"second")
    assert path.read_bytes() == b"first\nsec\nsecond\n"


def test_lines_go_into_a_pipe_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    here = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.append(tmp_path / "pipe", b"first")
    files.append(Path("/dev/null"), b"first")
    assert os.read(here, 100) == b"first\n"
    os.close(here)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """A real one, of the system."""
    flags = ["train", "--out", str(tmp_path), *TINY]
    begin = [sys.executable, "-c", "import sys; from streamnorm.lab.cli import main; sys.exit(main())", *flags]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    if not hasattr(signal, "SIGXFSZ"):
        pytest.skip("this system has no such limit")
    done = subprocess.run(begin, preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path / 'checkpoint.safetensors'} cannot be written: File too large; raise the limit" in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert main(flags) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_is_read_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(["train", "--out", str(tmp_path), *TINY]) == 2
    assert names_a_file(capsys.readouterr().err.strip(), tmp_path)
