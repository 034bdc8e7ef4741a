"""H1 and H2: the state of a rule as buffers of a module (paper, sections 3.3.1 and 3.3.2). Imports the rule and the
buffers.

Legend: ``g`` arrivals in order along the first axis; ``s (g, 2, *shape)``: row 0 belongs to the mean, row 1 to sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from streamnorm.stream.buffers import Buffers, expect_replaceable
from streamnorm.stream.rule import GradientRule, Remembering, Rule, State
from streamnorm.tracing import has_autocast, is_readable

RUNNING, COUNTERS = "running_", "counter_"
"""Prefixes of the two buffers' names. Some tools pick the buffers that they copy and average by ``running_``, and
expect floating values there."""


EXTRAS = "estimate", "seen", "skipped"
"""What a memory keeps in addition to the members of H."""


class Memory(Buffers):
    """H1 or H2: the state of a rule in two buffers, changed in place. If the shape of the tables comes from the first
    input, they are ``Unshaped`` until then, and replaced once.

    ``tables (k, 2, *shape)``, float32 or wider, holds the k members of H that are shaped like a statistic, and the
    latest ``estimate``, which testing uses (Algorithm 5). ``counts``, int64, holds the counters of H, then how many
    arrivals were ``seen``, and how many ``skipped`` because they were not finite; those change nothing else. The
    buffers are named after what they hold: ``running_long_short_estimate`` and ``counter_count_held_seen_skipped``.
    Every member is an attribute, a view that may be assigned to.

    Args:
        rule: F or G.
        shape: of one statistic table, ``(2, ...)``; None: it comes from the first input.

    Raises:
        TypeError: for a rule whose state holds anything but tables of ``shape`` and whole counters of shape ().

    >>> from streamnorm.stream import Pooled
    >>> memory = Memory(Pooled(), (2, 3))
    >>> [(name, tuple(buffer.shape)) for name, buffer in memory.named_buffers()]
    [('running_long_short_estimate', (3, 2, 3)), ('counter_count_held_seen_skipped', (4,))]
    >>> memory.long.shape, memory.held
    (torch.Size([2, 3]), tensor(0))
    """

    estimate: Tensor
    seen: Tensor
    skipped: Tensor
    merged: Tensor | None = None
    """``counts`` when several processes were last at one state; None: when they were 0."""
    agreed: bool = False
    """Whether several processes know the shape of the tables."""

    def __init__(self, rule: Remembering, shape: Sequence[int] | None) -> None:
        waits = shape is None
        shape = tuple(shape or (2, 0))
        state = rule.empty(shape)
        for name, value in state.items():
            if value.shape != shape and (value.ndim or value.is_floating_point()):
                raise TypeError(
                    f"{rule!r}: a member of a state is shaped like the statistic, {shape}, or a whole counter of shape "
                    f"(); {name!r} is {value.dtype} of {tuple(value.shape)}"
                )
        tables = [name for name, value in state.items() if value.shape == shape]
        counters = [name for name in state if name not in tables]
        rows, places = [*tables, "estimate"], [*counters, "seen", "skipped"]
        super().__init__((RUNNING + "_".join(rows), COUNTERS + "_".join(places)), waits)
        self.rule = rule
        self._members = tuple(state)
        self._rows = {name: j for j, name in enumerate(rows)}
        self._places = {name: j for j, name in enumerate(places)}
        self._hold(*self._nothing(shape), shaped=not waits)

    def _nothing(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Empty tables and counters, for statistics of this shape."""
        state = self.rule.empty(tuple(shape))
        tables = _packed(state, self._rows, torch.zeros(*shape))
        return tables, _packed(state, self._places, torch.zeros((), dtype=torch.int64))

    def place(self, name: str) -> int:
        """The index of a member in ``tables``, or in ``counts``."""
        return self._rows[name] if name in self._rows else self._places[name]

    def _member(self, name: str) -> Tensor:
        return self.tables[self._rows[name]] if name in self._rows else self.counts[self._places[name]]

    def __getattr__(self, name: str) -> Any:
        mine = self.__dict__
        if name in mine.get("_rows", ()) or name in mine.get("_places", ()):
            return self._member(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        mine = self.__dict__
        if name not in mine.get("_rows", ()) and name not in mine.get("_places", ()):
            return super().__setattr__(name, value)
        member, value = self._member(name), torch.as_tensor(value)
        if value.shape != member.shape:
            raise ValueError(f"{name} is of shape {tuple(member.shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            member.copy_(value)
        return None

    def before(self) -> Tensor:
        """``counts`` when several processes were last at one state."""
        return torch.zeros_like(self.counts) if self.merged is None else self.merged.to(self.counts.device)

    def state(self) -> State:
        """The members of H by name, views of the buffers."""
        return {name: self._member(name) for name in self._members}

    def members(self) -> State:
        """All members by name: those of H, ``estimate``, ``seen`` and ``skipped``."""
        return {name: self._member(name) for name in (*self._members, *EXTRAS)}

    @torch.no_grad()
    def peek_mean(self, mu: Tensor, ok: Tensor | None, samples: int = 1) -> Tensor:
        """The estimates ``(g, ...)`` that ``take`` would return for the row of the mean; the state does not change."""
        mu = mu.unsqueeze(1)
        self.fit(mu.expand(-1, 2, *mu.shape[2:]))
        row = {name: value[:1] if value.ndim else value for name, value in self.state().items()}
        return self._observe(row, mu, ok, samples)[1].squeeze(1)

    def observe(self, s: Tensor) -> Tensor:
        """Take in the arrivals ``s (g, 2, ...)`` in order and return the estimate at each, ``(g, 2, ...)``. Arrivals
        that are not finite are left out and counted in ``skipped``."""
        return self.take(s, finite(s))

    @torch.no_grad()
    def take(self, s: Tensor, ok: Tensor | None, samples: int = 1, call: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``observe`` for arrivals that have been checked: those where ``ok (g,)`` is false are left out; None: none.

        Args:
            samples: number of samples in each arrival.
            call: for a gradient s, the statistics and the estimates ``(g, 2, ...)`` of the calls that it comes from.
        """
        self.fit(s)
        state = self.state()
        new, estimates = self._observe(state, s, ok, samples, call)
        self._write(state, new)
        estimate, seen, skipped = map(self._member, EXTRAS)
        if ok is None:
            seen.add_(len(s))
            estimate.copy_(self.rule.for_testing(new, estimates[-1]))
        else:
            arrived = ok.sum()
            seen.add_(arrived)
            skipped.add_(len(ok) - arrived)
            latest = self.rule.for_testing(new, _at_the_last(estimates, ok))
            estimate.copy_(torch.where((arrived > 0) & latest.isfinite().all(), latest, estimate))
        return estimates

    def _observe(
        self,
        state: State,
        s: Tensor,
        ok: Tensor | None,
        samples: int,
        call: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[State, Tensor]:
        rule = self.rule.weighing(samples)
        # A rule's matrix products are statistics: autocast must not lower their precision.
        device = s.device.type
        narrow = has_autocast(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if narrow else nullcontext():
            if isinstance(rule, Rule):
                return rule.observe(state, s, ok)
            assert isinstance(rule, GradientRule)
            if call is None:
                raise TypeError(f"{rule!r} is a G: it has to see the statistics of the call that a gradient comes from")
            return rule.observe(state, s, *call, ok)

    @torch.no_grad()
    def fold(self, happened: Tensor | bool = True) -> None:
        """A weight update. ``happened`` may be a tensor on the device, which avoids a synchronization."""
        if happened is False:
            return
        state = self.state()
        new = self.rule.fold(state)
        if isinstance(happened, Tensor):
            new = {name: torch.where(happened, value, state[name]) for name, value in new.items()}
        self._write(state, new)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget everything that was seen."""
        with self.tables.device:  # not torch's default device
            self._write(self.state(), self.rule.empty(tuple(self.estimate.shape)))
        for extra in EXTRAS:
            self._member(extra).zero_()
        self.merged = None

    reset_parameters = clear

    @torch.no_grad()
    def restart(self, s: Tensor) -> None:
        """Reset the state to ``s (2, ...)`` as its first arrival; the latest estimate stays."""
        self._write(self.state(), self._observe(self.rule.empty(tuple(s.shape)), s.unsqueeze(0), None, 1)[0])
        if self.merged is not None:
            self.merged[[self.place(name) for name in self._members if name in self._places]] = 0

    @property
    def known(self) -> bool:
        """Whether there is an estimate. Synchronizes with the device each time: buffers may have been replaced."""
        return bool(self.seen) or bool(self.has_estimate())

    def has_estimate(self) -> Tensor:
        """``known`` without synchronizing, judged by the table: tools that copy ``running_`` leave counters behind."""
        return self.estimate[-1].any()

    @torch.no_grad()
    def merge(self, others: Sequence[Memory]) -> None:
        """Merge with other memories of the same rule that have seen different data.

        The latest estimate becomes the mean of all; ``seen`` and ``skipped`` the largest, as how much of their past
        they share is not known.
        """
        state = self.state()
        self._write(state, self.rule.merge([state, *(other.state() for other in others)]))
        self.estimate = torch.stack([m.estimate for m in (self, *others)]).mean(0)
        for counter in ("seen", "skipped"):
            self._member(counter).copy_(torch.stack([m._member(counter) for m in (self, *others)]).amax())

    def fit(self, s: Tensor) -> None:
        """Take the shape of the statistics ``s (g, 2, ...)``, if it is not known yet.

        Raises:
            RuntimeError: under ``torch.compile``, which would keep the old buffers, and if other processes share the
                memory, as they would not see the new ones.
        """
        if self.shaped:
            return
        expect_replaceable(self.counts)
        self._resize(s.shape[1:])

    def _resize(self, shape: Sequence[int]) -> None:
        """New empty tables for statistics of another shape; ``(2, 0)``: unshaped."""
        with self.tables.device:
            tables, _ = self._nothing(shape)
        self._buffers[self._names[0]] = tables.to(self.tables.dtype)
        self.shaped, self.agreed = 0 not in shape, False
        self._mark()

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """A copy of everything, for ``put_back``."""
        return self.tables.clone(), self.counts.clone()

    @torch.no_grad()
    def put_back(self, snapshot: tuple[Tensor, Tensor]) -> None:
        """Restore a snapshot."""
        tables, counts = snapshot
        if tables.shape != self.tables.shape:
            self._resize(tables.shape[1:])
        self.tables.copy_(tables)
        self.counts.copy_(counts)

    @staticmethod
    def _write(state: State, new: State) -> None:
        for name, member in state.items():
            if new[name] is not member:
                member.copy_(new[name])

    def _migrate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Convert what another rule, or an older version, has saved in ``state_dict`` to this rule's buffers."""
        saved = _unpacked(state_dict, prefix)
        if not saved or all(prefix + name in state_dict for name in self._names):
            return
        extras = {name: saved.pop(name) for name in EXTRAS if name in saved}
        if set(saved) != set(self._members):
            saved = self.rule.migrated(saved)
        saved |= extras
        if not {*self._rows, *self._places} <= set(saved):
            return
        for name in [name for name in state_dict if name.startswith(prefix) and "." not in name[len(prefix) :]]:
            del state_dict[name]
        for name, where in zip(self._names, (self._rows, self._places), strict=True):
            state_dict[prefix + name] = torch.stack([torch.as_tensor(saved[member]) for member in where])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._migrate(state_dict, prefix)
        saved = state_dict.get(prefix + self._names[0])
        if self.waits and saved is not None and self.shaped == (saved.numel() == 0):
            self._resize(saved.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.merged = self.counts.clone()


def _packed(state: State, where: dict[str, int], nothing: Tensor) -> Tensor:
    """The members of a state that ``where`` names, stacked; ``nothing`` for those that it lacks."""
    return torch.stack([state.get(name, nothing) for name in where])


def _unpacked(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The members of a memory by name that a ``state_dict`` holds: packed, or (older versions) each by itself."""
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key[len(prefix) :]
        if not key.startswith(prefix) or "." in name:
            continue
        start = next((start for start in (RUNNING, COUNTERS) if name.startswith(start)), None)
        if start is None:
            found[name] = value
        elif len(names := name.removeprefix(start).split("_")) == len(value):
            found |= zip(names, value.unbind(0), strict=True)
    return found


def _at_the_last(estimates: Tensor, ok: Tensor) -> Tensor:
    """The estimate at the last arrival that is not left out."""
    if len(ok) == 1:
        return estimates[0]
    last = ok.cumsum(0).argmax()  # the first place where all are counted
    return estimates.index_select(0, last.reshape(1)).squeeze(0)


def finite(s: Tensor, ok: Tensor | None = None) -> Tensor | None:
    """Which of the arrivals ``s (g, ...)`` are all finite and not excluded by ``ok``, ``(g,)``; None: all.

    Where values cannot be read (``is_readable``), a mask is always returned.
    """
    may_ask = is_readable(s)
    if may_ask and ok is None and math.isfinite(s.sum().item()):
        return None
    mine = (s * 0).flatten(1).sum(1) == 0
    mine = mine if ok is None else mine & ok
    return None if may_ask and bool(mine.all()) else mine
