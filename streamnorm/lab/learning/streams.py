"""Where a stream comes from: a file, standard input, or one that is made here. The standard library, and pyarrow for
parquet files."""

from __future__ import annotations

import io
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from streamnorm.lab.learning.parquet import SUFFIX, ParquetLines

STDIN = "-"
DRIFT_ROWS = 12_000
DRIFT_TARGET = "sold"


def drift(seed: int = 0) -> str:
    """12,000 rows of CSV whose rule changes after each third: will an offer be sold?

    It depends on the price beside its level, which wanders and falls by half in the middle of the stream, on the
    temperature, the hour and the day. 2 % of the temperatures are missing, and at one offer in 10 it is chance.

    >>> print(drift()[:55])
    price,temperature,hour,day,sold
    39.7,14.6,13,mon,yes
    40
    """
    made = random.Random(seed)
    days = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    lines = [f"price,temperature,hour,day,{DRIFT_TARGET}"]
    level = 50.0
    for i in range(DRIFT_ROWS):
        level *= math.exp(made.gauss(0, 0.005) - 0.02 * math.log(level / (50 if i < DRIFT_ROWS // 2 else 25)))
        hour, day = made.randrange(24), made.choice(days)
        dear, temperature = made.gauss(0, 1), made.gauss(15 + 5 * math.sin(i / 800), 6)
        third = 3 * i // DRIFT_ROWS
        wish = (-1.5, 1.5, -1.5)[third] * dear + (0.0, 0.0, 0.15)[third] * (temperature - 15)
        wish += 0.1 * (hour - 12) + (1.0 if day in ("sat", "sun") else -0.4)
        sold = made.random() < 0.5 if made.random() < 0.1 else wish > 0
        shown = "" if made.random() < 0.02 else f"{temperature:.1f}"
        lines.append(f"{level * (1 + 0.15 * dear):.1f},{shown},{hour},{day},{'yes' if sold else 'no'}")
    return "\n".join(lines) + "\n"


MADE: dict[str, tuple[Callable[[], str], str]] = {"drift": (drift, DRIFT_TARGET)}
"""Streams that are made here, by name, and what is predicted in each."""


def is_made(name: str) -> bool:
    """Whether a name is of a stream that is made here; a file of that name comes first."""
    return name in MADE and not Path(name).exists()


def stem(name: str) -> str:
    """What a folder of results is called after.

    >>> stem("data/elec2.csv.gz"), stem("-")
    ('elec2', 'stdin')
    """
    return "stdin" if name == STDIN else Path(name).name.split(".")[0] or "stream"


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """A stream by its name, for reading bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
    """
    if name == STDIN:
        yield sys.stdin.buffer
    elif is_made(name):
        yield io.BytesIO(MADE[name][0]().encode())
    else:
        path = Path(name)
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; give a file of it, or - for standard input")
        if not path.exists():
            made = ", ".join(MADE)
            raise FileNotFoundError(
                f"no file {name}; - is standard input, and a stream made for trying this out: {made}"
            )
        with ParquetLines(path) if path.suffix.lower() == SUFFIX else path.open("rb") as file:
            yield file  # type: ignore[misc]
