"""Freezing: layers that keep their statistics in whatever mode the model is. Imports the layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from streamnorm.conversion.tree import called
from streamnorm.nn.norm import Norm
from streamnorm.nn.timespecific import TimeSpecificNorm

Layer = Norm | TimeSpecificNorm


def freeze(model: nn.Module, affine: bool = False) -> nn.Module:
    """Let all our layers in a model normalize with their constant estimates, in training too, and learn no statistics.

    It lasts through ``train()`` and ``eval()``, copies and pickles, until ``unfreeze``. A ``state_dict`` does not tell
    it. ``recalibrate`` still takes statistics anew. Layers without a memory (``SampleNorm``) have none to freeze, and
    torch's own layers are left alone.

    Args:
        model: any module, or a layer itself.
        affine: also ``requires_grad_(False)`` on gains and biases; otherwise parameters are left as they are.

    Returns:
        The model.

    Raises:
        ValueError: for a model without layers of ours, and for a layer that has no statistics yet. Nothing has changed
            then.

    >>> import torch
    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3), StreamingNorm(3))
    >>> y = model(torch.randn(8, 4))
    >>> y = freeze(model).train()(torch.randn(8, 4))
    >>> model.training, model[1].training, int(model[1].H1.seen)
    (True, False, 1)
    """
    found = list(_layers(model))
    kept = [(name, layer) for name, layer in found if layer.H1 is not None]
    for name, layer in kept:
        if not _has_statistics(layer):
            raise ValueError(
                f"{called(name, layer)} has no statistics to freeze yet; run one batch through the model in training, "
                "or load a state_dict"
            )
    for _, layer in kept:
        layer._freeze()
    if affine:
        _require(found, False)
    return model


def unfreeze(model: nn.Module, affine: bool = False) -> nn.Module:
    """Undo ``freeze``: the layers are again in the mode that ``train()`` or ``eval()`` last set, or were in before.

    Args:
        model: any module, or a layer itself.
        affine: also ``requires_grad_(True)`` on gains and biases.

    Returns:
        The model.

    Raises:
        ValueError: for a model without layers of ours.

    >>> import torch
    >>> from streamnorm import StreamingNorm
    >>> layer = StreamingNorm(3)
    >>> y = layer(torch.randn(8, 3))
    >>> unfreeze(freeze(layer)).training
    True
    """
    found = list(_layers(model))
    for _, layer in found:
        layer._unfreeze()
    if affine:
        _require(found, True)
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (Norm, TimeSpecificNorm))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer of streamnorm; torch's own are frozen by their eval()")
    inside = {one for _, layer in found if isinstance(layer, TimeSpecificNorm) for one in layer.times}
    return ((name, layer) for name, layer in found if layer not in inside)


def _has_statistics(layer: Layer) -> bool:
    if isinstance(layer, TimeSpecificNorm):
        return layer.H1.counts.is_meta or layer.trained_steps > 0
    memory = layer.H1
    assert memory is not None
    return memory.shaped and (memory.counts.is_meta or memory.known)


def _require(found: list[tuple[str, Layer]], grad: bool) -> None:
    for _, layer in found:
        if layer.affine is not None:
            layer.affine.requires_grad_(grad)
