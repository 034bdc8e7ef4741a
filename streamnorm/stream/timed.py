"""A memory for each time step, all of them in two buffers (paper, section 4.2). Imports the memory.

Legend: ``T`` time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.stream.buffers import Buffers, expect_replaceable
from streamnorm.stream.memory import Memory
from streamnorm.tracing import is_readable


class TimedMemory(Buffers):
    """The memories of all time steps, ``tables (T, k, 2, *shape)`` and ``counts (T, counters)``.

    There are two buffers for any number of steps, so that code that copies or averages buffers pairwise never mixes up
    steps.

    Args:
        one: the memory of a time step; statistics that it already has become the first step's.
        steps: how many there are; None: as many as training needs, by ``grow``.

    >>> from streamnorm.stream import Exponential
    >>> timed = TimedMemory(Memory(Exponential(0.1), (2, 3)), steps=5)
    >>> timed.tables.shape, timed.at(4).estimate.shape
    (torch.Size([5, 2, 2, 3]), torch.Size([2, 3]))
    """

    def __init__(self, one: Memory, steps: int | None) -> None:
        super().__init__(one._names, waits=steps is None or one.waits)
        self.fixed = steps is not None
        self.steps = steps or 1
        self.shape = None if one.waits else tuple(one.estimate.shape)
        # What a step has besides its buffers.
        self.common = {name: getattr(one, name) for name in ("rule", "waits", "_names", "_members", "_rows", "_places")}
        self._hold(one.tables.detach()[None], one.counts.detach()[None], shaped=not one.waits)
        if self.fixed or (one.shaped and is_readable(one.seen) and one.known):
            self._stack(self.shape)
        elif self.shaped:
            self.forget()

    def at(self, t: int) -> Memory:
        """The memory of time step t."""
        return _Step(self, t)

    def latest(self, t: int) -> Tensor:
        """The estimate of the last time step up to t that has one, 0 if none has; without synchronizing."""
        estimates = self.tables[: t + 1, self.common["_rows"]["estimate"]]
        known = estimates[:, -1].flatten(1).any(1)
        last = (known * torch.arange(len(known), device=known.device)).argmax()
        return estimates.index_select(0, last.reshape(1)).squeeze(0)

    def grow(self, steps: int) -> None:
        """Extend to this many time steps, in new buffers."""
        self.steps = steps
        self._stack(tuple(self.tables.shape[2:]) if self.shaped else self.shape)

    def fit(self, shape: Sequence[int]) -> None:
        """Take the shape of the statistics of a step, if it is not known yet."""
        if not self.shaped:
            expect_replaceable(self.counts)
            self._stack(tuple(shape))

    def forget(self) -> None:
        """Reset to the state before the first input."""
        if not self.fixed:
            self.steps = 1
        self._stack(None)

    def _stack(self, shape: Sequence[int] | None) -> None:
        """New buffers for all steps, with as many of the old steps as fit. None: the shape is not known yet."""
        before = (self.tables, self.counts) if self.shaped and shape is not None else ()
        with self.tables.device:
            tables, counts = Memory(self.common["rule"], shape)._buffers.values()
        assert tables is not None
        assert counts is not None
        new = [
            value.as_subclass(Tensor)[None].repeat(self.steps, *[1] * value.ndim).to(like.dtype)
            for value, like in zip((tables, counts), (self.tables, self.counts), strict=True)
        ]
        for value, old in zip(new, before, strict=False):
            value[: len(old)] = old[: self.steps]
        self._hold(*new, shaped=shape is not None)

    def save(self) -> Any:
        """A snapshot for ``restore``, without copying: ``grow`` and ``fit`` make new buffers."""
        return self.tables, self.counts, self.shaped, self.steps

    def restore(self, saved: Any) -> None:
        """Undo ``grow``."""
        *buffers, shaped, self.steps = saved
        self._hold(*buffers, shaped=shaped)

    def fit_to(self, saved: Tensor) -> None:
        """Take the shape of the tables of a saved state."""
        if not self.waits:
            return
        if not saved.numel():
            self.forget()
        elif not self.fixed or len(saved) == self.steps:
            self.steps = len(saved)
            self._stack(self.shape or tuple(saved.shape[2:]))


class _Row:
    """The current buffers of one time step by name."""

    def __init__(self, of: TimedMemory, t: int) -> None:
        self.of, self.t = of, t

    def __getitem__(self, name: str) -> Tensor:
        buffer = self.of._buffers[name]
        assert buffer is not None
        return buffer[self.t]


class _Step(Memory):
    """The memory of one time step: a view into ``TimedMemory``, with no buffers of its own."""

    def __init__(self, of: TimedMemory, t: int) -> None:
        nn.Module.__init__(self)
        for name, value in of.common.items():
            setattr(self, name, value)
        self._row = _Row(of, t)

    @property
    def _at(self) -> Any:
        return self._row

    @property
    def tables(self) -> Tensor:
        return self._row[self._names[0]]

    @property
    def counts(self) -> Tensor:
        return self._row[self._names[1]]

    @property
    def shaped(self) -> bool:  # type: ignore[override]
        return self._row.of.shaped

    def fit(self, s: Tensor) -> None:
        self._row.of.fit(s.shape[1:])

    def _resize(self, shape: Sequence[int]) -> None:
        if 0 in shape:
            self._row.of.forget()
        else:
            self._row.of.fit(shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """No-op: ``TimedMemory`` loads the state of all steps."""
