"""From the values of a row to the inputs of a network, as many as there are columns and shared ones for words.

Imports the rows, their scaling and torch.

Legend: ``n`` rows, ``d`` columns, ``w`` inputs for words.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamnorm.lab.learning.rows import Value
from streamnorm.train.scaling import Standardizer

MOST = 1e18
"""The largest number, up to its sign, that is fed to a network; its square still fits into float32."""
KEPT = 5
"""Names of unknown columns that are kept."""


class Encoder:
    """Rows to inputs ``(n, d + w)``, ``(n, d)`` as long as no row needed words.

    A number stands at its column; a word, and what is missing, is a 1 at the hash of column and word, among the w. So a
    column may hold numbers and words, and change between them. A number that is not finite or beyond ``MOST`` counts
    as missing.

    Attributes:
        columns: the names of the d features.
        has_words: whether a row needed the inputs for words: from then on there are.
        not_finite: numbers so far that were not finite, or too large.
        unknown: columns that came and are not among ``columns``, the first few of them, and how often.

    >>> encoder = Encoder(("size", "color"), words=4)
    >>> encoder.inputs([encoder.read({"size": 3.0, "color": "red"})]).shape
    torch.Size([1, 6])
    """

    def __init__(self, columns: Sequence[str], words: int, scale: bool = False) -> None:
        self.columns = tuple(columns)
        self.words = words
        self.scaler = Standardizer(len(self.columns)) if scale else None
        self.has_words = False
        self.not_finite = 0
        self.unknown: dict[str, int] = {}
        self._known = frozenset(self.columns)

    def needs_words(self, cells: Mapping[str, Value]) -> bool:
        """Whether a row has a word, or lacks something."""
        return any(not _is_number(cells.get(name)) for name in self.columns)

    def read(self, cells: Mapping[str, Value]) -> tuple[list[float], list[int]]:
        """The numbers of a row, and where among the inputs for words there is a 1. Called once for each row, in their
        order: it also counts, and moves what scales the numbers."""
        numbers: list[float | None] = []
        at: list[int] = []
        present = 0
        for name in self.columns:
            found = cells.get(name)
            present += name in cells
            if isinstance(found, float):
                if _is_number(found):
                    numbers.append(found)
                    continue
                self.not_finite += 1
                found = None
            numbers.append(None)
            at.append(zlib.crc32(f"{name}={'' if found is None else found}".encode()) % self.words)
        if len(cells) > present:
            self._note_unknown(cells)
        self.has_words = self.has_words or bool(at)
        if self.scaler is None:
            return [0.0 if x is None else x for x in numbers], at
        self.scaler.see(numbers)
        return self.scaler.scaled(numbers), at

    def _note_unknown(self, cells: Mapping[str, Value]) -> None:
        for name in cells.keys() - self._known:
            if name in self.unknown or len(self.unknown) < KEPT:
                self.unknown[name] = self.unknown.get(name, 0) + 1

    def inputs(self, rows: Sequence[tuple[list[float], list[int]]]) -> Tensor:
        """The inputs of rows that were read, ``(n, d + w)``, or ``(n, d)`` if no row so far needed words."""
        d = len(self.columns)
        x = torch.zeros(len(rows), d + (self.words if self.has_words else 0))
        x[:, :d] = torch.tensor([numbers for numbers, _ in rows], dtype=torch.float64)
        at = [(i, d + j) for i, (_, places) in enumerate(rows) for j in places]
        if at:
            x[tuple(torch.tensor(at).T)] = 1.0
        return x

    @property
    def shape(self) -> dict[str, Any]:
        """Of its state."""
        scaler = self.scaler.shape if self.scaler else None
        return {"has_words": bool, "not_finite": range(2**62), "unknown": {str: range(2**62)}, "scaler": scaler}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "has_words": self.has_words,
            "not_finite": self.not_finite,
            "unknown": dict(self.unknown),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        self.has_words, self.not_finite = state["has_words"], state["not_finite"]
        self.unknown = dict(state["unknown"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


def _is_number(found: Value) -> bool:
    return isinstance(found, float) and -MOST <= found <= MOST and not math.isnan(found)
