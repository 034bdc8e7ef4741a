"""Rules whose memory is counted in samples. Imports the rule.

F weights memory and new data by the number of samples behind each; G passes on the residual of a regression of the
gradient over the stream.

Legend: ``m`` samples in an arrival; ``g`` arrivals in order along the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from streamnorm.checks import expect_finite, expect_whole
from streamnorm.stream.rule import (
    CHUNK,
    GradientRule,
    Rule,
    State,
    affine_scan,
    column,
    counted,
    in_chunks,
    taken_in,
)


@dataclass(frozen=True)
class Pooled(Rule):
    """F by evidence: the mean of memory and new data, each weighted by its number of samples.

    ::

        arrival        short <- mean over the N samples since the last weight update
        estimate       (M long + N short) / (M + N)
        weight update  long <- that estimate, short <- empty,  M <- min(M + N, max(memory, updates N))

    So the estimate is the mean of all samples until ``memory`` of them have passed, never biased towards the first.
    With one sample per update it is a running average over ``memory`` samples; with many, over ``updates`` updates.

    The sigma of one sample is 0, and that of the first few too small. So the row of sigma starts from a prior that
    counts as ``prior`` samples: the deviation of all features of the first arrival about their common mean, which is
    what layer normalization divides by.

    Args:
        memory: length of the memory, in samples.
        prior: samples that the prior of sigma counts as while fewer than ``memory`` are held; 0: no prior.
        updates: weight updates that are remembered if they hold more samples than ``memory``; 0: none.
        samples: m, of an arrival.

    >>> from streamnorm.stream import Memory
    >>> memory = Memory(Pooled(memory=3, prior=0, updates=0), (2, 1))
    >>> for s in (1.0, 2.0, 3.0, 4.0, 9.0):
    ...     estimate = memory.observe(torch.tensor([[[s], [1.0]]]))
    ...     memory.fold()
    ...     print(round(estimate[0, 0].item(), 4))
    1.0
    1.5
    2.0
    2.5
    4.125
    """

    collects = "short", "count"
    weighs_by = "count"
    memory: float = 100.0
    prior: float = 10.0
    updates: float = 4.0
    samples: int = 1

    def __post_init__(self) -> None:
        expect_finite("memory", self.memory, above=True)
        expect_finite("prior", self.prior)
        expect_finite("updates", self.updates)
        expect_whole("samples", self.samples)

    def weighing(self, samples: int) -> Self:
        return self if samples == self.samples else replace(self, samples=samples)

    def empty(self, shape: Sequence[int]) -> State:
        counter = torch.zeros((), dtype=torch.int64)
        return {
            "long": torch.zeros(*shape),
            "short": torch.zeros(*shape),
            "count": counter,
            "held": counter.clone(),
        }

    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, s.unsqueeze(0))
        return new, estimate[0]

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        g = len(s)
        if g > CHUNK:
            return in_chunks(self, state, s, ok)
        old = state["short"].to(s.dtype)
        arrived = torch.ones(g, dtype=torch.bool, device=s.device) if ok is None else ok
        # short_j = short + sum_{i<=j} (s_i - short) m / N_j, the exact mean of all arrivals, as one product.
        counts = state["count"] + self.samples * counted(arrived)
        share = ((self.samples * arrived).to(s.dtype) / counts.clamp_min(1).unsqueeze(1)).tril()
        surplus = s - old if ok is None else torch.where(column(ok, s), s - old, 0)
        short = taken_in(old, share, surplus)
        long = self._begun(state, s, arrived)
        weight = self._weight(state, counts, s)
        estimate = torch.lerp(short, long.to(s.dtype).expand_as(short), weight)
        new = {**state, "long": long, "short": short[-1], "count": counts[-1]}
        known = column((counts + state["held"]) > 0, s)
        return new, estimate if ok is None else torch.where(known, estimate, s)

    def _weight(self, state: State, counts: Tensor, like: Tensor) -> Tensor:
        """The share of long in the estimate once short holds ``counts (g,)`` samples, ``(g, rows, 1 ...)``."""
        rows = like.shape[1]
        prior = torch.tensor([0.0, self.prior][:rows], device=like.device, dtype=like.dtype)
        held = torch.maximum((state["held"] + prior).clamp_max(self.memory), state["held"].to(like.dtype))
        weight = held / (held + counts.unsqueeze(1)).clamp_min(torch.finfo(like.dtype).tiny)
        return weight.reshape(len(counts), rows, *[1] * (like.ndim - 2))

    def _begun(self, state: State, s: Tensor, arrived: Tensor) -> Tensor:
        """long, which the very first arrival initializes with its prior."""
        long = state["long"]
        if not self.prior or len(long) < 2:
            return long
        first = s[0] if len(s) == 1 else s.index_select(0, arrived.int().argmax().reshape(1)).squeeze(0)
        begins = (state["count"] == 0) & (state["held"] == 0) & arrived.any()
        return torch.where(begins, self._prior_of(first), long)

    def _prior_of(self, s: Tensor) -> Tensor:
        """What long begins with, from statistics ``s (2, ...)``: the mean, and the deviation of all features."""
        mu, sigma = s
        # Relative to the largest value, so that squares and their sums do not overflow.
        unit = torch.maximum(mu.abs().amax(), sigma.abs().amax()).clamp_min(torch.finfo(s.dtype).tiny)
        mu_u, sigma_u = mu / unit, sigma / unit
        wide = unit * ((mu_u - mu_u.mean()).square() + sigma_u.square()).mean().sqrt()
        return torch.stack([mu, wide.expand_as(sigma)])

    def settled(self, state: State) -> Tensor:
        """``(M long + N short) / (M + N)``."""
        short = state["short"]
        weight = self._weight(state, state["count"].reshape(1), short.unsqueeze(0)).squeeze(0).to(short.dtype)
        return torch.lerp(short, state["long"], weight)

    def collected(self, state: State) -> State:
        """In the first update the prior is that of all processes: of what they have seen until then."""
        if not self.prior:
            return state
        begins = (state["count"] > 0) & (state["held"] == 0)
        return {**state, "long": torch.where(begins, self._prior_of(state["short"]), state["long"])}

    def fold(self, state: State) -> State:
        short, count, held = state["short"], state["count"], state["held"]
        folds = count > 0
        return {
            "long": torch.where(folds, self.settled(state), state["long"]),
            "short": torch.zeros_like(short),
            "count": torch.zeros_like(count),
            "held": torch.where(folds, self._limited(held, count), held),
        }

    def _limited(self, held: Tensor, count: Tensor) -> Tensor:
        """M after a weight update, in whole samples."""
        most = (self.updates * count.double()).clamp_min(self.memory)
        return torch.minimum((held + count).double(), most).to(held.dtype)

    def merge(self, states: Sequence[State]) -> State:
        """Short terms weighted by their samples, long terms by the samples they stand for. If none stands for any: the
        prior of the first state that has one."""

        def mean(name: str, weight: str) -> Tensor:
            total = sum(state[weight] for state in states)
            weighted = sum(state[name] * state[weight].to(state[name].dtype) for state in states)
            return torch.as_tensor(weighted / torch.as_tensor(total).clamp_min(1))

        held = torch.stack([state["held"] for state in states]).amax(0)
        prior = states[-1]["long"]
        for state in reversed(states[:-1]):
            prior = torch.where(state["count"] > 0, state["long"], prior)
        return {
            "long": torch.where(held > 0, mean("long", "held"), prior),
            "short": mean("short", "count"),
            "count": torch.stack([state["count"] for state in states]).sum(0),
            "held": held,
        }

    def migrated(self, saved: State) -> State:
        """A state of ``LongShort`` counts as a full memory."""
        if "updates" not in saved:
            return saved
        updates = saved.pop("updates")
        return {**saved, "held": torch.where(updates > 0, int(self.memory), 0)}


@dataclass(frozen=True)
class Residual(GradientRule):
    """G as a regression over the stream: the gradient's residual is passed on.

    Batch normalization passes on ``dy - v - u y``, the residual of the regression of dy on 1 and y over the mini-batch.
    Here the regression is over the stream, its prior the coefficients so far, counted as M samples::

        (M I + m A) theta <- M theta + m b              theta = (v, u), M = min(samples before + 1, memory)
        A = [[1, mean y], [mean y, mean y^2]]           b = (sum of dy, sum of dy y)
        g_hat = -(v, u sigma / sigma_hat) / sigma_hat

    It follows from s, s_hat and g: ``mean y = (mu - mu_hat) / sigma_hat``, ``b = -sigma_hat g``, and ``mean y^2 =
    (sigma / sigma_hat)^2``, at least the square of the mean, which is exact for p = 2 about mu_hat (Setting B).

    With many samples in a call this is the gradient of batch normalization. With one it is feedback: theta changes
    by ``1 / M`` of what is passed on, so that its mean and its correlation with y cannot accumulate in the weights,
    whatever the learning rates. It is stable for any size of y: the divisor is ``M I + m A``.

    Args:
        memory: length of the memory, in samples.
        samples: m, of an arrival.

    >>> rule = Residual(memory=20)
    >>> g, s, s_hat = torch.tensor([[-1.0], [0.0]]), torch.tensor([[0.5], [1.0]]), torch.tensor([[0.0], [1.0]])
    >>> state, g_hat = rule.step(rule.empty((2, 1)), g, s, s_hat)
    >>> g_hat[0]  # -v, of (I + A) (v, u) = b with A = [[1, 0.5], [0.5, 1]] and b = (1, 0)
    tensor([-0.5333])
    """

    collects = "theta", "held"
    weighs_by = "held"
    memory: float = 20.0
    samples: int = 1

    def __post_init__(self) -> None:
        expect_finite("memory", self.memory, above=True)
        expect_whole("samples", self.samples)

    def weighing(self, samples: int) -> Self:
        return self if samples == self.samples else replace(self, samples=samples)

    def empty(self, shape: Sequence[int]) -> State:
        return {"theta": torch.zeros(*shape), "held": torch.zeros((), dtype=torch.int64)}

    def step(self, state: State, g: Tensor, s: Tensor, s_hat: Tensor) -> tuple[State, Tensor]:
        new, estimate = self.observe(state, g.unsqueeze(0), s.unsqueeze(0), s_hat.unsqueeze(0))
        return new, estimate[0]

    def observe(
        self, state: State, g: Tensor, s: Tensor, s_hat: Tensor, ok: Tensor | None = None
    ) -> tuple[State, Tensor]:
        m = self.samples
        arrived = torch.ones(len(g), dtype=torch.bool, device=g.device) if ok is None else ok
        before = state["held"] + m * (counted(arrived) - arrived.long())
        M = column((before + 1).to(g.dtype).clamp_max(self.memory), g[:, 0])
        (mu, sigma), (mu_hat, sigma_hat) = s.to(g.dtype).unbind(1), s_hat.to(g.dtype).unbind(1)
        mean, scale = (mu - mu_hat) / sigma_hat, sigma / sigma_hat
        b_v, b_u = (-g * sigma_hat.unsqueeze(1)).unbind(1)
        # theta <- P theta + q with P = M D^-1, q = m D^-1 b, D = M I + m A; D times r^2: squares do not overflow
        r = torch.maximum(scale.abs(), mean.abs()).clamp_min(1).reciprocal()
        by_r, one = mean * r, r.square()
        square = torch.maximum((scale * r).square(), by_r.square())
        d_v, d_u, off = (M + m) * one, M * one + m * square, m * by_r * r
        det = M * (d_v + m * square) + m**2 * (square - by_r.square())  # no difference of large products
        P = (M / det) * torch.stack([d_u, -off, -off, d_v])
        q = (m / det) * torch.stack([d_u * b_v - off * b_u, d_v * b_u - off * b_v])
        if ok is not None:
            stays = torch.tensor([1.0, 0.0, 0.0, 1.0], device=g.device, dtype=g.dtype)
            P = torch.where(column(ok, mean), P, stays.reshape(4, *[1] * mean.ndim))
            q = torch.where(column(ok, mean), q, 0)
        theta = affine_scan(P, q, state["theta"].to(g.dtype))
        estimate = -torch.stack([theta[0], theta[1] * scale], 1) / sigma_hat.unsqueeze(1)
        return {"theta": theta[:, -1], "held": state["held"] + m * arrived.sum()}, estimate

    def merge(self, states: Sequence[State]) -> State:
        """The mean of the coefficients, weighted by samples."""
        held = torch.stack([state["held"] for state in states])
        theta = torch.stack([state["theta"] for state in states])
        weight = (held.to(theta.dtype) / held.sum().clamp_min(1)).reshape(-1, *[1] * (theta.ndim - 1))
        return {"theta": (theta * weight).sum(0), "held": held.amax()}

    def migrated(self, saved: State) -> State:
        """An average of gradients holds no coefficients: the regression starts over."""
        if "long" not in saved:
            return saved
        counter = torch.zeros((), dtype=torch.int64)
        return {"theta": torch.zeros_like(saved["long"]), "held": counter}
