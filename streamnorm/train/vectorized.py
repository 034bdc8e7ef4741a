"""A whole cycle of mini-batches in one call. Imports the layers.

Legend: m samples per batch (S/B), n batches per update (B/U); one cycle is n mini-batches and one weight update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from streamnorm.nn.norm import Norm


@contextmanager
def vectorized(model: nn.Module, batches: int, averaged: bool = False) -> Iterator[None]:
    """Inside, every training call of ``model`` treats its first axis as ``batches`` mini-batches in order.

    The weights are constant inside a cycle, so all its mini-batches can be computed in one call: ``Norm`` layers take
    statistics per mini-batch, and F and G see the mini-batches arrive one after another, forward and backward, exactly
    as in a loop. The backward pass may come after the block. Needs memory for all mini-batches together.

    Args:
        model: contains the layers.
        batches: mini-batches per call.
        averaged: the loss is the mean over the mini-batches, not the sum of their losses as in a loop with a backward
            pass each: H2 then still remembers gradients in the units of the loop.

    Raises:
        ValueError: for ``torch.nn`` batch normalization, which would mix the mini-batches; and for a layer at its
            second call inside, where mini-batches would arrive in another order than in the loop.

    >>> import torch
    >>> from streamnorm import StreamingNorm
    >>> layer = StreamingNorm(3)
    >>> with vectorized(layer, 16):
    ...     y = layer(torch.randn(16, 3))
    >>> layer.H1.count
    tensor(16)
    """
    if batches < 1:
        raise ValueError(f"batches is a number of mini-batches >= 1, got {batches!r}")
    layers: list[Norm] = []
    for module in model.modules():
        if isinstance(module, Norm):
            layers.append(module)
        elif batches > 1 and isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, one in model.named_modules() if one is module)
            raise ValueError(
                f"{type(module).__name__} {name!r} would normalize {batches} mini-batches as one; use "
                "streamnorm.BatchNorm in its place, or the loop over mini-batches (vectorize=False)"
            )
    before = [(layer.steps, layer.unit) for layer in layers]

    def begin(*_: Any) -> None:
        for layer in layers:
            layer._calls.in_cycle = 0

    begins = model.register_forward_pre_hook(begin)  # each call of the model is a cycle
    try:
        for layer in layers:
            layer.steps, layer.unit = batches, batches if averaged else 1
        begin()
        yield
    finally:
        begins.remove()
        for layer, (steps, unit) in zip(layers, before, strict=True):
            layer.steps, layer.unit = steps, unit
            layer._calls.in_cycle = None if steps == 1 else layer._calls.in_cycle
