"""The closed forms in torch operations, for ``Lp`` and the two built-in operations, over whole axes and, for ``p = 2``,
over windows.

::

    dE/dmu_hat = -sum dy / sigma_hat            dE/dsigma_hat = -sum dy (x - mu_hat) / sigma_hat^2
    dx = dy / sigma_hat + g_mu / N + g_sigma / N sign(d) (|d| / sigma)^(p-1)           with d = x - c

No statistic is squared on the way: its square may overflow where the gradient does not.

In Setting A, c = mu depends on x: g_mu gains ``-g_sigma mean(sign(d) (|d| / sigma)^(p-1))``, 0 for p = 2 only.

If every feature map of one mini-batch has its own statistics (BA1), torch's batch normalization in evaluation mode is
the fastest map, its backward pass the fastest pair of sums, and both include gain and bias. It computes ``a x + b``,
which loses precision where a mean is large relative to its deviation: then the plain forms are used. It guesses a
tensor's memory format from all strides, even those of axes of size 1, which are arbitrary; if it guesses differently
for x and dy, its gradients are wrong (torch 2.13). So it is given unambiguous strides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.definition.operation import Scale, Standardize
from streamnorm.definition.stats import Lp, all_squarable, squarable
from streamnorm.ops import generic, windows
from streamnorm.tracing import is_readable

__all__ = ["apply", "input_grad", "joins", "mean", "sigma", "stat_grads", "unsupported"]

CANCELS = 100
"""How much larger a moment about 0 may be than the moment about the center that is computed from it."""
LARGE = 10
"""How many deviations a center may be away from 0 for ``a x + b`` to lose at most one digit."""


def unsupported(d: Definition) -> str | None:
    """Why there is no closed form for a definition; None: there is one."""
    if not d.ref.is_built_in:
        return f"{type(d.ref).__name__} has a mean of its own"
    if not d.ref.reduces and d.moment.p != 2:
        return "the reference is a window and p is not 2"
    own = [name for name in ("mean", "sigma", "norm") if getattr(type(d.moment), name) is not getattr(Lp, name)]
    if own:
        return f"{type(d.moment).__name__} has a {' and '.join(own)} of its own"
    if type(d.op) not in (Standardize, Scale):
        return f"{type(d.op).__name__} is an operation of its own"
    return None


def joins(x: Tensor, d: Definition) -> bool:
    """Whether ``apply`` and ``input_grad`` can include the gain and bias that follow."""
    return _maps(x, d) is not None and type(d.op) is Standardize


def mean(x: Tensor, d: Definition) -> Tensor:
    """``mu`` of every reference."""
    if d.moment.p != 2 or d.ref.place != "all" or x.ndim == 4 or not x.is_contiguous() or not x.numel():
        return generic.mean(x, d)  # about the first value, so that a large mean loses no precision
    mu = _mean_of_maps(x.flatten(4).sum(4) / x[0, 0, 0, 0].numel(), x, d)
    return generic.mean(x, d) if is_readable(mu) and not mu.abs().sum().isfinite() else mu


def sigma(x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
    """``sigma`` of every reference; squares and their sum in one pass where the reference covers a map."""
    if not d.ref.reduces:
        return windows.sigma(x, d, mu, center)
    if d.moment.p != 2 or d.ref.place != "all" or x.ndim == 4 or not x.is_contiguous() or not is_readable(x):
        return generic.sigma(x, d, mu, center)
    about = {"batch": mu, "estimate": center, "zero": None}[d.moment.center]
    moment = square = _square(x, d)
    if about is not None:
        moment = square - about * (2 * mu - about)
        if not (square <= CANCELS * moment).all():
            moment = _square(x - about, d)
    found = (moment + d.moment.eps).sqrt()
    return found if all_squarable(found) else generic.sigma(x, d, mu, center)


def _square(x: Tensor, d: Definition) -> Tensor:
    norm = torch.linalg.vector_norm(x.flatten(4), dim=4)
    return _mean_of_maps(norm.square() / x[0, 0, 0, 0].numel(), x, d)


def _mean_of_maps(each: Tensor, x: Tensor, d: Definition) -> Tensor:
    """The mean over a reference of one value per map, ``(g, m, G, q)``, shaped as a statistic."""
    rest = [dim for dim in d.ref.dims(4) if each.shape[dim] != 1]
    whole = each.mean(rest, keepdim=True) if rest else each
    return whole.reshape(*whole.shape, *[1] * (x.ndim - 4))


def apply(
    x: Tensor,
    d: Definition,
    mu_hat: Tensor,
    sigma_hat: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``y = N(x, s_hat)`` with one new tensor of the size of x; ``gain`` and ``shift (c,)`` where ``joins`` holds."""
    if type(d.op) is Scale:
        return x / sigma_hat
    flat = None if x.requires_grad and torch.is_grad_enabled() else _maps(x, d)  # dy may have any layout
    if flat is None or not _is_moderate(mu_hat, sigma_hat):
        y = (x - mu_hat).div_(sigma_hat)
        if gain is None or shift is None:
            return y
        return y.mul_(gain.reshape(sigma_hat.shape)).add_(shift.reshape(sigma_hat.shape))
    deviation = sigma_hat.flatten()
    return F.batch_norm(flat, mu_hat.flatten(), deviation * deviation, gain, shift, False, 0.0, 0.0).view(x.shape)


def stat_grads(dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
    if type(d.op) is Scale:
        return torch.zeros_like(mu_hat), -_total((x / sigma_hat).mul_(dy), sigma_hat) / sigma_hat
    flat = _maps(x, d)
    if flat is None or not _is_moderate(mu_hat, sigma_hat):
        g_mu = -_total(dy, mu_hat) / sigma_hat
        return g_mu, -_total((x - mu_hat).div_(sigma_hat).mul_(dy), sigma_hat) / sigma_hat
    deviation, grad = sigma_hat.flatten(), dy.reshape(flat.shape)
    _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
        grad if grad.stride() == flat.stride() else torch.empty_like(flat).copy_(grad),
        flat,
        torch.ones_like(deviation),
        mu_hat.flatten(),
        deviation * deviation,
        None,
        None,
        False,
        0.0,
        [False, True, True],
    )
    return -plain.reshape(mu_hat.shape) / sigma_hat, -scaled.reshape(mu_hat.shape) / sigma_hat


def _total(values: Tensor, like: Tensor) -> Tensor:
    """The sum of ``values`` down to the shape of ``like``; over the place axes first, which are contiguous."""
    shared = [dim for dim in range(values.ndim) if values.shape[dim] != like.shape[dim]]
    for axes in ([dim for dim in shared if dim >= 4], [dim for dim in shared if dim < 4]):
        values = values.sum(axes, keepdim=True) if axes else values
    return values


def input_grad(
    dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor, gain: Tensor | None = None
) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant. ``gain`` as in ``apply``."""
    if not d.ref.reduces:
        return windows.input_grad(dy, x, d, s, g_mu, g_sigma)
    dims = d.ref.dims(x.ndim)
    size = 1
    for dim in dims:
        size *= x.shape[dim]
    p, setting = d.moment.p, d.moment.center
    center = {"batch": s.mu, "estimate": s.center, "zero": None}[setting]
    flat = _maps(x, d) if p == 2 else None
    about = torch.zeros_like(s.mu) if center is None else center
    if flat is not None and _is_moderate(about, s.sigma):
        slope, level = (g_sigma / (size * s.sigma)).flatten(), (g_mu / size).flatten()
        dx = F.batch_norm(flat, about.flatten(), torch.ones_like(slope), slope, level, False, 0.0, 0.0)
        scale = s.sigma_hat.reciprocal() if gain is None else gain.reshape(s.sigma_hat.shape) / s.sigma_hat
        return dx.view(x.shape).addcmul_(dy, scale)
    deviation = x if center is None else x - center
    if p == 1:
        slope = deviation.sign()
    else:
        slope = deviation / s.sigma
        slope = slope if p == 2 else deviation.sign() * slope.abs() ** (p - 1)
    if p != 2 and setting == "batch":
        g_mu = g_mu - g_sigma * slope.mean(dims, keepdim=True)
    scaled = dy / s.sigma_hat if gain is None else dy * (gain.reshape(s.sigma_hat.shape) / s.sigma_hat)
    return scaled.add_(g_mu, alpha=1 / size).addcmul_(slope, g_sigma / size)


def _maps(x: Tensor, d: Definition) -> Tensor | None:
    """``x`` as ``(n, c, *place)``, if each feature map has one statistic over all of it (BA1 with one step)."""
    if d.ref.samples != "batch" or d.ref.place != "all" or len(x) != 1 or x.ndim == 4:
        return None
    if not x.numel() or not is_readable(x):
        return None
    one_each = d.ref.groups(x.shape[2]) == x.shape[2] == x[0, 0].shape[:2].numel()
    return _dense(x[0].flatten(1, 2)) if one_each else None


def _dense(x: Tensor) -> Tensor | None:
    """``x (n, c, *place)`` with the strides of a new contiguous or channels_last tensor; None: it is neither."""
    if x.is_contiguous():
        return x.view(-1).view(x.shape)
    last = x.movedim(1, -1)
    return last.view(-1).view(last.shape).movedim(-1, 1) if last.is_contiguous() else None


def _is_moderate(center: Tensor, deviation: Tensor) -> bool:
    """Whether squares of the deviation do not overflow and the center is not large relative to it; False for NaN."""
    least, most = squarable(deviation.dtype)
    fits = (center.abs() <= LARGE * deviation) & (deviation >= least) & (deviation <= most)
    return bool(fits.all())
