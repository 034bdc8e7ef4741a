"""Validation of settings: numbers out of range, unknown words. Imports the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Collection


def is_whole(value: object, least: int = 1) -> bool:
    """Whether it is an int (not a bool) of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def expect_whole(name: str, value: object, least: int = 1) -> None:
    """Raise unless it is a whole number of at least ``least``.

    Raises:
        ValueError: with the name and the value.

    >>> expect_whole("epochs", 0)
    Traceback (most recent call last):
    ValueError: epochs is a whole number >= 1, got 0
    """
    if not is_whole(value, least):
        raise ValueError(f"{name} is a whole number >= {least}, got {value!r}")


def expect_sizes(name: str, value: object, most: int = 3) -> None:
    """Raise unless it is the size of a map: a tuple of at most ``most`` whole numbers.

    Raises:
        ValueError: with the name and the value.
    """
    if not (isinstance(value, (tuple, list)) and len(value) <= most and all(map(is_whole, value))):
        raise ValueError(f"{name} is the size of a map, up to {most} whole numbers >= 1 such as (7, 7), got {value!r}")


def expect_finite(name: str, value: object, above: bool = False) -> None:
    """Raise unless it is a finite number >= 0; with ``above``, > 0.

    Raises:
        ValueError: with the name and the value.

    >>> expect_finite("learning_rate", -0.1)
    Traceback (most recent call last):
    ValueError: learning_rate is a finite number >= 0, got -0.1
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (value > 0 or (value == 0 and not above))):  # type: ignore[operator, arg-type]
        raise ValueError(f"{name} is a finite number {'>' if above else '>='} 0, got {value!r}")


def expect_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise unless it is one of the words ``known``.

    Raises:
        ValueError: with the name, the words and the value.

    >>> expect_choice("arch", "gur", ("rnn", "gru"))
    Traceback (most recent call last):
    ValueError: arch is one of rnn, gru, got 'gur'
    """
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
