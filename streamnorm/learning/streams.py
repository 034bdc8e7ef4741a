"""Where a stream comes from: a file, standard input, or one that is made here. The standard library alone."""

from __future__ import annotations

import io
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

STDIN = "-"
DRIFT_ROWS = 12_000
DRIFT_TARGET = "demand"


def drift(seed: int = 0) -> str:
    """12,000 rows of CSV whose rule changes twice: is the demand for power high or low?

    It depends on the hour, the temperature, the day and the price, whose level wanders and doubles half way; the numbers
    are of very different sizes, and 2 % of the temperatures are missing.

    >>> print(drift()[:63])
    hour,temperature,pressure,price,day,demand
    0,14.3,100869,100.48
    """
    made = random.Random(seed)
    days = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    lines = ["hour,temperature,pressure,price,day,demand"]
    level, weather = 100.0, 15.0
    for i in range(DRIFT_ROWS):
        hour, day = i % 24, days[i // 24 % 7]
        level *= math.exp(made.gauss(0, 0.01) - 0.002 * math.log(level / (100 if i < DRIFT_ROWS // 2 else 200)))
        weather += made.gauss(0, 0.4) - 0.01 * (weather - 15)
        temperature = weather + 5 * math.sin((hour - 9) * math.pi / 12)
        price = level * (1 + 0.2 * math.sin((hour - 12) * math.pi / 12)) + made.gauss(0, 3)
        third = 3 * i // DRIFT_ROWS
        signal = math.sin((hour - 7) * math.pi / 12) * (1, -1, 1)[third] + 0.12 * abs(temperature - 15) - 0.6
        signal += (price / level - 1) * (2, 2, -4)[third] - (0.8 if day in ("sat", "sun") else 0)
        demand = "high" if signal + made.gauss(0, 0.25) > 0 else "low"
        shown = "" if made.random() < 0.02 else f"{temperature:.1f}"
        lines.append(f"{hour},{shown},{made.gauss(101325, 400):.0f},{price:.2f},{day},{demand}")
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
            raise FileNotFoundError(f"no file {name}; - is standard input, and a stream made for trying this out: {made}")
        with path.open("rb") as file:
            yield file
