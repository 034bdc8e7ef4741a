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
from streamnorm.kernels.generic import mean
from streamnorm.kernels.generic import sigma as _sigma
from streamnorm.normop import Scale, Standardize
from streamnorm.normstats import Lp

__all__ = ["apply", "input_grad", "mean", "serves", "sigma", "stat_grads"]


def serves(d: Definition) -> bool:
    """Whether the closed forms hold for this definition."""
    own_moment = type(d.moment).sigma is Lp.sigma and type(d.moment).norm is Lp.norm and type(d.moment).mean is Lp.mean
    return d.ref.reduces and own_moment and type(d.op) in (Standardize, Scale)


def sigma(x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
    """``sigma`` of every reference; squares and their sum in one pass where the reference covers a map."""
    if d.moment.p != 2 or d.ref.place != "all" or x.ndim == 4:
        return _sigma(x, d, mu, center)
    about = {"batch": mu, "estimate": center, "zero": None}[d.moment.center]
    deviation = x if about is None else x - about
    norm = torch.linalg.vector_norm(deviation.flatten(4), dim=4)
    rest = [dim for dim in d.ref.dims(4) if norm.shape[dim] != 1]
    if rest:
        norm = torch.linalg.vector_norm(norm, dim=rest, keepdim=True)
    count = deviation.numel() // max(norm.numel(), 1)
    return (norm.square() / count + d.moment.eps).sqrt().reshape(mu.shape)


def apply(x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> Tensor:
    """``y = N(x, s_hat)``, with one new tensor of the size of x."""
    return x / sigma_hat if type(d.op) is Scale else (x - mu_hat).div_(sigma_hat)


def stat_grads(dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
    if type(d.op) is Scale:
        return torch.zeros_like(mu_hat), -_total(dy * x, sigma_hat) / (sigma_hat * sigma_hat)
    g_mu = -_total(dy, mu_hat) / sigma_hat
    return g_mu, -_total((x - mu_hat).mul_(dy), sigma_hat) / (sigma_hat * sigma_hat)


def _total(values: Tensor, like: Tensor) -> Tensor:
    """The sum of ``values`` over what shares a statistic of the shape of ``like``; place first, which lies together."""
    shared = [dim for dim in range(values.ndim) if values.shape[dim] != like.shape[dim]]
    for axes in ([dim for dim in shared if dim >= 4], [dim for dim in shared if dim < 4]):
        values = values.sum(axes, keepdim=True) if axes else values
    return values


def input_grad(dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
    dims = d.ref.dims(x.ndim)
    size = 1
    for dim in dims:
        size *= x.shape[dim]
    p, setting = d.moment.p, d.moment.center
    center = {"batch": s.mu, "estimate": s.center, "zero": None}[setting]
    deviation = x if center is None else x - center
    if p == 2:
        slope, g_slope = deviation, g_sigma / (size * s.sigma)
    else:
        slope = deviation.sign() if p == 1 else deviation.sign() * (deviation.abs() / s.sigma) ** (p - 1)
        g_slope = g_sigma / size
        if setting == "batch":
            g_mu = g_mu - g_sigma * slope.mean(dims, keepdim=True)
    return (dy / s.sigma_hat).add_(g_mu, alpha=1 / size).addcmul_(slope, g_slope)
