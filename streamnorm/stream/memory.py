"""H1 and H2: the state of a rule as buffers of a module (paper, sections 3.3.1 and 3.3.2). Imports the rule.

Legend: ``g`` arrivals in order along the first axis; ``s (g, 2, *shape)``: row 0 belongs to the mean, row 1 to sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.stream.rule import GradientRule, Remembering, Rule, State
from streamnorm.tracing import is_readable


class Memory(nn.Module):
    """H1 or H2: the state of a rule as registered buffers, in float32 or wider, only ever changed in place.

    Members are attributes under the rule's names: a ``LongShort`` memory has ``long``, ``short``, ``count`` and
    ``updates``. Beside them stand ``estimate``, the latest one (what testing uses, Algorithm 5), and two counters:
    ``seen`` arrivals, and ``skipped`` ones that were not finite and left everything as it was.

    Args:
        rule: F or G.
        shape: of one statistic table, ``(2, ...)``; None if only the first input will tell.
    """

    estimate: Tensor
    seen: Tensor
    skipped: Tensor

    def __init__(self, rule: Remembering, shape: Sequence[int] | None) -> None:
        super().__init__()
        self.rule = rule
        self.shaped = shape is not None
        state = rule.empty(tuple(shape or (2, 0)))
        self._members = tuple(state)
        for name, value in state.items():
            self.register_buffer(name, _wide(value))
        self.register_buffer("estimate", _wide(torch.zeros(*(shape or (2, 0)))))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def state(self) -> State:
        """The members of H by name."""
        buffers: dict[str, Any] = self._buffers
        return {name: buffers[name] for name in self._members}

    @torch.no_grad()
    def peek_mean(self, mu: Tensor, ok: Tensor | None, samples: int = 1) -> Tensor:
        """The estimates ``(g, ...)`` that ``take`` would return for the row of the mean; nothing is remembered."""
        mu = mu.unsqueeze(1)
        self._shape_like(mu.expand(-1, 2, *mu.shape[2:]))
        row = {name: value[:1] if value.ndim else value for name, value in self.state().items()}
        return self._observe(row, mu, ok, samples)[1].squeeze(1)

    def observe(self, s: Tensor) -> Tensor:
        """Take in the arrivals ``s (g, 2, ...)`` in order and return the estimate at each, ``(g, 2, ...)``. What is not
        finite is left out and counted in ``skipped``."""
        return self.take(s, finite(s))

    @torch.no_grad()
    def take(self, s: Tensor, ok: Tensor | None, samples: int = 1, call: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``observe`` for arrivals that have been judged: left out are those where ``ok (g,)`` is false, None: none.

        Args:
            samples: in each arrival.
            call: for a gradient s, the statistics and the estimates ``(g, 2, ...)`` of the calls that it comes from.
        """
        self._shape_like(s)
        new, estimates = self._observe(self.state(), s, ok, samples, call)
        self._write(new)
        if ok is None:
            self.seen.add_(len(s))
            self.estimate.copy_(self.rule.for_testing(new, estimates[-1]))
        else:
            arrived = ok.sum()
            self.seen.add_(arrived)
            self.skipped.add_(len(ok) - arrived)
            last = ok.cumsum(0).argmax()  # the first place where all have arrived: the last arrival of all
            latest = self.rule.for_testing(new, estimates.index_select(0, last.reshape(1)).squeeze(0))
            self.estimate.copy_(torch.where((arrived > 0) & latest.isfinite().all(), latest, self.estimate))
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
        # A rule's products are statistics: where autocast makes products narrow, not these.
        device = s.device.type
        narrow = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if narrow else nullcontext():
            if isinstance(rule, Rule):
                return rule.observe(state, s, ok)
            assert isinstance(rule, GradientRule)
            if call is None:
                raise TypeError(f"{rule!r} is a G: it has to see the statistics of the call that a gradient comes from")
            return rule.observe(state, s, *call, ok)

    @torch.no_grad()
    def fold(self, happened: Tensor | bool = True) -> None:
        """A weight update. ``happened`` may be a tensor on the device, so that asking needs no synchronization."""
        if happened is False:
            return
        state = self.state()
        new = self.rule.fold(state)
        if isinstance(happened, Tensor):
            new = {name: torch.where(happened, value, state[name]) for name, value in new.items()}
        self._write(new)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget everything that was seen."""
        with self.estimate.device:  # whatever the default device of new tensors
            self._write(self.rule.empty(tuple(self.estimate.shape)))
        for extra in (self.estimate, self.seen, self.skipped):
            extra.zero_()

    reset_parameters = clear

    @torch.no_grad()
    def restart(self, s: Tensor) -> None:
        """Go on as if ``s (2, ...)`` had been the first arrival; the latest estimate stays."""
        self._write(self._observe(self.rule.empty(tuple(s.shape)), s.unsqueeze(0), None, 1)[0])

    @property
    def known(self) -> bool:
        """Whether there is an estimate. The device is asked, every time: buffers may have been replaced or emptied."""
        return bool(self.seen)

    @torch.no_grad()
    def merge(self, others: Sequence[Memory]) -> None:
        """Take in what other memories of the same rule have seen since they went separate ways.

        The latest estimate becomes the mean of theirs; ``seen`` and ``skipped`` the largest, for what they have in
        common is not known.
        """
        self._write(self.rule.merge([self.state(), *(other.state() for other in others)]))
        self.estimate.copy_(torch.stack([m.estimate for m in (self, *others)]).mean(0))
        for counter in ("seen", "skipped"):
            self.get_buffer(counter).copy_(torch.stack([m.get_buffer(counter) for m in (self, *others)]).amax())

    def _shape_like(self, s: Tensor) -> None:
        if not self.shaped:
            self._resize(s.shape[1:])

    def _resize(self, shape: Sequence[int]) -> None:
        with self.estimate.device:
            empty = {**self.rule.empty(tuple(shape)), "estimate": torch.zeros(*shape)}
        for name, value in empty.items():
            self.get_buffer(name).resize_(value.shape).copy_(value)
        self.shaped = True

    def _write(self, new: State) -> None:
        for name, member in self.state().items():
            if new[name] is not member:
                member.copy_(new[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        # .half() and .bfloat16() reach every floating buffer; statistics must not lose precision with the weights.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self._buffers.items():
            wide = before[name]
            if after is not None and wide is not None and after.is_floating_point() and after.itemsize < 4:
                self._buffers[name] = wide.to(after.device)
        return self

    def _migrate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename in ``state_dict`` what another rule has left there."""
        extras = ("estimate", "seen", "skipped")
        names = [name for name in state_dict if name.startswith(prefix) and "." not in name[len(prefix) :]]
        members = {name[len(prefix) :]: state_dict[name] for name in names if name[len(prefix) :] not in extras}
        if not members or set(members) == set(self._members):
            return
        new = self.rule.migrated(dict(members))
        for name in set(members) - set(new):
            del state_dict[prefix + name]
        for name, value in new.items():
            state_dict[prefix + name] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._migrate(state_dict, prefix)
        saved = state_dict.get(prefix + "estimate")
        if not self.shaped and saved is not None and saved.numel():
            self._resize(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = _wide(value)


def _wide(value: Tensor) -> Tensor:
    """``value`` in float32 if it is narrower."""
    return value.float() if value.is_floating_point() and value.itemsize < 4 else value


def finite(s: Tensor, ok: Tensor | None = None) -> Tensor | None:
    """Which of the arrivals ``s (g, ...)`` are finite throughout and not refused by ``ok``, ``(g,)``; None: all.

    Where values may not be looked at, the mask is kept.
    """
    may_ask = is_readable(s)
    if may_ask and ok is None and math.isfinite(s.sum().item()):
        return None
    mine = (s * 0).flatten(1).sum(1) == 0
    mine = mine if ok is None else mine & ok
    return None if may_ask and bool(mine.all()) else mine
