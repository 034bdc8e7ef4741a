"""Algorithms 1-6 of "Streaming Normalization" (arXiv 1610.06160, sections 3 to 3.4) in plain loops and float64.

This is the oracle: every fast kernel is compared with it, so it is written to be checked line by line against the
paper, and its speed does not matter. It imports only the standard library, torch for inputs, outputs and the few
numbers of a state, and, from this package, the rules of one more policy. Where the paper is silent, the docstring says
what was decided.

Legend: ``n`` samples, ``c`` features, in equal groups; ``place`` = x, y, z, or none for fully connected input.
``k = (sample, feature, *place)`` names an activation, ``j = (group, *place)`` a statistic (without place where all
places share it). ``s`` and everything of its size is ``(2, groups, *place)``: row 0 mu, row 1 sigma. A block is the
samples that share one s: the mini-batch (``samples="batch"``), or one sample of the m (``samples="one"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from streamnorm.oracle_rules import Pool, Regression

Index = tuple[int, ...]
Activations = dict[Index, float]
MU, SIGMA = 0, 1


@dataclass(frozen=True)
class LongShort:
    """``H = {long, short, counter}``: H1 of section 3.3.1, H2 of section 3.3.2.

    Attributes:
        long: the exponential average of short since the beginning; empty (0) while ``updates`` is 0.
        short: the exact average of the arrivals since the last weight update; empty (0) while ``count`` is 0.
        count: the paper's counter, the arrivals since the last weight update.
        updates: the folds that happened.
    """

    long: Tensor
    short: Tensor
    count: int = 0
    updates: int = 0

    @property
    def knows(self) -> bool:
        return self.count > 0 or self.updates > 0

    def arrive(self, now: Tensor) -> LongShort:
        """``counter <- counter + 1``, ``short <- short + (now - short) / counter``."""
        count = self.count + 1
        return replace(self, short=self.short + (now - self.short) / count, count=count)

    def mix(self, a_long: float, a_short: float) -> Tensor:
        """``a_long long + a_short short``; where one of the two is empty, the other takes its place."""
        long = self.long if self.updates else self.short
        short = self.short if self.count else self.long
        return a_long * long + a_short * short

    def fold(self, k_long: float, k_short: float) -> LongShort:
        """``long <- k_long long + k_short short``, the first time ``long <- short``; short and counter are emptied.

        If nothing arrived since the last weight update, nothing happens.
        """
        if self.count == 0:
            return self
        long = k_long * self.long + k_short * self.short if self.updates else self.short
        return LongShort(long, torch.zeros_like(long), count=0, updates=self.updates + 1)


@dataclass(frozen=True)
class Block:
    """What a block saves for the backward pass: its s = S(x), the center c of sigma, and the s that N used."""

    samples: Sequence[int]
    c: Tensor
    s: Tensor
    used: Tensor


@dataclass(frozen=True)
class Call:
    x: Activations
    shape: Index
    blocks: list[Block]
    finite: bool


class Oracle:
    """A normalization layer: ``y = N(x, s)``, ``s = S(R)`` with the reference R = features x place x samples.

    Args:
        features, place, samples: the reference (Figure 1 C, D). An int is a number of groups of features; "local" is
            a window of ``window`` positions along every axis around the place, without positions outside the map.
        p, center, eps: ``sigma = (mean |x - c|^p + eps^(p/2))^(1/p)``, c being the mu of the same statistic ("batch",
            Setting A), the running estimate mu-hat ("estimate", Setting B) or 0 ("zero", Setting C).
        subtract_mean: ``N(x, s) = (x - mu) / sigma``, or ``x / sigma`` where it is False.
        policy: Sample, General Batch or Streaming Normalization (sections 3.1, 3.2, 3.3); or "evidence", streaming with
            the F and G of ``oracle_rules``.
        alpha, beta, kappa: the paper's, in its order; kappa is (alpha1, alpha2, alpha1, alpha2) unless given.
        rate: weight of the newest s in the running estimate of policy "batch".
        memory: the most samples that statistics count as in policy "evidence"; their gradients a fifth of it.

    Attributes:
        H1, H2: the memories of s and of dE/ds-hat; none in policy "sample". Policy "batch" has its running estimate in
            ``H1.long``, counts its calls in ``H1.updates``, and has no H2.
        estimate: the last s-hat, for testing; None before there is one.
        skipped: the number of forward calls that changed nothing because their s was not finite.
    """

    def __init__(
        self,
        *,
        features: Literal["own", "all"] | int = "own",
        place: Literal["all", "local", "here"] = "all",
        samples: Literal["batch", "one"] = "batch",
        window: int = 5,
        p: float = 2.0,
        center: Literal["batch", "estimate", "zero"] = "batch",
        eps: float = 1e-5,
        subtract_mean: bool = True,
        policy: Literal["sample", "batch", "streaming", "evidence"] = "streaming",
        alpha: tuple[float, float] = (0.7, 0.3),
        beta: tuple[float, float, float] = (0.7, 0.3, 0.0),
        kappa: tuple[float, float, float, float] | None = None,
        rate: float = 0.1,
        memory: float = 100.0,
    ) -> None:
        if place not in ("all", "local", "here") or samples not in ("batch", "one") or window < 1 or window % 2 == 0:
            raise ValueError(f"no reference: place={place!r}, samples={samples!r}, window={window!r} (an odd number)")
        if center not in ("batch", "estimate", "zero") or p < 1 or eps < 0:
            raise ValueError(f"no statistics: center={center!r}, p={p!r} (>= 1), eps={eps!r} (>= 0)")
        if (policy, center) == ("sample", "estimate") or (policy, samples) == ("batch", "one"):
            raise ValueError(f"policy={policy!r} does not go with center={center!r} and samples={samples!r}")
        if policy not in ("sample", "batch", "streaming", "evidence"):
            raise ValueError(f'policy is "sample", "batch", "streaming" or "evidence", got {policy!r}')
        self.features: Literal["own", "all"] | int = features
        self.place, self.samples, self.reach = place, samples, window // 2
        self.p, self.center, self.eps, self.subtract_mean = p, center, eps, subtract_mean
        self.policy, self.alpha, self.beta, self.kappa = policy, alpha, beta, kappa or (*alpha, *alpha)
        if policy == "batch":  # a stream that folds at every call and uses long only
            self.alpha, self.kappa = (1.0, 0.0), (1 - rate, rate, 0.0, 0.0)
        self.streams, self.memory = policy in ("streaming", "evidence"), memory
        self._empty((2, 0))
        self.estimate: Tensor | None = None
        self.skipped = 0
        self._calls: list[Call] = []

    def forward(self, x: Tensor) -> Tensor:
        """Training, ``x (n, c, *place) -> y (n, c, *place)``.

        Algorithm 1: ``s = S(x)``, ``y = N(x, s)``. Algorithm 3: also ``s-hat = F(s-hat, s)``, for testing.
        Algorithm 5: ``s = S(x)``, ``{H1, s-hat} = F(H1, s)``, ``y = N(x, s-hat)``, s being averaged over the blocks.
        """
        values, shape = read(x), tuple(x.shape)
        self._fit(shape)
        blocks, finite = self.S(values, shape), True
        if self.policy != "sample":
            s = mean_of([block.s for block in blocks])
            finite = is_finite(s)
            H1, s_hat = self.F(self.H1, s, shape[0])
            if finite:
                self.H1, self.estimate = H1, s_hat
            else:
                self.skipped += 1
            if self.streams:
                blocks = [replace(block, used=s_hat) for block in blocks]
        self._calls.append(Call(values, shape, blocks, finite))
        return write(self.N(values, shape, blocks), shape)

    def backward(self, dy: Tensor) -> Tensor:
        """``dE/dy -> dE/dx`` for the latest forward call without a backward pass so far, with the s it used.

        Algorithms 2 and 4: the chain rule. Algorithm 6: ``g = dE/ds-hat`` by the chain rule, summed over the blocks,
        as they share s-hat; ``{H2, g-hat} = G(H2, g)``; from there on g-hat replaces g, 1/m of it for each of m
        blocks, as s is their average, without a factor for the share of s in s-hat. H2 only takes in calls that H1 took
        in.
        """
        if not self._calls or tuple(dy.shape) != self._calls[-1].shape:
            raise ValueError(f"no forward call waits for a gradient of shape {tuple(dy.shape)}")
        call = self._calls.pop()
        dx, g = self.N_backward(read(dy), call)
        if self.streams:
            g_sum = torch.stack(g).sum(0)
            H2, g_hat = self.G(self.H2, g_sum, call)
            if call.finite:
                self.H2 = H2
            g = [g_hat / len(g)] * len(g)
        self.S_backward(g, call, dx)
        return write(dx, call.shape)

    def update(self) -> None:
        """The weights were updated: kappa1, kappa2 fold H1 (section 3.3.1), kappa3, kappa4 fold H2 (3.3.2)."""
        if self.streams:
            self.H1 = self.H1.fold() if isinstance(self.H1, Pool) else self.H1.fold(*self.kappa[:2])
            self.H2 = self.H2.fold() if isinstance(self.H2, Regression) else self.H2.fold(*self.kappa[2:])

    def evaluate(self, x: Tensor) -> Tensor:
        """Testing: ``y = N(x, s-hat)`` with the last s-hat of training (Algorithms 3, 5), or as in training (1)."""
        values, shape = read(x), tuple(x.shape)
        if self.policy == "sample":
            return write(self.N(values, shape, self.S(values, shape)), shape)
        if self.estimate is None:
            raise RuntimeError("no estimate of the statistics yet: call forward() before evaluate()")
        self._fit(shape)
        s_hat = self.estimate
        return write(self.N(values, shape, [Block(range(shape[0]), s_hat[MU], s_hat, used=s_hat)]), shape)

    def F(self, H1: LongShort | Pool, s: Tensor, samples: int) -> tuple[LongShort | Pool, Tensor]:
        """Algorithm 5: H1 takes in s, then ``s-hat = alpha1 long + alpha2 short`` (Algorithm 3: the running mean).

        An s that is not finite is not taken in: s-hat is then H1's previous estimate, or s itself if H1 is empty.
        """
        if isinstance(H1, Pool):
            H1 = H1.arrive(s, samples) if is_finite(s) else H1
            return H1, H1.estimate() if H1.knows else s
        if is_finite(s):
            H1 = H1.arrive(s)
            H1 = H1.fold(*self.kappa[:2]) if self.policy == "batch" else H1
        known = H1 if H1.knows else H1.arrive(s)
        return H1, known.mix(*self.alpha)

    def G(self, H2: LongShort | Regression, g: Tensor, call: Call) -> tuple[LongShort | Regression, Tensor]:
        """Algorithm 6: H2 takes in g, unless it is not finite, then ``g-hat = beta1 long + beta2 short + beta3 g``.

        With beta3 = 0, g is left out: 0 * NaN is NaN.
        """
        if isinstance(H2, Regression):
            s, s_hat = mean_of([block.s for block in call.blocks]), call.blocks[0].used
            learned = call.finite and is_finite(g)
            H2 = H2.arrive(g, s, s_hat, call.shape[0]) if learned else H2
            return H2, H2.estimate(s, s_hat)
        b_long, b_short, b_now = self.beta
        if is_finite(g):
            H2 = H2.arrive(g)
        known = H2 if H2.knows else H2.arrive(g)
        return H2, known.mix(b_long, b_short) + (b_now * g if b_now else 0.0)

    # Figure 1: the references

    def shape_of_s(self, shape: Index) -> Index:
        groups = shape[1] if self.features == "own" else 1 if self.features == "all" else self.features
        if shape[1] % groups:
            raise ValueError(f"{shape[1]} features do not divide into {groups} groups")
        return (2, groups, *(() if self.place == "all" else shape[2:]))

    def statistics(self, shape: Index) -> list[Index]:
        """Every j."""
        return indices(self.shape_of_s(shape)[1:])

    def reference(self, j: Index, shape: Index, samples: Sequence[int]) -> list[Index]:
        """R_j: the activations k in these samples that statistic j is taken from."""
        return self._around(j, shape, samples, self.reach if self.place == "local" else 0)

    def normalized(self, j: Index, shape: Index, samples: Sequence[int]) -> list[Index]:
        """The activations k in these samples that statistic j normalizes; each k has one j."""
        return self._around(j, shape, samples, 0)

    def _around(self, j: Index, shape: Index, samples: Sequence[int], reach: int) -> list[Index]:
        group, *middle = j
        size = shape[1] // self.shape_of_s(shape)[1]
        place = [range(length) for length in shape[2:]]
        if self.place != "all":
            place = [axis[max(0, at - reach) : at + reach + 1] for axis, at in zip(place, middle, strict=True)]
        return list(product(samples, range(group * size, (group + 1) * size), *place))

    # Section 3.4: the statistics s = S(x)

    def S(self, x: Activations, shape: Index) -> list[Block]:
        """``s = {mu, sigma}`` of every block.

        Setting B: mu goes to the stream first, so mu-hat includes this call; then sigma about it, in every block.
        """
        everyone = range(shape[0])
        blocks = [everyone] if self.samples == "batch" else [everyone[i : i + 1] for i in everyone]
        mu = [self.mean(x, shape, samples) for samples in blocks]
        c = mu if self.center == "batch" else [torch.zeros_like(m) for m in mu]
        if self.center == "estimate":
            # The rows of a state are independent: F's mu-hat does not depend on the row of sigma.
            _, s_hat = self.F(self.H1, mean_of([torch.stack((m, m)) for m in mu]), shape[0])
            c = [s_hat[MU]] * len(mu)
        s = [torch.stack((m, self.sigma(x, shape, b, c_b))) for m, b, c_b in zip(mu, blocks, c, strict=True)]
        return [Block(*fields, used=fields[-1]) for fields in zip(blocks, c, s, strict=True)]

    def mean(self, x: Activations, shape: Index, samples: Sequence[int]) -> Tensor:
        """``mu_j = (1/N) sum x_k`` over the N activations k of R_j."""
        mu = zeros(self.shape_of_s(shape)[1:])
        for j in self.statistics(shape):
            R = self.reference(j, shape, samples)
            mu[j] = sum(x[k] for k in R) / len(R)
        return mu

    def sigma(self, x: Activations, shape: Index, samples: Sequence[int], c: Tensor) -> Tensor:
        """``sigma_j = ((1/N) sum |x_k - c_j|^p + eps^(p/2))^(1/p)`` over the N activations k of R_j (equation 2)."""
        sigma = zeros(self.shape_of_s(shape)[1:])
        for j in self.statistics(shape):
            c_j, floor = float(c[j]), math.sqrt(self.eps)
            distance = [abs(x[k] - c_j) for k in self.reference(j, shape, samples)]
            # Powers of very large or small numbers overflow or vanish; those of their ratios to the largest do not.
            unit = max(*distance, floor)
            moment = sum((d / unit) ** self.p for d in distance) / len(distance)
            of_finite = unit * (moment + (floor / unit) ** self.p) ** (1 / self.p)
            sigma[j] = math.inf if math.isinf(unit) else of_finite
        return sigma

    def S_backward(self, g: list[Tensor], call: Call, dx: Activations) -> None:
        """``dx <- dx + (dS/dx)^T g`` for every block.

        ``dmu_j/dx_k = 1/N``, ``dsigma_j/dx_k = sign(d_k) (|d_k| / sigma_j)^(p-1) / N`` with ``d_k = x_k - c_j``, 0 at
        ``d_k = 0``. The center is a constant in Settings B, C; in A it is mu, and sigma also depends on x through
        it: ``dsigma_j/dmu_j = -sum_k`` of the same.
        """
        for block, g_block in zip(call.blocks, g, strict=True):
            for j in self.statistics(call.shape):
                R = self.reference(j, call.shape, block.samples)
                c, sigma, g_mu, g_sigma = (float(t[j]) for t in (block.c, block.s[SIGMA], g_block[MU], g_block[SIGMA]))
                d = [call.x[k] - c for k in R]
                slope = [math.copysign((abs(d_k) / sigma) ** (self.p - 1), d_k) if d_k else 0.0 for d_k in d]
                if self.center == "batch":
                    g_mu -= g_sigma * sum(slope) / len(R)
                for k, slope_k in zip(R, slope, strict=True):
                    dx[k] += (g_mu + g_sigma * slope_k) / len(R)

    # Section 3: the operation y = N(x, s)

    def N(self, x: Activations, shape: Index, blocks: list[Block]) -> Activations:
        """``y_k = (x_k - mu_j) / sigma_j`` for every k that j normalizes."""
        y: Activations = {}
        for block, j in product(blocks, self.statistics(shape)):
            mu, sigma = self._mu(block.used, j), float(block.used[SIGMA][j])
            for k in self.normalized(j, shape, block.samples):
                y[k] = (x[k] - mu) / sigma
        return y

    def N_backward(self, dy: Activations, call: Call) -> tuple[Activations, list[Tensor]]:
        """``dx = (dN/dx)^T dE/dy`` and, for every block, g = dE/ds of the s that N used, over the k that j normalizes.

        ``dx_k = dy_k / sigma_j``, ``g_mu_j = -sum dy_k / sigma_j``, ``g_sigma_j = -sum dy_k (x_k - mu_j) / sigma_j^2``.
        """
        dx: Activations = {}
        g = [torch.zeros_like(block.used) for block in call.blocks]
        for (block, g_block), j in product(zip(call.blocks, g, strict=True), self.statistics(call.shape)):
            mu, sigma = self._mu(block.used, j), float(block.used[SIGMA][j])
            users = self.normalized(j, call.shape, block.samples)
            for k in users:
                dx[k] = dy[k] / sigma
            g_block[MU][j] = -sum(dx[k] for k in users) if self.subtract_mean else 0.0
            g_block[SIGMA][j] = -sum(dx[k] * ((call.x[k] - mu) / sigma) for k in users)
        return dx, g

    def _mu(self, s: Tensor, j: Index) -> float:
        return float(s[MU][j]) if self.subtract_mean else 0.0

    def _fit(self, shape: Index) -> None:
        shape_of_s = self.shape_of_s(shape)
        if not self.H1.knows:
            self._empty(shape_of_s)
        if tuple(self.H1.long.shape) != shape_of_s:
            raise ValueError(f"an input of shape {shape} does not fit statistics of {tuple(self.H1.long.shape)}")

    def _empty(self, shape_of_s: Index) -> None:
        long, short, theta = zeros(shape_of_s), zeros(shape_of_s), zeros(shape_of_s)
        self.H1: LongShort | Pool = LongShort(long, short)
        self.H2: LongShort | Regression = LongShort(long, short)
        if self.policy == "evidence":
            self.H1, self.H2 = Pool(self.memory, long, short), Regression(self.memory / 5, theta)


def indices(shape: Sequence[int]) -> list[Index]:
    return list(product(*map(range, shape)))


def read(x: Tensor) -> Activations:
    return dict(zip(indices(x.shape), x.detach().flatten().tolist(), strict=True))


def write(values: Activations, shape: Index) -> Tensor:
    return torch.tensor([values[k] for k in indices(shape)], dtype=torch.float64).reshape(shape)


def zeros(shape: Index) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def mean_of(s: list[Tensor]) -> Tensor:
    return torch.stack(s).mean(0)


def is_finite(s: Tensor) -> bool:
    return bool(torch.isfinite(s).all())
