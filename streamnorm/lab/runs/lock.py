"""A folder that one command at a time writes to, and that holds one thing. Imports how files are written and read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from streamnorm import files
from streamnorm.reading import read_json

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nothing is held
    fcntl = None

LOCK = ".lock"
DESCRIBED = "run.json"
"""Says what a folder holds, under ``holds``."""
RUN = "a run"


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Inside, no other process holds ``folder``, which is made. The system lets go of it when the process ends, however
    it does; then a file is left that holds nothing.

    Args:
        what: is done there, for the words of who is refused.

    Raises:
        NotADirectoryError: if a file is in its place.
        ValueError: if it is held already, with by whom and for what.
    """
    expect_folder(folder)
    made = not folder.exists()
    path = folder / LOCK
    with files.named(path):
        files.make(folder)
    try:
        if fcntl is None:
            yield
            return
        with _locked(path, folder) as file:
            with files.named(path):
                file.truncate(0)
                file.write(f"process {os.getpid()}: {what}")
                file.flush()
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()  # while it is held: who opened it before finds another file there, and begins anew
    finally:
        if made:
            with suppress(OSError):  # with anything in it, it stays
                folder.rmdir()


def _locked(path: Path, folder: Path) -> TextIO:
    """The file at ``path``, locked."""
    assert fcntl is not None
    while True:
        with files.named(path):
            file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder} is in use by {who}; wait until it ends, or give another folder with --out"
            ) from error
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): start one command at a time there", stacklevel=4
            )
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def expect_folder(folder: Path) -> None:
    """Refuse a path where no folder can be made.

    Raises:
        NotADirectoryError: with the file that is in its way.
    """
    for path in (folder, *folder.parents):
        if path.is_file():
            raise NotADirectoryError(f"{path} is a file, and the run needs a folder; give another one with --out")


def expect_own(folder: Path, what: str) -> None:
    """Refuse a folder that holds something else, which would be lost. The folder has to be held.

    Raises:
        ValueError: with what it holds.
    """
    path = folder / DESCRIBED
    if not path.exists():
        return
    there = read_json(path, {}, "delete it, or give another folder with --out").get("holds", what)
    if there != what:
        said = "another run" if there == RUN else there
        raise ValueError(f"{folder} holds {said}, which would be lost; give another folder with --out")


def describe(folder: Path, what: str, described: dict[str, Any]) -> None:
    """Write down what a folder holds, for people and for ``expect_own``."""
    files.write(folder / DESCRIBED, json.dumps({"holds": what, **described}, indent=1))
