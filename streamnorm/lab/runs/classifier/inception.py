"""A small Inception network for images (Szegedy et al. 2014, as Ioffe and Szegedy 2015 gave it batch normalization).

Theirs has ten modules for images of 224 x 224; ours has six for images of about 32 x 32. Every convolution is followed
by its norm and nonlinearity and has no bias; there is no dropout and no local response normalization. Imports the arms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.models import NormFactory

Unit = Callable[..., nn.Sequential]
"""``(features before, features after, side of the kernel, stride = 1) -> layer``."""


class Branches(nn.ModuleList):
    """Layers side by side: the same input to each, their outputs one behind the other along the features.

    >>> Branches([nn.Identity(), nn.ReLU()])(torch.tensor([[-1.0]]))
    tensor([[-1.,  0.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def unit_of(norm: NormFactory, nonlinearity: Callable[[], nn.Module]) -> Unit:
    """What makes a convolution without bias, its norm, and its nonlinearity."""

    def unit(before: int, after: int, side: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, side, stride, side // 2, bias=False)
        return nn.Sequential(convolution, norm(after), nonlinearity())

    return unit


def inception(before: int, width: int, unit: Unit) -> Branches:
    """1 x 1, 3 x 3, double 3 x 3, and average pooling: ``(n, before, h, w) -> (n, 4 width, h, w)``."""
    return Branches(
        [
            unit(before, width, 1),
            nn.Sequential(unit(before, width, 1), unit(width, width, 3)),
            nn.Sequential(unit(before, width, 1), unit(width, width, 3), unit(width, width, 3)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), unit(before, width, 1)),
        ]
    )


def reduction(before: int, width: int, unit: Unit) -> Branches:
    """3 x 3, double 3 x 3, and max pooling, each in steps of two places, to half the map (rounded up):
    ``(n, before, h, w) -> (n, before + 2 width, h / 2, w / 2)``."""
    return Branches(
        [
            nn.Sequential(unit(before, width, 1), unit(width, width, 3, 2)),
            nn.Sequential(unit(before, width, 1), unit(width, width, 3), unit(width, width, 3, 2)),
            nn.MaxPool2d(3, 2, 1),
        ]
    )


class Inception(nn.Sequential):
    """Stem, modules on three sizes of the map, mean over its places, linear read-out.

    ``x (n, channels, height, width) -> (n, classes)``. The stem and each reduction halve the map; the modules on the
    first, second and third size have ``width``, twice and four times as many features a branch.

    >>> from streamnorm import StreamingNorm
    >>> Inception(3, 10, StreamingNorm, nn.ReLU, 4)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, channels: int, classes: int, norm: NormFactory, nonlinearity: Callable[[], nn.Module], width: int
    ) -> None:
        unit = unit_of(norm, nonlinearity)
        super().__init__(
            unit(channels, 2 * width, 3, 2),
            inception(2 * width, width, unit),
            reduction(4 * width, width, unit),
            inception(6 * width, 2 * width, unit),
            inception(8 * width, 2 * width, unit),
            reduction(8 * width, 2 * width, unit),
            inception(12 * width, 4 * width, unit),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(16 * width, classes),
        )
