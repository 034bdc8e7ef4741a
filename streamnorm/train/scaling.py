"""Standardization of numbers that come one at a time, with the mean and sd of all so far (Welford). Imports nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Standardizer:
    """The mean and sd of each of ``size`` numbers, over those that were seen.

    >>> two = Standardizer(2)
    >>> for numbers in ([1.0, None], [3.0, 5.0]):
    ...     two.see(numbers)
    >>> two.scaled([3.0, 5.0]), two.mean
    ([1.0, 0.0], [2.0, 5.0])
    """

    def __init__(self, size: int) -> None:
        self.count = [0] * size
        self.mean = [0.0] * size
        self._squares = [0.0] * size  # summed squared distances to the mean

    def see(self, numbers: Sequence[float | None]) -> None:
        """Take numbers into account; None is missing."""
        for i, x in enumerate(numbers):
            if x is not None:
                self.count[i] += 1
                off = x - self.mean[i]
                self.mean[i] += off / self.count[i]
                self._squares[i] += off * (x - self.mean[i])

    def sd(self, i: int) -> float:
        """That of number i; 1 as long as it is constant."""
        return math.sqrt(self._squares[i] / self.count[i]) if self._squares[i] > 0 else 1.0

    def scaled(self, numbers: Sequence[float | None]) -> list[float]:
        """Standardized numbers; 0, their mean, for what is missing."""
        return [0.0 if x is None else (x - self.mean[i]) / self.sd(i) for i, x in enumerate(numbers)]

    @property
    def shape(self) -> dict[str, Any]:
        """Of its state."""
        size = len(self.count)
        return {"count": [range(2**62)] * size, "mean": [float] * size, "squares": [float] * size}

    def state_dict(self) -> dict[str, list[float]]:
        """All that was seen."""
        return {"count": list(self.count), "mean": list(self.mean), "squares": list(self._squares)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on where ``state_dict()`` was taken."""
        self.count, self.mean = [*map(int, state["count"])], list(state["mean"])
        self._squares = list(state["squares"])
