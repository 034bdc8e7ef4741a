"""F and G of policy "evidence", for the oracle: memories counted in samples, in plain loops and float64.

Like the oracle it imports nothing of this package. ``s``, ``s_hat`` and g are ``(2, *slots)``: row 0 belongs to mu,
row 1 to sigma. An arrival of m samples counts as m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MU, SIGMA = 0, 1
PRIOR = (0, 10)
"""Samples that the prior counts as in the row of mu, and in that of sigma."""
UPDATES = 4


@dataclass(frozen=True)
class Pool:
    """``H = {long, short, counters}`` of F: everything is weighted by the samples that it stands for.

    Attributes:
        memory: the most samples that long counts as, unless ``UPDATES`` updates like the last one hold more.
        long: up to the last weight update, initially the prior: in the row of sigma the deviation of all features of
            the first arrival about their common mean; in that of mu its own mu, with weight 0.
        short: the exact average of the samples since the last weight update.
        count: the number of these samples.
        held: M, the samples that long counts as.
    """

    memory: float
    long: Tensor
    short: Tensor
    count: int = 0
    held: int = 0

    @property
    def knows(self) -> bool:
        return self.count + self.held > 0

    def arrive(self, now: Tensor, samples: int) -> Pool:
        count = self.count + samples
        short = (self.count * self.short + samples * now) / count
        return replace(self, long=self.long if self.knows else prior(now), short=short, count=count)

    def estimate(self) -> Tensor:
        """``(M long + N short) / (M + N)``: N samples since the last weight update, M for those before it."""
        rows = []
        for row in (MU, SIGMA):
            M, N = max(self.held, min(self.held + PRIOR[row], self.memory)), self.count
            rows.append((M * self.long[row] + N * self.short[row]) / (M + N))
        return torch.stack(rows)

    def fold(self) -> Pool:
        """``long <- estimate``; short is emptied. If nothing arrived since the last weight update, nothing happens."""
        if self.count == 0:
            return self
        held = int(min(self.held + self.count, max(self.memory, UPDATES * self.count)))
        return Pool(self.memory, self.estimate(), torch.zeros_like(self.short), 0, held)


def prior(first: Tensor) -> Tensor:
    """What long is before the first weight update: ``sigma^2 = (1/c) sum_j (mu_j - mean of all mu)^2 + sigma_j^2``."""
    mu, sigma = first[MU].flatten().tolist(), first[SIGMA].flatten().tolist()
    middle = sum(mu) / len(mu)
    square = sum((mu_j - middle) ** 2 + sigma_j**2 for mu_j, sigma_j in zip(mu, sigma, strict=True)) / len(mu)
    return torch.stack((first[MU], torch.full_like(first[SIGMA], math.sqrt(square))))


@dataclass(frozen=True)
class Regression:
    """H of G: the coefficients of the regression of dE/dy on 1 and y over the stream.

    Attributes:
        memory: the most samples that they count as.
        theta: (v, u) of every statistic, times the samples in a call.
        held: the number of samples behind them; they count as one more.
    """

    memory: float
    theta: Tensor
    held: int = 0

    def arrive(self, g: Tensor, s: Tensor, s_hat: Tensor, samples: int) -> Regression:
        """``(M I + m A) theta <- M theta + m b``, for every statistic by itself.

        ``A = [[1, a], [a, q]]`` with ``a = (mu - mu_hat) / sigma_hat``, the mean of y, and
        ``q = (sigma / sigma_hat)^2``, the mean of its square, which is not less than the square of its mean.
        ``b = -sigma_hat g``, the sums of dE/dy and of dE/dy y.
        """
        M, m = min(self.held + 1, self.memory), samples
        theta = self.theta.flatten(1).clone()
        columns = [t.flatten(1).T.tolist() for t in (self.theta, g, s, s_hat)]
        for j, ((v, u), (g_mu, g_sigma), (mu, sigma), (mu_hat, sigma_hat)) in enumerate(zip(*columns, strict=True)):
            a = (mu - mu_hat) / sigma_hat
            q = max((sigma / sigma_hat) ** 2, a**2)
            right_v, right_u = M * v - m * sigma_hat * g_mu, M * u - m * sigma_hat * g_sigma
            # Elimination: subtract factor times the first row from the second, which leaves only u there.
            factor = m * a / (M + m)
            u = (right_u - factor * right_v) / (M + m * q - factor * m * a)
            v = (right_v - m * a * u) / (M + m)
            theta[MU, j], theta[SIGMA, j] = v, u
        return replace(self, theta=theta.reshape(self.theta.shape), held=self.held + m)

    def estimate(self, s: Tensor, s_hat: Tensor) -> Tensor:
        """``g_hat = -(v, u sigma / sigma_hat) / sigma_hat``."""
        v, u = self.theta
        return -torch.stack((v, u * s[SIGMA] / s_hat[SIGMA])) / s_hat[SIGMA]

    def fold(self) -> Regression:
        """No-op: weight updates have no effect."""
        return self
