"""The stream: what is remembered of statistics that have passed (paper, sections 3.3.1 and 3.3.2).

The paper's F and G are one kind of thing, a rule ``(H, s) -> (H', estimate)``, and H1 and H2 are one kind of thing,
a memory. Rules here are pure and know nothing of modules; ``Memory`` holds a rule's state as registered buffers and
changes it in place. Imports torch alone.

Legend: ``g`` arrivals in order along the first axis; ``s (g, 2, *shape)``: row 0 belongs to the mean, row 1 to sigma.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""The members of H by name. Members shaped like one statistic, and counters of shape ()."""


class Rule(ABC):
    """F or G: how a memory takes in what arrives and what it estimates (Algorithms 5 and 6).

    A rule of your own gives ``empty`` and ``step``, and ``fold`` if a weight update means something to it. It must be
    pure (return new tensors) and treat every statistic alike, element by element.
    """

    @abstractmethod
    def empty(self, shape: Sequence[int]) -> State:
        """The state before anything arrived, for statistics of ``shape`` (2, ...)."""

    @abstractmethod
    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        """One arrival ``s (2, ...)``: the new state and the estimate, ``{H, s_hat} = F(H, s)``."""

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        """Arrivals ``s (g, 2, ...)`` in order; those where ``ok (g,)`` is false leave the state alone, None: none is.

        Returns the last state and every estimate ``(g, 2, ...)``; at an arrival that is left out it is whatever
        ``step`` makes of it.
        """
        estimates = []
        for j, now in enumerate(s.unbind(0)):
            new, estimate = self.step(state, now)
            state = new if ok is None else {name: torch.where(ok[j], new[name], old) for name, old in state.items()}
            estimates.append(estimate)
        return state, torch.stack(estimates)

    def fold(self, state: State) -> State:
        """What a weight update does to the state."""
        return state

    def merge(self, states: Sequence[State]) -> State:
        """The state that has seen what all of ``states`` have seen."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its states merge; define merge(states)")


CHUNK = 256
"""Arrivals that a rule in closed form takes at a time: its products grow with the square."""


def _in_chunks(rule: Rule, state: State, s: Tensor, ok: Tensor | None) -> tuple[State, Tensor]:
    estimates = []
    for start in range(0, len(s), CHUNK):
        part = slice(start, start + CHUNK)
        state, estimate = rule.observe(state, s[part], None if ok is None else ok[part])
        estimates.append(estimate)
    return state, torch.cat(estimates)


def _column(per_step: Tensor, like: Tensor) -> Tensor:
    """``per_step (g,)`` shaped to broadcast against ``like (g, ...)``."""
    return per_step.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class LongShort(Rule):
    """The paper's H = {long, short, counter} with its F, or G (sections 3.3.1, 3.3.2).

    ::

        arrival        short <- exact mean of all s since the last weight update, count <- count + 1
        estimate       mix_1 long + mix_2 short + mix_3 s
        weight update  long <- keep_1 long + keep_2 short, short <- empty, count <- 0

    Whichever of long and short is empty, the other stands in for it; the first weight update makes long what short is.
    F is ``LongShort(mix=(alpha1, alpha2, 0), keep=(kappa1, kappa2))``; G is ``LongShort(mix=beta, keep=(kappa3,
    kappa4))``.

    >>> rule = LongShort(mix=(0.5, 0.5, 0.0), keep=(0.75, 0.25))
    >>> memory = Memory(rule, (1,))
    >>> for s in (1.0, 3.0):
    ...     estimate = memory.observe(torch.tensor([[s]]))
    >>> memory.short, memory.count
    (tensor([2.]), tensor(2))
    >>> memory.fold(); memory.long
    tensor([2.])
    >>> memory.observe(torch.tensor([[6.0]]))
    tensor([[4.]])
    >>> memory.fold(); memory.long
    tensor([3.])
    """

    mix: tuple[float, float, float]
    keep: tuple[float, float]

    def empty(self, shape: Sequence[int]) -> State:
        counter = torch.zeros((), dtype=torch.int64)
        return {
            "long": torch.zeros(*shape),
            "short": torch.zeros(*shape),
            "count": counter,
            "updates": counter.clone(),
        }

    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, s.unsqueeze(0))
        return new, estimate[0]

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        g = len(s)
        if g > CHUNK:
            return _in_chunks(self, state, s, ok)
        if ok is None and g > 1 and s.is_cpu:
            # A CPU tells its counters at no cost, and cycles begin alike: the weights need not be made each time.
            share, to_long, to_short = _weights(
                self.mix, int(state["count"]), min(int(state["updates"]), 1), g, s.dtype
            )
        else:
            share, to_long, to_short = self.weights(state["count"], state["updates"], ok, g, s.dtype)
        # short_j = short + sum_{i<=j} (s_i - short) / (count + j), the exact mean of all arrivals, as one product.
        old = state["short"].to(s.dtype)
        surplus = s - old if ok is None else torch.where(_column(ok, s), s - old, 0)
        short = torch.addmm(old.reshape(1, -1), share, surplus.flatten(1)).reshape(s.shape)
        estimate = torch.addcmul(_column(to_long, s) * state["long"], short, _column(to_short, s))
        if self.mix[2]:
            estimate = torch.add(estimate, s, alpha=self.mix[2])
        arrived = g if ok is None else ok.sum()
        new = {**state, "short": short[-1], "count": state["count"] + arrived}
        if ok is None:
            return new, estimate
        known = (state["updates"] > 0) | (state["count"] + ok.cumsum(0) > 0)
        return new, torch.where(_column(known, s), estimate, sum(self.mix) * s)

    def weights(
        self, count: Tensor, updates: Tensor, ok: Tensor | None, g: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What g arrivals are weighted with: the triangle ``(g, g)`` that makes short of them, and the shares of long
        and of short in the estimate at each, ``(g,)`` or ``(1,)``. Whichever is empty, the other stands in for it."""
        counts = count + (torch.arange(1, g + 1, device=count.device) if ok is None else ok.cumsum(0))
        share = counts.clamp_min(1).to(dtype).reciprocal().unsqueeze(1).expand(g, g).tril()
        has_long = (updates > 0).to(dtype).reshape(1)
        if ok is None:
            return share, self.mix[0] * has_long, self.mix[1] + self.mix[0] * (1 - has_long)
        has_short = (counts > 0).to(dtype)
        to_long = has_long * (self.mix[0] + self.mix[1] * (1 - has_short))
        return share * ok, to_long, has_short * (self.mix[1] + self.mix[0] * (1 - has_long))

    def fold(self, state: State) -> State:
        short, count, updates = state["short"], state["count"], state["updates"]
        mixed = torch.where(updates > 0, self.keep[0] * state["long"] + self.keep[1] * short, short)
        return {
            "long": torch.where(count > 0, mixed, state["long"]),
            "short": torch.zeros_like(short),
            "count": torch.zeros_like(count),
            "updates": updates + (count > 0).to(updates.dtype),
        }

    def merge(self, states: Sequence[State]) -> State:
        """Short terms weighted by their counts; long terms by the updates they have seen."""

        def mean(name: str, weight: str) -> Tensor:
            total = sum(state[weight] for state in states)
            weighted = sum(state[name] * state[weight].to(state[name].dtype) for state in states)
            return torch.as_tensor(weighted / torch.as_tensor(total).clamp_min(1))

        return {
            "long": mean("long", "updates"),
            "short": mean("short", "count"),
            "count": torch.stack([state["count"] for state in states]).sum(0),
            "updates": torch.stack([state["updates"] for state in states]).amax(0),
        }


@lru_cache(maxsize=32)
def _weights(
    mix: tuple[float, float, float], count: int, updates: int, g: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.device("cpu"):
        return LongShort(mix, (0, 0)).weights(torch.tensor(count), torch.tensor(updates), None, g, dtype)


@dataclass(frozen=True)
class Exponential(Rule):
    """A running average that starts from its first value: ``long <- (1 - rate) long + rate s`` (Algorithm 3's F).

    Weight updates mean nothing to it.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is the weight of the new value, in (0, 1], got {self.rate!r}")

    def empty(self, shape: Sequence[int]) -> State:
        return {"long": torch.zeros(*shape), "count": torch.zeros((), dtype=torch.int64)}

    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        weight = self.rate + (1 - self.rate) * (state["count"] == 0).to(s.dtype)
        long = torch.lerp(state["long"].to(s.dtype), s, weight)
        return {"long": long, "count": state["count"] + 1}, long

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        if len(s) > CHUNK:
            return _in_chunks(self, state, s, ok)
        if len(s) == 1 and ok is None:
            return super().observe(state, s, ok)
        ok = s.new_ones(len(s), dtype=torch.bool) if ok is None else ok
        # long_j = (1-r)^{k_j} long + sum_{i<=j} r (1-r)^{k_j - k_i} s_i with k the number of arrivals up to there;
        # the very first arrival of all enters with weight 1 instead of r.
        k = ok.cumsum(0)
        first = (state["count"] == 0) & ok & (k == 1)
        decay = (1 - self.rate) ** (k[:, None] - k[None, :]).clamp_min(0).to(s.dtype)
        weight = (self.rate + (1 - self.rate) * first.to(s.dtype)) * ok * decay.tril()
        arrived = torch.where(_column(ok, s), s, 0).flatten(1)
        old = state["long"].to(s.dtype).flatten() * _column((1 - self.rate) ** k.to(s.dtype), arrived)
        long = torch.addmm(old, weight, arrived).reshape(s.shape)
        count = state["count"] + k
        return {"long": long[-1], "count": count[-1]}, torch.where(_column(count > 0, s), long, s)


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

    def __init__(self, rule: Rule, shape: Sequence[int] | None) -> None:
        super().__init__()
        self.rule = rule
        self.shaped = shape is not None
        state = rule.empty(tuple(shape or (2, 0)))
        self._members = tuple(state)
        for name, value in state.items():
            self.register_buffer(name, _wide(value))
        self.register_buffer("estimate", _wide(torch.zeros(*(shape or (2, 0)))))
        self._known = False
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def state(self) -> State:
        """The members of H by name."""
        buffers: dict[str, Any] = self._buffers
        return {name: buffers[name] for name in self._members}

    @torch.no_grad()
    def peek_mean(self, mu: Tensor, ok: Tensor | None) -> Tensor:
        """The estimates ``(g, ...)`` that ``observe`` would return for the row of the mean; nothing is remembered."""
        mu = mu.unsqueeze(1)
        self._shape_like(mu.expand(-1, 2, *mu.shape[2:]))
        row = {name: value[:1] if value.ndim else value for name, value in self.state().items()}
        return self._observe(row, mu, ok)[1].squeeze(1)

    def observe(self, s: Tensor) -> Tensor:
        """Take in the arrivals ``s (g, 2, ...)`` in order and return the estimate at each, ``(g, 2, ...)``. What is not
        finite is left out and counted in ``skipped``."""
        return self.take(s, finite(s))

    @torch.no_grad()
    def take(self, s: Tensor, ok: Tensor | None) -> Tensor:
        """``observe`` for arrivals that have been judged: left out are those where ``ok (g,)`` is false, None: none."""
        self._shape_like(s)
        new, estimates = self._observe(self.state(), s, ok)
        self._write(new)
        if ok is None:
            self.seen.add_(len(s))
            self.estimate.copy_(estimates[-1])
        else:
            arrived = ok.sum()
            self.seen.add_(arrived)
            self.skipped.add_(len(ok) - arrived)
            last = ok.cumsum(0).argmax()  # the first place where all have arrived: the last arrival of all
            latest = estimates.index_select(0, last.reshape(1)).squeeze(0)
            self.estimate.copy_(torch.where((arrived > 0) & latest.isfinite().all(), latest, self.estimate))
        return estimates

    def _observe(self, state: State, s: Tensor, ok: Tensor | None) -> tuple[State, Tensor]:
        # A rule's products are statistics: where autocast makes products narrow, not these.
        if not torch.is_autocast_enabled(s.device.type):
            return self.rule.observe(state, s, ok)
        with torch.autocast(s.device.type, enabled=False):
            return self.rule.observe(state, s, ok)

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
        self._known = False

    reset_parameters = clear

    @property
    def known(self) -> bool:
        """Whether there is an estimate. The device is asked until there is one, and not again."""
        self._known = self._known or bool(self.seen)
        return self._known

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "estimate")
        if not self.shaped and saved is not None and saved.numel():
            self._resize(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known = False
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = _wide(value)


def _wide(value: Tensor) -> Tensor:
    """``value`` in float32 if it is narrower."""
    return value.float() if value.is_floating_point() and value.itemsize < 4 else value


def finite(s: Tensor, ok: Tensor | None = None) -> Tensor | None:
    """Which of the arrivals ``s (g, ...)`` are finite throughout and not refused by ``ok``, ``(g,)``; None: all.

    Only a CPU is asked whether all are, where the answer costs no synchronization; elsewhere the mask is kept.
    """
    if s.is_cpu and ok is None and math.isfinite(s.sum().item()):
        return None
    mine = (s * 0).flatten(1).sum(1) == 0
    mine = mine if ok is None else mine & ok
    return None if mine.is_cpu and bool(mine.all()) else mine
