"""The paper's rule: long over weight updates, short since the last one (sections 3.3.1 and 3.3.2). Imports the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamnorm.stream.rule import CHUNK, Rule, State, column, counted, in_chunks, mixed, taken_in
from streamnorm.tracing import is_readable


@dataclass(frozen=True)
class LongShort(Rule):
    """The paper's H = {long, short, counter} with its F, or G (sections 3.3.1, 3.3.2).

    ::

        arrival        short <- exact mean of all s since the last weight update, count <- count + 1
        estimate       mix_1 long + mix_2 short + mix_3 s
        weight update  long <- keep_1 long + keep_2 short, short <- empty, count <- 0

    If one of long and short is empty, the other stands in for it; the first weight update copies short to long.
    F is ``LongShort(mix=(alpha1, alpha2, 0), keep=(kappa1, kappa2))``; G is ``LongShort(mix=beta, keep=(kappa3,
    kappa4))``.

    >>> from streamnorm.stream import Memory
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

    collects = "short", "count"
    weighs_by = "count"
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
            return in_chunks(self, state, s, ok)
        if ok is None and g > 1 and is_readable(s):
            # Counters on a CPU are read at no cost, and cycles start alike: the weights are cached.
            share, total, to_short = _weights(self.mix, int(state["count"]), min(int(state["updates"]), 1), g, s.dtype)
        else:
            share, total, to_short = self.weights(state["count"], state["updates"], ok, g, s.dtype)
        # short_j = short + sum_{i<=j} (s_i - short) / (count + j), the exact mean of all arrivals, as one product.
        old = state["short"].to(s.dtype)
        surplus = s - old if ok is None else torch.where(column(ok, s), s - old, 0)
        short = taken_in(old, share, surplus)
        estimate = mixed(state["long"], short, column(total, s), column(to_short, s))
        if self.mix[2]:
            estimate = torch.add(estimate, s, alpha=self.mix[2])
        arrived = g if ok is None else ok.sum()
        new = {**state, "short": short[-1], "count": state["count"] + arrived}
        if ok is None:
            return new, estimate
        known = (state["updates"] > 0) | (state["count"] + counted(ok) > 0)
        return new, torch.where(column(known, s), estimate, sum(self.mix) * s)

    def weights(
        self, count: Tensor, updates: Tensor, ok: Tensor | None, g: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of g arrivals: the triangle ``(g, g)`` that turns them into short, and the shares of long and
        short together and of short in the estimate at each, ``(g,)`` or ``(1,)``. If one of long and short is empty,
        the other stands in for it."""
        counts = count + (torch.arange(1, g + 1, device=count.device) if ok is None else counted(ok))
        share = counts.clamp_min(1).to(dtype).reciprocal().unsqueeze(1).expand(g, g).tril()
        has_long = (updates > 0).to(dtype).reshape(1)
        both = self.mix[0] + self.mix[1]
        to_short = self.mix[1] + self.mix[0] * (1 - has_long)
        if ok is None:
            return share, torch.full_like(has_long, both), to_short
        has_short = (counts > 0).to(dtype)
        return share * ok, both * torch.maximum(has_long, has_short), has_short * to_short

    def fold(self, state: State) -> State:
        short, count, updates = state["short"], state["count"], state["updates"]
        kept = mixed(state["long"], short, self.keep[0] + self.keep[1], self.keep[1])
        return {
            "long": torch.where(count > 0, torch.where(updates > 0, kept, short), state["long"]),
            "short": torch.zeros_like(short),
            "count": torch.zeros_like(count),
            "updates": updates + (count > 0).to(updates.dtype),
        }

    def settled(self, state: State) -> Tensor:
        """``mix_1 long + mix_2 short``, and short in the place of s."""
        has_long, has_short = state["updates"] > 0, state["count"] > 0
        long = torch.where(has_long, state["long"], state["short"])
        short = torch.where(has_short, state["short"], long)
        return self.mix[0] * long + (self.mix[1] + self.mix[2]) * short

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
