"""Figures of test-then-train: over all rows so far and over the latest 1,000, in bounded memory. Imports torch.

A score of a row is 1 or 0, right or wrong, in classification, and the absolute error in regression.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

WINDOW = 1000
"""Rows of what is called recent."""
POINTS = 500
"""A curve has no more than so many."""
FIRST_STRIDE = 10
"""Rows between the points of a short curve."""


class Track:
    """The scores of one predictor.

    >>> track = Track()
    >>> for score in (1.0, 0.0, 1.0, 1.0):
    ...     track.add(score)
    >>> track.mean, track.recent
    (0.75, 0.75)
    """

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self._latest: deque[float] = deque(maxlen=WINDOW)

    def add(self, score: float) -> None:
        """The score of another row."""
        self.count += 1
        self.sum += score
        self._latest.append(score)

    @property
    def mean(self) -> float | None:
        """Over all rows; None without any."""
        return self.sum / self.count if self.count else None

    @property
    def recent(self) -> float | None:
        """Over the latest 1,000 rows, or all as long as they are fewer."""
        return math.fsum(self._latest) / len(self._latest) if self._latest else None

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"count": self.count, "sum": self.sum, "latest": torch.tensor([*self._latest], dtype=torch.float64)}

    @staticmethod
    def shape_of(count: int) -> dict[str, Any]:
        """That of a state with so many scores."""
        return {"count": count, "sum": float, "latest": torch.empty(min(count, WINDOW), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        self.count, self.sum = state["count"], state["sum"]
        self._latest = deque(state["latest"].tolist(), maxlen=WINDOW)


class Curve:
    """Points of several tracks over the rows, never more than ``POINTS``: when they are, every second one goes.

    Attributes:
        rows: so many rows were seen at each point.
        so_far, recent: by track, its ``mean`` and ``recent`` at each point; None where it had ended.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.stride = FIRST_STRIDE
        self.rows: list[int] = []
        self.so_far: dict[str, list[float | None]] = {name: [] for name in names}
        self.recent: dict[str, list[float | None]] = {name: [] for name in names}

    def note(self, rows: int, tracks: Mapping[str, Track], ended: Sequence[str] = ()) -> None:
        """A point after ``rows`` rows, if there is to be one."""
        if rows % self.stride:
            return
        self.rows.append(rows)
        for name, track in tracks.items():
            self.so_far[name].append(None if name in ended else track.mean)
            self.recent[name].append(None if name in ended else track.recent)
        if len(self.rows) > POINTS:
            self.stride *= 2
            kept = [i for i, at in enumerate(self.rows) if at % self.stride == 0]
            self.rows = [self.rows[i] for i in kept]
            for lines in (self.so_far, self.recent):
                for name, line in lines.items():
                    lines[name] = [line[i] for i in kept]

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"stride": self.stride, "rows": list(self.rows), "so_far": self.so_far, "recent": self.recent}

    def shape_of(self, rows: int) -> dict[str, Any]:
        """That of a state after so many rows."""
        stride = FIRST_STRIDE
        while rows // stride > POINTS:
            stride *= 2
        points = [*range(stride, rows + 1, stride)]
        lines = {name: [(float, None)] * len(points) for name in self.so_far}
        return {"stride": stride, "rows": points, "so_far": lines, "recent": lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        self.stride, self.rows = state["stride"], list(state["rows"])
        self.so_far, self.recent = dict(state["so_far"]), dict(state["recent"])


class Baselines:
    """What needs no network: the target that came last, and the class that came most often or the mean.

    A predictor that has seen nothing yet is wrong about a class, and has no score for a number.
    """

    SHAPE = {  # noqa: RUF012
        "last": (float, None),
        "_counts": [range(2**62), ...],
        "_most": (int, None),
        "_count": range(2**62),
        "_mean": float,
    }
    """Of their state."""

    def __init__(self, task: str) -> None:
        self.by_class = task == "classification"
        self.last: float | None = None
        self._counts: list[int] = []
        self._most: int | None = None
        self._count, self._mean = 0, 0.0

    @property
    def names(self) -> tuple[str, str]:
        """What they are called."""
        return ("last class", "most frequent class") if self.by_class else ("last value", "mean so far")

    def scores(self, target: float) -> tuple[float | None, float | None]:
        """Of both, for a row, which they learn then."""
        if not self.by_class:
            before = (self.last, self._mean if self._count else None)
            self._count += 1
            self._mean += (target - self._mean) / self._count
            self.last = target
            return tuple(None if x is None else abs(target - x) for x in before)  # type: ignore[return-value]
        k = int(target)
        right = (float(self.last == k), float(self._most == k))
        self._counts += [0] * (k + 1 - len(self._counts))
        self._counts[k] += 1
        if self._most is None or self._counts[k] > self._counts[self._most]:
            self._most = k
        self.last = k
        return right

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {name: getattr(self, name) for name in self.SHAPE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        for name in self.SHAPE:
            setattr(self, name, state[name])
