"""NormStats: the function S that turns a reference into statistics s = (mu, sigma) (paper, section 3.4).

``Lp`` is the paper's family; an object with the same methods, made of differentiable torch operations, can take its
place. Imports the definition of the reference and what stands below it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.definition.ref import NormRef, mean_over
from streamnorm.tracing import is_readable

Center = Literal["batch", "estimate", "zero"]


def squarable(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and largest number whose fourth power and its inverse neither overflow nor lose precision."""
    return torch.finfo(dtype).tiny ** 0.25, torch.finfo(dtype).max ** 0.25


def all_squarable(*statistics: Tensor) -> bool:
    """Whether all values, which must be readable, are within ``squarable``; False for NaN."""
    for statistic in statistics:
        if statistic.numel():
            least, most = squarable(statistic.dtype)
            low, high = torch.aminmax(statistic.detach())
            if not (least <= low.item() and high.item() <= most):
                return False
    return True


class DegenerateReferenceError(ValueError):
    """A reference holds too few activations for its statistics: sigma would be 0 for every input.

    >>> import torch
    >>> from streamnorm import BatchNorm
    >>> try:
    ...     BatchNorm(3)(torch.randn(1, 3))
    ... except DegenerateReferenceError as error:
    ...     print(error)
    a single value in each reference (BA1) has no spread: sigma about its own mean (Setting A, center="batch") is 0 ...
    """


@dataclass(frozen=True)
class Lp:
    """Lp normalization: ``mu = mean(R)``, ``sigma = (mean(|R - c|^p) + eps^(p/2))^(1/p)`` (section 3.4, eq. 1 and 2).

    Args:
        p: the order of the absolute moment, any number >= 1. ``p=2`` about the mean is the standard deviation.
        center: the point c. ``"batch"``: the mean mu of the same reference (Setting A); ``"estimate"``: the running
            estimate of the mean, this mini-batch included (Setting B), a constant in the gradient; ``"zero"``: 0
            (Setting C).
        eps: keeps sigma away from 0; enters so that ``p=2`` is ``sqrt(var + eps)`` and every p has the floor
            ``sqrt(eps)``. With 0, a reference of equal activations gives 0/0.

    Raises:
        ValueError: for p < 1, an unknown center or a negative eps.

    >>> Lp(p=1, center="zero")
    Lp(p=1, center='zero', eps=1e-05)
    """

    p: float = 2
    center: Center = "batch"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not (isinstance(self.p, (int, float)) and math.isfinite(self.p) and self.p >= 1):
            raise ValueError(f"p is a number >= 1, got {self.p!r}; p=1 is the mean absolute value, p=2 the deviation")
        if self.center not in ("batch", "estimate", "zero"):
            raise ValueError(
                f'center is "batch" (Setting A), "estimate" (Setting B) or "zero" (Setting C), got {self.center!r}'
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps is a finite number >= 0, got {self.eps!r}")

    def check_size(self, ref: NormRef, count: int) -> None:
        """Raise for a reference with too few activations for these statistics.

        Raises:
            DegenerateReferenceError: Setting A with one activation, where sigma is 0 for every input (section 3.4).
        """
        if self.center == "batch" and count == 1:
            raise DegenerateReferenceError(
                f"a single value in each reference ({ref!r}) has no spread: sigma about its own mean (Setting A, "
                'center="batch") is 0 for every input; use center="estimate" (Setting B) or center="zero" (Setting C) '
                "with a Streaming policy, more samples per batch, or a reference that holds more activations"
            )

    def mean(self, x: Tensor, ref: NormRef) -> Tensor:
        """``mu``, broadcastable against ``x (g, m, G, q, *place)``."""
        return ref.mean(x)

    def sigma(self, x: Tensor, ref: NormRef, mu: Tensor, mu_hat: Tensor | None) -> Tensor:
        """``sigma`` about the center of this setting: ``mu``, the constant ``mu_hat``, or 0."""
        if self.center == "zero":
            walk = ref.place == "local" and self.p != 1
            return self.windowed(x, ref, torch.zeros_like(x[:, :1, :, :1])) if walk else self.norm(x, ref)
        center = mu if self.center == "batch" else mu_hat
        assert center is not None
        return self.windowed(x, ref, center) if ref.place == "local" else self.norm(x, ref, center)

    def norm(self, x: Tensor, ref: NormRef, center: Tensor | None = None) -> Tensor:
        """``(mean(|d|^p) + eps^(p/2))^(1/p)`` with ``d = x - center``. Powers are taken relative to the largest |d|;
        squares only if they would overflow or vanish otherwise."""
        d = x if center is None else x - center
        if self.p == 1:
            return ref.mean(d.abs()) + self.eps**0.5
        if self.p != 2:
            scale = self.unit(_largest(d, ref))
            return scale * (ref.mean((d.abs() / scale) ** self.p) + (self.eps**0.5 / scale) ** self.p) ** (1 / self.p)
        if is_readable(d):
            sigma = (_mean_of_squares(d, ref) + self.eps).sqrt()
            if all_squarable(sigma):
                return sigma
            scale = self.unit(_largest(d, ref))
        else:  # from values that a compiler finds in the pass over x for its mean
            largest = _largest(x, ref) if center is None else torch.maximum(_largest(x, ref), center.detach().abs())
            scale, (least, most) = self.floor(largest), squarable(d.dtype)
            scale = torch.where((scale >= least) & (scale <= most), 1, self.unit(scale))
        return scale * (_mean_of_squares(d / scale, ref) + (self.eps**0.5 / scale).square()).sqrt()

    def unit(self, largest: Tensor) -> Tensor:
        """The largest ``|d|`` of each reference as the constant unit of its powers, which then neither overflow nor
        vanish. A huge one is reduced as far as the powers allow, as the backward pass multiplies gradients by it."""
        scale, most = self.floor(largest), torch.finfo(largest.dtype).max
        return torch.where(scale > most**0.25, scale / most ** (0.5 / self.p), scale)

    def floor(self, largest: Tensor) -> Tensor:
        """The largest ``|d|``, but at least a value that is negligible next to eps."""
        return largest.detach().clamp_min(max(self.eps**0.5, torch.finfo(largest.dtype).tiny))

    def windowed(self, x: Tensor, ref: NormRef, center: Tensor) -> Tensor:
        """``sigma`` over the window of each position j, all of whose ``x_k`` are taken about the center ``c_j``.

        The window is summed offset by offset, which never subtracts two large moments. For p = 2 the activations that
        share a position enter as their mean and variance, so that the loop only runs over the map.
        """
        shared = (1, 3) if ref.samples == "batch" else (3,)
        offsets = list(_offsets(x.shape[4:], ref.window))
        pads = [pad for *_, pad in offsets]
        if self.p == 2:
            at = mean_over(x, shared)
            within = x - at
            width = self.floor(within.abs().amax(shared, keepdim=True))
            inner = width, (within / width).square().mean(shared, keepdim=True)
            deviations = [at[there] - center[here] for here, there, _ in offsets]
            largest = [
                torch.maximum(d.detach().abs(), width[o]) for d, (_, o, _) in zip(deviations, offsets, strict=True)
            ]
        else:
            inner = None
            deviations = [(x[there] - center[here]).abs() for here, there, _ in offsets]
            largest = [d.detach().amax(shared, keepdim=True) for d in deviations]
        scale = self.unit(torch.stack([F.pad(most, pad) for most, pad in zip(largest, pads, strict=True)]).amax(0))
        moments = [
            ((d / scale[here]) ** self.p).mean(shared, keepdim=True)
            for d, (here, *_) in zip(deviations, offsets, strict=True)
        ]
        if inner is not None:
            width, spread = inner
            ratios = [width[there] / scale[here] for here, there, _ in offsets]
            moments = [m + spread[o] * r.square() for m, r, (_, o, _) in zip(moments, ratios, offsets, strict=True)]
        return scale * (_window_mean(moments, pads) + (self.eps**0.5 / scale) ** self.p) ** (1 / self.p)


def _largest(x: Tensor, ref: NormRef) -> Tensor:
    """The largest ``|x|`` of each reference; over place axes first, as for a mean."""
    largest = x.detach()
    for axes in (range(4, x.ndim) if ref.place == "all" else (), (1, 3) if ref.samples == "batch" else (3,)):
        largest = torch.linalg.vector_norm(largest, math.inf, list(axes), keepdim=True) if axes else largest
    return largest


def _mean_of_squares(d: Tensor, ref: NormRef) -> Tensor:
    """The mean of ``d^2`` over each reference; for whole axes without the shift of ``ref.mean``: squares are >= 0."""
    square = d * d
    if not ref.reduces:
        return ref.mean(square)
    dims = ref.dims(d.ndim)
    for axes in ([dim for dim in dims if dim >= 4], [dim for dim in dims if dim < 4]):
        square = square.mean(axes, keepdim=True) if axes else square
    return square


Offset = tuple[tuple, tuple, list[int]]


def _window_mean(moments: Sequence[Tensor], pads: Sequence[list[int]]) -> Tensor:
    """The mean over each position's window of the contributions of its offsets, padded back to their positions."""
    total = torch.stack([F.pad(moment, pad) for moment, pad in zip(moments, pads, strict=True)]).sum(0)
    count = sum(F.pad(torch.ones_like(m[:1, :1, :1, :1]), pad) for m, pad in zip(moments, pads, strict=True))
    return total / count


def _offsets(place: Sequence[int], window: int) -> Iterator[Offset]:
    """For each offset o inside the window: the positions j, the positions j + o, and the padding that puts j back."""
    reach = [range(-r, r + 1) for r in (min(window // 2, length - 1) for length in place)]
    for offset in itertools.product(*reach):
        here = [slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, place, strict=True)]
        there = [slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, place, strict=True)]
        pad = [side for s, n in zip(reversed(here), reversed(place), strict=True) for side in (s.start, n - s.stop)]
        yield (..., *here), (..., *there), pad
