"""NormStats: the function S that turns a reference into statistics s = (mu, sigma) (paper, section 3.4).

``Lp`` is the paper's family; an object with the same methods, made of differentiable torch operations, can take its
place. Imports torch and the definition of the reference.
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

from streamnorm.definition.ref import NormRef

Center = Literal["batch", "estimate", "zero"]


class DegenerateReferenceError(ValueError):
    """A reference holds too few activations for its statistics: sigma would be 0 whatever the input."""


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
        """Refuse a reference with too few activations for these statistics.

        Raises:
            DegenerateReferenceError: Setting A with one activation, where sigma is 0 whatever the input (section 3.4).
        """
        if self.center == "batch" and count == 1:
            raise DegenerateReferenceError(
                f'center="batch" (Setting A) with one activation in each reference ({ref!r}) gives sigma = 0 for every '
                'input; use center="estimate" (Setting B) or center="zero" (Setting C) with a Streaming policy, more '
                "samples per batch, or a reference that holds more activations"
            )

    def mean(self, x: Tensor, ref: NormRef) -> Tensor:
        """``mu``, broadcastable against ``x (g, m, G, q, *place)``."""
        return ref.mean(x)

    def sigma(self, x: Tensor, ref: NormRef, mu: Tensor, mu_hat: Tensor | None) -> Tensor:
        """``sigma`` about the center of this setting: ``mu``, the constant ``mu_hat``, or 0."""
        if self.center == "zero":
            walk = ref.place == "local" and self.p not in (1, 2)
            return self.windowed(x, ref, torch.zeros_like(x[:, :1, :, :1])) if walk else self.norm(x, ref)
        center = mu if self.center == "batch" else mu_hat
        assert center is not None
        return self.windowed(x, ref, center) if ref.place == "local" else self.norm(x - center, ref)

    def norm(self, d: Tensor, ref: NormRef) -> Tensor:
        """``(mean(|d|^p) + eps^(p/2))^(1/p)``; other powers than 1 and 2 are taken relative to the largest |d|."""
        if self.p == 1:
            return ref.mean(d.abs()) + self.eps**0.5
        if self.p == 2:
            return (ref.mean(d * d) + self.eps).sqrt()
        axes = (1, 3) if ref.samples == "batch" else (3,)
        scale = self.floor(d.abs().amax((*axes, *(() if ref.place == "here" else range(4, d.ndim))), keepdim=True))
        return scale * (ref.mean((d.abs() / scale) ** self.p) + (self.eps**0.5 / scale) ** self.p) ** (1 / self.p)

    def floor(self, largest: Tensor) -> Tensor:
        """The largest ``|d|`` of each reference as the constant unit of its powers, which then neither overflow nor
        vanish."""
        return largest.detach().clamp_min(max(self.eps**0.5, torch.finfo(largest.dtype).tiny))

    def windowed(self, x: Tensor, ref: NormRef, center: Tensor) -> Tensor:
        """``sigma`` over the window of each position j, all of whose ``x_k`` are taken about the center ``c_j``.

        The window is walked offset by offset, which never subtracts two large moments. For p = 2 the activations that
        share a position enter as their mean and variance, so that the walk is over the map alone.
        """
        shared = (1, 3) if ref.samples == "batch" else (3,)
        offsets = list(_offsets(x.shape[4:], ref.window))
        if self.p == 2:
            at = x.mean(shared, keepdim=True)
            spread = (x - at).square().mean(shared, keepdim=True)
            moments = [spread[there] + (at[there] - center[here]).square() for here, there, _ in offsets]
            return (_window_mean(moments, [pad for *_, pad in offsets]) + self.eps).sqrt()
        deviations = [(x[there] - center[here]).abs() for here, there, _ in offsets]
        pads = [pad for *_, pad in offsets]
        largest = [F.pad(d.detach().amax(shared, keepdim=True), pad) for d, pad in zip(deviations, pads, strict=True)]
        scale = self.floor(torch.stack(largest).amax(0))
        moments = [
            ((d / scale[here]) ** self.p).mean(shared, keepdim=True)
            for d, (here, *_) in zip(deviations, offsets, strict=True)
        ]
        return scale * (_window_mean(moments, pads) + (self.eps**0.5 / scale) ** self.p) ** (1 / self.p)


Offset = tuple[tuple, tuple, list[int]]


def _window_mean(moments: Sequence[Tensor], pads: Sequence[list[int]]) -> Tensor:
    """The mean over each position's window of what each offset contributes, padded back to its positions."""
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
