"""A compiled pass over time beside the loop: what the tests of both stand on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamnorm import Norm
from streamnorm.ops.backends import using


def compare(fast: nn.Module, slow: nn.Module, x: Tensor, *dys: Tensor) -> None:
    """Forward, back and a weight update in compiled code and in the loop, once for every gradient: all is the same."""
    for dy in dys:
        got = fast(x)[0]
        got.backward(dy)
        with using("eager"):
            want = slow(x)[0]
            want.backward(dy)
        torch.testing.assert_close(got, want)
        fold(fast, slow)
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name, equal_nan=True)


def fold(*models: nn.Module) -> None:
    """A weight update of all layers took place."""
    for model in models:
        for layer in model.modules():
            if isinstance(layer, Norm):
                layer.fold()
