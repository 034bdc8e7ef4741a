"""NormRef: which activations a neuron is compared with (paper, section 3 and Figure 1 C, D).

A reference is three choices: features (own, all, or groups) x place (here, a local window, everywhere) x samples
(one, the mini-batch). Eleven of the paper's twelve combinations have names here; the twelfth, one activation of one
sample, normalizes nothing. Imports checks and tracing alone.

Legend: ``g`` steps of the stream, ``m`` samples of a mini-batch, ``c`` features, split into ``G`` groups of ``q``;
``place`` = x, y, z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.checks import is_whole
from streamnorm.tracing import is_traced

Features = Literal["own", "all"] | int
Place = Literal["here", "local", "all"]
Samples = Literal["one", "batch"]


@dataclass(frozen=True, repr=False)
class NormRef:
    """The set of activations R_i that the statistics of neuron i are taken from.

    ``R_i = {features} x {place} x {samples}``; the statistics are ``s_i = S(R_i)`` (paper, section 3).

    Args:
        features: ``"own"`` feature of the neuron, ``"all"`` features of the layer, or an int: that many equal groups.
        place: ``"here"`` (the neuron's own position), ``"local"`` (a window around it) or ``"all"`` positions.
        samples: ``"one"`` sample, or all samples of the mini-batch (``"batch"``).
        window: width of the local window, odd; positions outside the map are left out of the average.

    Raises:
        ValueError: for a choice that is not in the lists above.

    >>> NormRef("own", "all", "batch")
    BA1
    >>> BA4.with_window(3)
    NormRef(features='own', place='local', samples='batch', window=3)
    """

    features: Features
    place: Place
    samples: Samples
    window: int = 5

    def __post_init__(self) -> None:
        if self.features not in ("own", "all") and not is_whole(self.features):
            raise ValueError(f'features is "own", "all" or a number of groups >= 1, got {self.features!r}')
        if self.place not in ("here", "local", "all"):
            raise ValueError(f'place is "here", "local" or "all", got {self.place!r}')
        if self.samples not in ("one", "batch"):
            raise ValueError(f'samples is "one" or "batch", got {self.samples!r}')
        if not isinstance(self.window, int) or self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window is an odd number of positions >= 1, got {self.window!r}")

    def __repr__(self) -> str:
        for name, ref in REFS.items():
            if ref == self and type(self) is NormRef:
                return name
        window = f", window={self.window}" if self.place == "local" else ""
        return (
            f"{type(self).__name__}(features={self.features!r}, place={self.place!r}, samples={self.samples!r}{window})"
        )

    def with_window(self, window: int) -> NormRef:
        """The same reference with a local window of another width."""
        return replace(self, window=window)

    def groups(self, num_features: int) -> int:
        """``G``, the number of feature groups that have statistics of their own."""
        if self.features == "own":
            return num_features
        if self.features == "all":
            return 1
        if num_features % self.features:
            raise ValueError(
                f"{num_features} features do not divide into {self.features} groups; choose a divisor of {num_features}"
            )
        return self.features

    def view(self, x: Tensor, steps: int = 1) -> Tensor:
        """The canonical view: ``x (g*m, c, *place) -> (g, m, G, q, *place)``, no copy."""
        n, c = x.shape[:2]
        groups = self.groups(c)
        return x.view(steps, n // steps, groups, c // groups, *x.shape[2:])

    def size(self, view: Sequence[int]) -> int:
        """How many activations the smallest reference of a canonical view holds (``view`` is its shape)."""
        _, m, _, q, *place = view
        count = q * (m if self.samples == "batch" else 1)
        for length in place:
            if self.place == "all":
                count *= length
            elif self.place == "local":
                count *= min(length, self.window // 2 + 1)
        return count

    @property
    def is_built_in(self) -> bool:
        """Whether the mean is the one defined by the three choices, not overridden by a subclass."""
        return type(self).mean is NormRef.mean

    @property
    def reduces(self) -> bool:
        """Whether the mean over the reference is a mean over whole axes (no window, not overridden by a subclass)."""
        return self.place != "local" and self.is_built_in

    def dims(self, ndim: int) -> tuple[int, ...]:
        """The axes of a canonical view with ``ndim`` axes that a whole-axis reference averages over."""
        samples = (1,) if self.samples == "batch" else ()
        place = tuple(range(4, ndim)) if self.place == "all" else ()
        return (*samples, 3, *place)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each neuron's reference, broadcastable against ``x (g, m, G, q, *place)``.

        To define your own reference, override this method (and choose ``place`` and ``samples`` to match the axes that
        the result keeps); everything else follows from it, including the gradient.
        """
        if self.place != "local":
            return mean_over(x, self.dims(x.ndim))
        return window_mean(mean_over(x, (1, 3) if self.samples == "batch" else (3,)), self.window)


def mean_over(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The mean over ``dims`` (kept), about the first value so that a large mean loses no precision; over place axes
    first, which are contiguous. Values are scaled down before they are summed, so that no sum overflows."""
    dims = [dim for dim in dims if x.shape[dim] != 1]
    if not dims or not x.numel():
        return x.mean(dims, keepdim=True) if dims else x
    shift, count = x.detach(), 1
    for dim in dims:
        shift, count = shift.narrow(dim, 0, 1), count * x.shape[dim]
    if is_traced():  # fused, and the count may be a symbol
        total, rest = (x - shift) / count, 1.0
    else:  # in one pass, scaled by a power of two, which is exact
        unit = 2.0 ** -(count - 1).bit_length()
        total, rest = torch.add(shift * -unit, x, alpha=unit), count * unit
    for axes in ([dim for dim in dims if dim >= 4], [dim for dim in dims if dim < 4]):
        total = total.sum(axes, keepdim=True) if axes else total
    return shift + total / rest


def window_mean(x: Tensor, window: int) -> Tensor:
    """Sliding mean of width ``window`` over the place axes of ``x (g, m, G, q, *place)``, border positions averaging
    over the part of the window inside the map."""
    if window == 1 or x.ndim == 4:
        return x
    unit = 2.0 ** -math.prod([min(window, 2 * length - 1) for length in x.shape[4:]]).bit_length()  # no sum overflows
    return window_sum(x * unit, window).div(window_size(x, window) * unit)


def window_sum(x: Tensor, window: int) -> Tensor:
    """Sliding sum over the place axes, one after the other."""
    for dim in range(4, x.ndim):
        x = sum_along(x, dim, window)
    return x


def sum_along(x: Tensor, dim: int, window: int) -> Tensor:
    """Sliding sum along one axis. Sums of 1, 2, 4, ... neighbors are put together to the window, so that nothing is
    subtracted, and what is not finite stays within its windows."""
    length = x.shape[dim]
    reach = min(window // 2, length - 1)
    if reach <= 0:
        return x
    width = 2 * reach + 1
    part = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [reach, reach])
    total, start, size = part.narrow(dim, 0, length), 1, 1  # width is odd
    while start < width:
        rest = part.shape[dim] - size
        part = part.narrow(dim, 0, rest) + part.narrow(dim, size, rest)
        size *= 2
        if width & size:
            total, start = total + part.narrow(dim, start, length), start + size
    return total


def window_size(x: Tensor, window: int) -> Tensor:
    """How many positions the window of each position holds inside the map, ``(*place)``."""
    size = x.new_ones(())
    for length in x.shape[4:]:
        size = size.unsqueeze(-1) * size_along(x, length, window)
    return size


def size_along(x: Tensor, length: int, window: int) -> Tensor:
    """How many positions a window holds along an axis of so many, ``(length,)``, in the dtype of x."""
    at = torch.arange(length, device=x.device)
    return (1 + at.clamp(max=window // 2) + (length - 1 - at).clamp(max=window // 2)).to(x.dtype)


SP1 = NormRef("own", "all", "one")
"""A feature of one sample, over its map: instance normalization."""
SP2 = NormRef("all", "all", "one")
"""All features of one sample, over its map: layer normalization."""
SP3 = NormRef("all", "local", "one")
"""All features of one sample, in a window around the place."""
SP4 = NormRef("own", "local", "one")
"""A feature of one sample, in a window around the place."""
SP5 = NormRef("all", "here", "one")
"""All features of one sample, at the place: layer normalization per position."""
BA1 = NormRef("own", "all", "batch")
"""A feature of the mini-batch, over the maps: batch normalization."""
BA2 = NormRef("all", "all", "batch")
"""All features of the mini-batch, over the maps."""
BA3 = NormRef("all", "local", "batch")
"""All features of the mini-batch, in a window around the place."""
BA4 = NormRef("own", "local", "batch")
"""A feature of the mini-batch, in a window around the place."""
BA5 = NormRef("all", "here", "batch")
"""All features of the mini-batch, at the place."""
BA6 = NormRef("own", "here", "batch")
"""A feature of the mini-batch, at the place: statistics for every neuron."""

REFS: dict[str, NormRef] = {
    "SP1": SP1,
    "SP2": SP2,
    "SP3": SP3,
    "SP4": SP4,
    "SP5": SP5,
    "BA1": BA1,
    "BA2": BA2,
    "BA3": BA3,
    "BA4": BA4,
    "BA5": BA5,
    "BA6": BA6,
}
"""The eleven references of Figure 1 C and D by name."""
