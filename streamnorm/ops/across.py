"""Statistics of the batches of several processes together, and their gradients. Imports the definition.

::

    mu      = sum_r n_r mu_r / N                              N = sum_r n_r activations in a reference
    sigma^p = sum_r n_r sigma_r^p / N                         sigma_r about the center of all
    dE/ds   = sum_r dE_r/ds                                   E = sum_r E_r
    dx      = dy / sigma_hat + (g_mu + slope g_sigma) / N     slope = sign(d) |d / sigma|^(p-1), d = x - center

Every process calls every collective, also one with an empty batch. Sums travel in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.ops import eager, generic


def why_not(d: Definition) -> str | None:
    """Why there are no statistics of several processes together for a definition; None: there are."""
    if d.ref.samples != "batch":
        return f"{d.ref!r} looks at one sample, which no other process has a part of"
    if d.ref.place == "local":
        return "the reference is a window"
    return eager.unsupported(d)


@dataclass
class Across:
    """The processes of one call.

    Attributes:
        group, size: the process group, and how many they are.
        samples: m, of all of them in each step; known after ``mean``.
        count: N, the same.
    """

    group: Any
    size: int
    samples: int = 0
    count: int = 0

    def sum(self, *values: Tensor) -> list[Tensor]:
        """The sums over all processes, in one collective, float64."""
        total = torch.cat([value.double().flatten() for value in values])
        dist.all_reduce(total, group=self.group)
        parts = total.split([value.numel() for value in values])
        return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]

    def mean(self, x: Tensor, d: Definition) -> Tensor:
        """``mu`` of every reference.

        Raises:
            DegenerateReferenceError: in all processes, for Setting A with a single activation.
            ValueError: in all processes, if no process has one.
        """
        mine = d.ref.size(x.shape) if x.numel() else 0
        mu = eager.mean(x, d) if mine else _nothing(x, d)
        sizes = torch.tensor([mine, x.shape[1]], device=x.device)
        total, (count, samples) = self.sum(mine * mu.double(), sizes)
        self.count, self.samples = int(count), int(samples)
        if not self.count:
            raise ValueError("the batches of all processes are empty; skip such an update in all of them")
        d.moment.check_size(d.ref, self.count)
        return (total / self.count).to(mu.dtype)

    def sigma(self, x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
        """``sigma`` of every reference, about ``mu``, the constant ``center``, or 0, as the setting says."""
        p, mine = d.moment.p, d.ref.size(x.shape) if x.numel() else 0
        sigma = generic.sigma(x, d, mu, center) if mine else torch.zeros_like(mu)
        (total,) = self.sum(mine * sigma.double() ** p)
        if total.isfinite().all():
            return ((total / self.count) ** (1 / p)).to(sigma.dtype)
        unit = sigma.double().nan_to_num().amax()  # powers too large for float64: in units of the largest
        dist.all_reduce(unit, dist.ReduceOp.MAX, group=self.group)
        (total,) = self.sum(mine * (sigma.double() / unit) ** p)
        return (unit * (total / self.count) ** (1 / p)).to(sigma.dtype)

    def apply(self, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor, **joined: Tensor) -> Tensor:
        """``y = N(x, s_hat)``."""
        return eager.apply(x, d, mu_hat, sigma_hat, **joined)

    def stat_grads(
        self, dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``dE_r/ds_hat`` of this process."""
        if not x.numel():
            return torch.zeros_like(mu_hat), torch.zeros_like(sigma_hat)
        return eager.stat_grads(dy, x, d, mu_hat, sigma_hat)

    def input_grad(
        self,
        dy: Tensor,
        x: Tensor,
        d: Definition,
        s: Statistics,
        g_mu: Tensor,
        g_sigma: Tensor,
        gain: Tensor | None = None,
    ) -> Tensor:
        """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
        p, setting = d.moment.p, d.moment.center
        center = {"batch": s.mu, "estimate": s.center, "zero": None}[setting]
        deviation = x if center is None else x - center
        slope = deviation.sign() if p == 1 else deviation / s.sigma
        if p not in (1, 2):
            slope = deviation.sign() * slope.abs() ** (p - 1)
        if p != 2 and setting == "batch":
            (total,) = self.sum(slope.sum(d.ref.dims(x.ndim), keepdim=True))
            g_mu = g_mu - g_sigma * (total / self.count).to(g_mu.dtype)
        scaled = dy / s.sigma_hat if gain is None else dy * (gain.reshape(s.sigma_hat.shape) / s.sigma_hat)
        return scaled + (g_mu + slope * g_sigma) / self.count


def _nothing(x: Tensor, d: Definition) -> Tensor:
    """Statistics of an empty batch."""
    whole = d.ref.dims(x.ndim)
    return x.new_zeros([1 if axis in whole else size for axis, size in enumerate(x.shape)])
