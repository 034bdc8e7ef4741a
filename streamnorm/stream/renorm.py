"""The rules of Batch Renormalization (Ioffe 2017, arXiv 1702.03275). Imports the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamnorm.checks import expect_finite, expect_whole
from streamnorm.stream.rule import GradientRule, Rule, State


@dataclass(frozen=True)
class Renorm(Rule):
    """F: the mini-batch's own s, moved towards running averages as far as the bounds on r and d allow.

    ::

        y = (x - mu_B) / sigma_B r + d = (x - mu_hat) / sigma_hat
        r = sigma_B / sigma, within 1 / r_max and r_max            sigma_hat = sigma_B / r
        d = (mu_B - mu) / sigma, within -d_max and d_max           mu_hat = mu_B - d sigma_hat
        then (mu, sigma) <- (1 - rate) (mu, sigma) + rate (mu_B, sigma_B)

    The averages start from the first arrival, and testing normalizes with them. For the first ``begin`` weight updates
    r_max is 1 and d_max 0, which is batch normalization; from there both rise linearly.

    Args:
        rate: weight of the newest mini-batch in the averages.
        r_max, d_max: their final values, reached after ``r_end`` and ``d_end`` weight updates.
    """

    collects = "long", "count", "arrived"
    weighs_by = "count"
    rate: float = 0.01
    r_max: float = 3.0
    d_max: float = 5.0
    begin: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    def __post_init__(self) -> None:
        expect_finite("rate", self.rate, above=True)
        expect_finite("d_max", self.d_max)
        for name in ("begin", "r_end", "d_end"):
            expect_whole(name, getattr(self, name), 0)
        expect_finite("r_max", self.r_max)
        if self.rate > 1 or self.r_max < 1:
            raise ValueError(f"rate is at most 1 and r_max at least 1, got rate={self.rate!r} and r_max={self.r_max!r}")

    def empty(self, shape: Sequence[int]) -> State:
        counter = torch.zeros((), dtype=torch.int64)
        return {"long": torch.zeros(*shape), "count": counter, "updates": counter.clone(), "arrived": counter.clone()}

    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        if len(s) < 2:
            raise ValueError('batch renormalization takes its mean with its sigma: use center="batch" (Setting A)')
        (mu_B, sigma_B), old = s, torch.where(state["count"] > 0, state["long"].to(s.dtype), s)
        mu, sigma = old
        r_max = 1 + (self.r_max - 1) * self._risen(state["updates"], self.r_end, s.dtype)
        d_max = self.d_max * self._risen(state["updates"], self.d_end, s.dtype)
        sigma_hat = sigma_B / torch.clamp(sigma_B / sigma, 1 / r_max, r_max)
        mu_hat = mu_B - torch.clamp((mu_B - mu) / sigma, -d_max, d_max) * sigma_hat
        counters = {name: state[name] + 1 for name in ("count", "arrived")}
        return {**state, **counters, "long": torch.lerp(old, s, self.rate)}, torch.stack([mu_hat, sigma_hat])

    def _risen(self, updates: Tensor, end: int, dtype: torch.dtype) -> Tensor:
        """How far a bound has risen, from 0 to 1."""
        if end <= self.begin:
            return (updates >= self.begin).to(dtype)
        return ((updates - self.begin).to(dtype) / (end - self.begin)).clamp(0, 1)

    def fold(self, state: State) -> State:
        happened = (state["arrived"] > 0).to(torch.int64)
        return {**state, "updates": state["updates"] + happened, "arrived": torch.zeros_like(state["arrived"])}

    def settled(self, state: State) -> Tensor:
        return state["long"]

    def for_testing(self, state: State, latest: Tensor) -> Tensor:
        return state["long"]

    def merge(self, states: Sequence[State]) -> State:
        """The averages weighted by their arrivals."""
        count = torch.stack([state["count"] for state in states])
        long = torch.stack([state["long"] for state in states])
        weight = (count.to(long.dtype) / count.sum().clamp_min(1)).reshape(-1, *[1] * (long.ndim - 1))
        counters = {
            name: torch.stack([state[name] for state in states]).amax(0) for name in ("count", "updates", "arrived")
        }
        return {"long": (long * weight).sum(0), **counters}


@dataclass(frozen=True)
class RenormGradient(GradientRule):
    """G: the gradient through ``s_hat = (mu_B - d sigma_B / r, sigma_B / r)`` with r and d held constant.

    ``dE/dmu_B = g_mu``, ``dE/dsigma_B = (g_sigma - d g_mu) / r``. It has no state.
    """

    collects = ()

    def empty(self, shape: Sequence[int]) -> State:
        return {}

    def step(self, state: State, g: Tensor, s: Tensor, s_hat: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, g.unsqueeze(0), s.unsqueeze(0), s_hat.unsqueeze(0))
        return new, estimate[0]

    def observe(
        self, state: State, g: Tensor, s: Tensor, s_hat: Tensor, ok: Tensor | None = None
    ) -> tuple[State, Tensor]:
        (g_mu, g_sigma), (mu, sigma), (mu_hat, sigma_hat) = g.unbind(1), s.unbind(1), s_hat.unbind(1)
        # 1 / r = sigma_hat / sigma, d = (mu - mu_hat) / sigma_hat
        return state, torch.stack([g_mu, (g_sigma * sigma_hat - g_mu * (mu - mu_hat)) / sigma], 1)

    def merge(self, states: Sequence[State]) -> State:
        return {}
