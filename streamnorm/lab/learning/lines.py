"""Lines of a file, a pipe or standard input, plain or gzip, and how far they were taken. The standard library alone.

A ``Mark`` is a place between two lines: a stream that begins with the same bytes can be taken up there again.
"""

from __future__ import annotations

import os
import select
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 1 << 16
"""Bytes that are read, and unpacked, at a time."""
LONGEST = 1 << 20
"""Bytes that a line may have."""
SECONDS_BETWEEN_LOOKS = 0.1
"""While nothing comes, ``stop`` is asked so often."""


class LineError(ValueError):
    """A line that cannot be used; the next one can be asked for."""


class Stopped(Exception):  # noqa: N818 no error: somebody asked for it
    """Nothing was there to read when it was asked to stop."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two lines.

    Attributes:
        size: bytes before it, unpacked.
        lines: lines before it.
        crc: CRC-32 of those bytes.
    """

    size: int = 0
    lines: int = 0
    crc: int = 0


class Lines:
    """The lines of ``file`` from ``mark`` on, each with its end.

    Args:
        file: open for reading bytes. What begins as gzip does is unpacked.
        name: what errors call it.
        stop: asked while nothing comes: whether to give up.

    Raises:
        ValueError: for gzip that is damaged or ends early, from ``take`` and ``skip``.

    >>> import io
    >>> lines = Lines(io.BytesIO(b"a,b\\n1,2"), "example")
    >>> lines.take(), lines.take(), lines.take(), lines.mark.size
    (b'a,b\\n', b'1,2', b'', 7)
    """

    def __init__(self, file: BinaryIO, name: str, stop: Callable[[], bool] = lambda: False) -> None:
        self.name, self.stop, self.mark = name, stop, Mark()
        self._file = file
        self._waits = _waits(file)
        self._held = b""  # read and not taken; from _at on
        self._at = 0
        self._packed = b""
        self._ended = False
        self._unpack: Callable[[bytes], bytes] | None = None
        self._begun = False

    def take(self) -> bytes:
        """The next line with its end; empty behind the last one.

        Raises:
            LineError: for a line longer than ``LONGEST``, which is left out.
            Stopped: if ``stop`` says so while nothing comes.
        """
        size, seen = 0, self._at
        while True:
            end = self._held.find(b"\n", seen)
            if end >= 0 or (self._ended and not self._more()):
                break
            if len(self._held) - self._at > LONGEST:  # it is left out, and so it is not held
                size += len(self._held) - self._at
                self._pass(len(self._held) - self._at, lines=0)
            seen = len(self._held)
            before = self._at
            self._more()
            seen -= before - self._at
        end = len(self._held) if end < 0 else end + 1
        line = self._held[self._at : end]
        self._pass(end - self._at, lines=1 if line or size else 0)
        if size + len(line) > LONGEST:
            raise LineError(f"a line of {size + len(line):,} bytes, and {LONGEST:,} is the most that one may have")
        return line

    def skip(self, to: Mark) -> None:
        """Go on at ``to``, which was taken of a stream that began in the same way.

        Raises:
            ValueError: if this one begins in another way.
            Stopped: as ``take``.
        """
        while self.mark.size < to.size and (self._at < len(self._held) or self._more()):
            self._pass(min(to.size - self.mark.size, len(self._held) - self._at), lines=0)
        if (self.mark.size, self.mark.crc) != (to.size, to.crc):
            reason = f"it has only {self.mark.size:,}" if self.mark.size < to.size else "they are others now"
            raise ValueError(
                f"{self.name} has changed: {to.lines:,} lines of it, the first {to.size:,} bytes, were learned, and "
                f"{reason}"
            )
        self.mark = to

    @property
    def would_wait(self) -> bool:
        """Whether the next line is not there yet."""
        if not self._waits or self._ended or self._packed or self._held.find(b"\n", self._at) >= 0:
            return False
        return not _ready(self._file, 0)

    def _pass(self, size: int, lines: int) -> None:
        taken = self._held[self._at : self._at + size]
        mark = self.mark
        self.mark = Mark(mark.size + size, mark.lines + lines, zlib.crc32(taken, mark.crc))
        self._at += size

    def _more(self) -> bool:
        """Read another block; whether there was any."""
        while True:
            data = self._read()
            if not self._begun and data:
                self._begun = True
                if data[:2] == b"\x1f\x8b":
                    self._unpack = self._unpacker()
            if self._unpack is None:
                break
            data = self._unpack(data)
            if data or (self._ended and not self._packed):
                break
        if data:
            self._held = self._held[self._at :] + data
            self._at = 0
        return bool(data)

    def _read(self) -> bytes:
        if self._packed or self._ended:  # unpack first what is there
            return b""
        while self._waits and not _ready(self._file, SECONDS_BETWEEN_LOOKS):
            if self.stop():
                raise Stopped
        data = os.read(self._file.fileno(), BLOCK) if self._waits else self._file.read(BLOCK)
        if self._waits and data and not self._begun and len(data) < 2:  # too little to tell gzip
            data += os.read(self._file.fileno(), BLOCK)
        self._ended = not data
        return data

    def _unpacker(self) -> Callable[[bytes], bytes]:
        """What unpacks gzip block by block, several files one behind the other included."""
        packed = zlib.decompressobj(31)

        def unpack(data: bytes) -> bytes:
            nonlocal packed
            self._packed += data
            if packed.eof and self._packed:
                packed = zlib.decompressobj(31)
            try:
                out = packed.decompress(self._packed, BLOCK)
            except zlib.error as error:
                raise ValueError(f"{self.name} is damaged after line {self.mark.lines:,}: {error}") from error
            self._packed = packed.unused_data if packed.eof else packed.unconsumed_tail
            if self._ended and not out and not self._packed and not packed.eof:
                raise ValueError(f"{self.name} ends early, after line {self.mark.lines:,}: its gzip is not complete")
            return out

        return unpack


def _waits(file: BinaryIO) -> bool:
    """Whether reading may have to wait: of a pipe, a terminal or a socket, where that can be asked."""
    try:
        file.fileno()
        return not file.seekable() and _ready(file, 0) in (True, False)
    except (OSError, ValueError):
        return False


def _ready(file: BinaryIO, seconds: float) -> bool:
    return bool(select.select([file], [], [], seconds)[0])
