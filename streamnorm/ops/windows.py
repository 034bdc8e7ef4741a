"""The closed forms for windows and ``p = 2``, in torch operations. Imports the definition and the generic backend.

::

    sigma_j^2 = var_j + (mu_j - c_j)^2 + eps               var_j over the window W_j, which is cut at the border
    dx_k = dy_k / sigma_hat + sum_j (g_mu_j + g_sigma_j (x_k - c_j) / sigma_j) / N_j      over the j with k in W_j

``var`` is put together axis by axis from means of squares, so that no two large moments are subtracted: a window's
variance is the mean variance of its rows and the variance of their means. k is in W_j where j is in W_k, so that the
sum over j is a sliding sum too, of ``u = g_sigma / (N sigma)`` and of ``g_mu / N - u (c - r)``, with x about a constant
r of each map::

    sum_j ... = (x_k - r) sum_j u_j + sum_j (g_mu_j / N_j - u_j (c_j - r))
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.definition.ref import mean_over, size_along, sum_along, window_size, window_sum
from streamnorm.definition.stats import all_squarable
from streamnorm.ops import generic
from streamnorm.tracing import is_readable

DIGITS = 1e-3
"""The share of a gradient that may be lost where the map is far away from a window, in its deviations."""


def sigma(x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
    """``sigma`` of every window, about ``mu``, the constant ``center``, or 0, as the setting says."""
    if not is_readable(x):
        return generic.sigma(x, d, mu, center)
    square = _variance(x, d)
    if d.moment.center != "batch":
        square = square + (mu if center is None else mu - center).square()
    found = square.add_(d.moment.eps).sqrt_()
    return found if all_squarable(found) else generic.sigma(x, d, mu, center)


def _variance(x: Tensor, d: Definition) -> Tensor:
    shared = [dim for dim in ((1, 3) if d.ref.samples == "batch" else (3,)) if x.shape[dim] > 1]
    mean, square = mean_over(x, shared), None
    if shared:
        square = (x - mean).square_().mean(shared, keepdim=True)
    for dim in range(4, x.ndim):
        mean, square = _along(mean, square, dim, d.ref.window)
    return torch.zeros_like(mean) if square is None else square


def _along(mean: Tensor, square: Tensor | None, dim: int, window: int) -> tuple[Tensor, Tensor | None]:
    """Mean and variance over a window along one axis, from those of its parts."""
    length = mean.shape[dim]
    reach = min(window // 2, length - 1)
    if reach <= 0:
        return mean, square
    size = size_along(mean, length, window).reshape(-1, *[1] * (mean.ndim - 1 - dim))
    whole = sum_along(mean, dim, window).div_(size)
    total = (mean - whole).square_()
    for offset in range(1, reach + 1):
        left, right = (0, length - offset), (offset, length - offset)
        for here, there in ((left, right), (right, left)):
            deviation = mean.narrow(dim, *there) - whole.narrow(dim, *here)
            total.narrow(dim, *here).addcmul_(deviation, deviation)
    if square is not None:
        total.add_(sum_along(square, dim, window))
    return whole, total.div_(size)


def input_grad(dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
    center = {"batch": s.mu, "estimate": s.center, "zero": None}[d.moment.center]
    about = None if center is None else center[(..., *[slice(1)] * (x.ndim - 4))]
    away = None if center is None or about is None else center - about
    if not _is_moderate(away, s.sigma):
        return generic.input_grad(dy, x, d, s, g_mu, g_sigma)
    share = x.shape[3] * (x.shape[1] if d.ref.samples == "batch" else 1) * window_size(x, d.ref.window)
    slope, level = g_sigma / (s.sigma * share), g_mu / share
    if away is not None:
        level = torch.addcmul(level, away, slope, value=-1)
    dx = dy / s.sigma_hat
    dx.addcmul_(x if about is None else x - about, window_sum(slope, d.ref.window))
    return dx.add_(window_sum(level, d.ref.window))


def _is_moderate(away: Tensor | None, sigma: Tensor) -> bool:
    """Whether nothing overflows or vanishes, and the sliding sums lose no more than ``DIGITS``; False for NaN."""
    if not (sigma.numel() and is_readable(sigma) and all_squarable(sigma)):
        return False
    if away is None:
        return True
    low, high = torch.aminmax(away)
    far = torch.maximum(-low, high) * torch.finfo(away.dtype).eps
    return bool(far <= DIGITS * sigma.min())
