"""Atomic file writes, and error messages for those that fail. The standard library alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ELSEWHERE = "make it writable, or give another folder with --out"
REMEDIES = {
    errno.ENOSPC: "make room on the disk; the same command goes on then",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f); the same command goes on then",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.EISDIR: "move that folder away, or give another one with --out",
    errno.ENOTDIR: "a file is in the place of its folder; give another one with --out",
}
if hasattr(errno, "EDQUOT"):  # not on every system
    REMEDIES[errno.EDQUOT] = "make room in your quota; the same command goes on then"


def write(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` atomically: a reader finds the old file or the new one, never a part.

    Raises:
        OSError: with the path and what to do, if writing fails; the old file is left.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with named(path):
        try:
            make(path.parent)
            with part.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def make(folder: Path) -> None:
    """Make a folder and those above it, each with its name on the disk: else a power failure may lose all in it.

    Raises:
        OSError: if it cannot be made.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        _sync(path.parent)


def append(path: Path, line: bytes) -> None:
    """Append a line, given without its newline, to a file. An unfinished last line, left by an interrupted write, is
    ended first.

    Raises:
        OSError: with the path and what to do, if writing fails; the file is restored as far as possible.
    """
    with named(path), path.open("ab+" if path.is_file() else "ab", buffering=0) as file:
        size, cut_off = 0, False
        if file.readable():  # not a device or pipe
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            cut_off = file.read(1) not in (b"", b"\n")
        data = memoryview(b"\n" * cut_off + line + b"\n")
        try:
            while data:  # on a nearly full disk only a part may be written
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def sweep(folder: Path) -> None:
    """Remove temporary files left in ``folder`` by a process killed inside ``write``; nothing else may write there."""
    for part in folder.glob(".*.part"):
        with named(part):
            part.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside, an OSError says that ``path`` cannot be written, why, and what to do.

    >>> with named(Path("runs/run.json")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: runs/run.json cannot be written: No space left on device; make room on the disk; the same command goes ...
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        said = type(error)(f"{path} cannot be written: {error.strerror or error}" + (f"; {remedy}" if remedy else ""))
        said.errno = error.errno
        raise said from error


def _sync(folder: Path) -> None:
    """Sync the names in ``folder`` to disk if the system can: a rename alone may be lost in a power failure."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
