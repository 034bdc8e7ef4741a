"""Normalization layers of torch's, with the inputs that they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

BATCH: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "fc": (partial(nn.BatchNorm1d, 6), (7, 6)),
    "1d": (partial(nn.BatchNorm1d, 6), (5, 6, 4)),
    "2d": (partial(nn.BatchNorm2d, 6, eps=1e-3), (4, 6, 3, 5)),
    "3d": (partial(nn.BatchNorm3d, 6, momentum=0.3), (3, 6, 2, 3, 2)),
    "sync": (partial(nn.SyncBatchNorm, 6), (4, 6, 3, 5)),
    "plain": (partial(nn.BatchNorm2d, 6, affine=False), (4, 6, 3, 5)),
}
SAMPLE: dict[str, tuple[Callable[..., nn.Module], list[tuple[int, ...]]]] = {
    "layer": (partial(nn.LayerNorm, 6), [(7, 6), (5, 6, 6), (2, 3, 4, 6), (6,), (2, 1, 2, 1, 2, 6)]),
    "layer of two axes": (partial(nn.LayerNorm, (3, 4), eps=1e-2), [(5, 3, 4), (2, 7, 3, 4), (3, 4)]),
    "layer without bias": (partial(nn.LayerNorm, 6, bias=False), [(7, 6), (5, 2, 6)]),
    "plain layer": (partial(nn.LayerNorm, 6, elementwise_affine=False), [(7, 6), (5, 2, 6)]),
    "rms": (partial(nn.RMSNorm, 6), [(7, 6), (5, 6, 6), (6,)]),
    "rms of two axes": (partial(nn.RMSNorm, (2, 3), eps=0.1), [(5, 2, 3), (4, 4, 2, 3)]),
    "plain rms": (partial(nn.RMSNorm, 6, elementwise_affine=False), [(7, 6)]),
    "groups": (partial(nn.GroupNorm, 3, 6), [(4, 6), (4, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)]),
    "one group": (partial(nn.GroupNorm, 1, 6), [(4, 6), (4, 6, 5)]),
    "groups of one": (partial(nn.GroupNorm, 6, 6, affine=False), [(4, 6, 5), (2, 6, 3, 4)]),
    "instance 1d": (partial(nn.InstanceNorm1d, 6), [(4, 6, 5), (6, 6), (6, 5)]),
    "instance 2d": (partial(nn.InstanceNorm2d, 6, affine=True), [(4, 6, 5, 3), (6, 6, 3)]),
    "instance 3d": (partial(nn.InstanceNorm3d, 6), [(2, 6, 2, 5, 3), (6, 2, 5, 3)]),
}


def data(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of any number of axes, in float64."""
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def trained(layer: nn.Module, *shapes: tuple[int, ...]) -> nn.Module:
    """Gains and biases of its own, and some mini-batches."""
    with torch.no_grad():
        for p in layer.parameters():
            nn.init.uniform_(p, 0.5, 2)
    for step, shape in enumerate(4 * shapes):
        layer(data(shape, step).float())
    return layer
