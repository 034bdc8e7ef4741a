"""A layer that can be frozen: it stays in evaluation whatever mode its model is in. Imports torch alone."""

from __future__ import annotations

from typing import Self

from torch import nn


class Freezable(nn.Module):
    """Base class of the layers that ``streamnorm.freeze`` and ``unfreeze`` work on.

    A frozen layer normalizes with its constant estimate and changes no statistics. ``train()`` and ``eval()`` of the
    model then only set the mode that it returns to. Copies and pickles of a frozen layer are frozen.

    >>> from streamnorm import StreamingNorm, freeze
    >>> import torch
    >>> layer = StreamingNorm(3)
    >>> y = layer(torch.randn(8, 3))
    >>> freeze(layer).train().training
    False
    """

    _returns_to: bool | None = None

    @property
    def frozen(self) -> bool:
        """Whether the layer stays in evaluation."""
        return self._returns_to is not None

    def train(self, mode: bool = True) -> Self:
        if self._returns_to is None:
            return super().train(mode)
        self._returns_to = bool(mode)
        return super().train(False)

    def _freeze(self) -> None:
        if self._returns_to is None:
            self._returns_to = self.training
            super().train(False)

    def _unfreeze(self) -> None:
        if self._returns_to is not None:
            mode, self._returns_to = self._returns_to, None
            self.train(mode)
