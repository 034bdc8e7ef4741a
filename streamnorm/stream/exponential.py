"""A plain running average (Algorithm 3's F). Imports the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamnorm.stream.rule import CHUNK, Rule, State, column, in_chunks, taken_in


@dataclass(frozen=True)
class Exponential(Rule):
    """A running average that starts from its first value: ``long <- (1 - rate) long + rate s`` (Algorithm 3's F).

    Weight updates have no effect.

    >>> from streamnorm.stream import Memory
    >>> memory = Memory(Exponential(0.5), (1,))
    >>> [round(memory.observe(torch.tensor([[s]])).item(), 2) for s in (4.0, 2.0, 1.0)]
    [4.0, 3.0, 2.0]
    """

    collects = "long", "count"
    weighs_by = "count"
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

    def settled(self, state: State) -> Tensor:
        return state["long"]

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        if len(s) > CHUNK:
            return in_chunks(self, state, s, ok)
        if len(s) == 1 and ok is None:
            return super().observe(state, s, ok)
        ok = s.new_ones(len(s), dtype=torch.bool) if ok is None else ok
        # long_j = (1-r)^{k_j} long + sum_{i<=j} r (1-r)^{k_j - k_i} s_i with k the number of arrivals so far, and long
        # the very first arrival before it. The weights add up to 1: what differs from long is summed.
        k = ok.cumsum(0)
        first = s.index_select(0, ok.int().argmax().reshape(1)).squeeze(0)
        old = torch.where((state["count"] == 0) & ok.any(), first, state["long"].to(s.dtype))
        decay = (1 - self.rate) ** (k[:, None] - k[None, :]).clamp_min(0).to(s.dtype)
        weight = self.rate * (ok * decay.tril())
        long = taken_in(old, weight, torch.where(column(ok, s), s - old, 0))
        count = state["count"] + k
        return {"long": long[-1], "count": count[-1]}, torch.where(column(count > 0, s), long, s)
