"""A folder that one process at a time may write to. The standard library alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nothing is held
    fcntl = None

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process holds ``folder``, which is made. The system lets go of it when the process ends, however
    it does.

    Raises:
        ValueError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip()
                who = f"process {owner}" if owner else "another process"
                raise ValueError(
                    f"{folder} is in use: {who} is learning there; wait until it ends, or give another one with --out"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
