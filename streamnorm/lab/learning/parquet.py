"""The rows of a parquet file as JSON lines, so that they are learned, counted and gone on from like any others.

Needs pyarrow, which comes with the extra ``cli``; the rest is the standard library.
"""

from __future__ import annotations

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

SUFFIX = ".parquet"
ROWS = 1024
"""Rows that are unpacked at a time."""


class ParquetLines(io.RawIOBase):
    """A file of bytes to read: each row of a parquet file as a line of JSON, by the names of its columns.

    What JSON has no type for, such as dates, is a word.

    Args:
        path: the file.

    Raises:
        ImportError: without pyarrow.
        ValueError: if the file is damaged; also from ``read``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f"{path} is a parquet file and needs pyarrow; pip install 'streamnorm[cli]'") from error
        from pyarrow import ArrowException

        self._path, self._damaged = path, (ArrowException, OSError)
        try:
            self._batches = parquet.ParquetFile(path).iter_batches(ROWS)
        except self._damaged as error:
            raise self._error(error) from error
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            try:
                batch = next(self._batches, None)
            except self._damaged as error:
                raise self._error(error) from error
            if batch is None:
                return 0
            self._held = b"".join(json.dumps(row, default=_plain).encode() + b"\n" for row in batch.to_pylist())
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def _error(self, error: BaseException) -> ValueError:
        return ValueError(f"{self._path} is damaged, or no parquet file: {' '.join(str(error).split())}")


def _plain(value: Any) -> float | str:
    return float(value) if isinstance(value, Decimal) else str(value)
