"""The closed forms in torch operations, for references that are whole axes, ``Lp``, and the two built-in operations.

::

    dE/dmu_hat = -sum dy / sigma_hat            dE/dsigma_hat = -sum dy (x - mu_hat) / sigma_hat^2
    dx = dy / sigma_hat + g_mu / N + g_sigma / N sign(d) (|d| / sigma)^(p-1)           with d = x - c

In Setting A, c = mu moves with x: g_mu gains ``-g_sigma mean(sign(d) (|d| / sigma)^(p-1))``, which is 0 for p = 2 only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamnorm.kernels.definition import Definition, Statistics
from streamnorm.kernels.generic import apply, mean, sigma
from streamnorm.normop import Scale, Standardize
from streamnorm.normstats import Lp

__all__ = ["apply", "input_grad", "mean", "serves", "sigma", "stat_grads"]


def serves(d: Definition) -> bool:
    """Whether the closed forms hold for this definition."""
    own_moment = type(d.moment).sigma is Lp.sigma and type(d.moment).norm is Lp.norm and type(d.moment).mean is Lp.mean
    return d.ref.reduces and own_moment and type(d.op) in (Standardize, Scale)


def stat_grads(dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
    if type(d.op) is Scale:
        g_sigma = -(dy * x).sum_to_size(sigma_hat.shape) / (sigma_hat * sigma_hat)
        return torch.zeros_like(mu_hat), g_sigma
    g_mu = -dy.sum_to_size(mu_hat.shape) / sigma_hat
    return g_mu, -(dy * (x - mu_hat)).sum_to_size(sigma_hat.shape) / (sigma_hat * sigma_hat)


def input_grad(dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
    dims = d.ref.dims(x.ndim)
    size = 1
    for dim in dims:
        size *= x.shape[dim]
    p, setting = d.moment.p, d.moment.center
    if setting == "zero":
        deviation = x
    else:
        center = s.mu if setting == "batch" else s.center
        assert center is not None
        deviation = x - center
    if p == 2:
        return torch.addcmul(dy / s.sigma_hat, deviation, g_sigma / (size * s.sigma)).add_(g_mu / size)
    slope = deviation.sign() if p == 1 else deviation.sign() * (deviation.abs() / s.sigma) ** (p - 1)
    if setting == "batch":
        g_mu = g_mu - g_sigma * slope.mean(dims, keepdim=True)
    return torch.addcmul(dy / s.sigma_hat, slope, g_sigma / size).add_(g_mu / size)
