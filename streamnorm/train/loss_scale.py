"""The unit of the loss: H2 remembers gradients, so it has to know what a loss was multiplied by. Imports the layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from streamnorm.nn.norm import norms

Scale = float | Callable[[], float]


class LossScale:
    """What ``loss_scale`` returns; ``remove()`` it, or use it in a ``with``."""

    def __init__(self, model: nn.Module, scale: Any) -> None:
        self.scale: Scale = scale.get_scale if hasattr(scale, "get_scale") else scale
        self._now()
        self.model = model
        self._hook = model.register_forward_pre_hook(self._before_call)
        self._tell(self._now())

    def _now(self) -> float:
        value = self.scale() if callable(self.scale) else self.scale
        if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"the scale of a loss is a finite number above 0, got {value!r}")
        return float(value)

    def _before_call(self, model: nn.Module, inputs: Any) -> None:
        self._tell(self._now())

    def _tell(self, value: float) -> None:
        for layer in norms(self.model):
            layer.loss_scale = value

    def remove(self) -> None:
        """The losses are not scaled any more."""
        self._hook.remove()
        self._tell(1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, model=memo.get(id(self.model), self.model))
        return copied

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def loss_scale(model: nn.Module, scale: Any) -> LossScale:
    """Say what the loss of ``model`` is multiplied by before ``backward()``.

    H2 remembers gradients of earlier losses and adds what it makes of them to those of this one, so all have to be in
    one unit. If losses are multiplied by a number that changes, gradients are divided by it before they enter H2, and
    G's estimate is multiplied by it::

        g_hat = scale G(H2, dE/ds / scale)

    A scale that never changes need not be said.

    Args:
        model: contains the layers.
        scale: a number above 0, such as 1 / tokens of a loss that is their mean; a ``torch.amp.GradScaler``, or any
            function without arguments, which is asked at every call of the model.

    Returns:
        The handle: ``remove()`` it, use it in a ``with``, or leave it.

    Raises:
        ValueError: for a scale that is not a finite number above 0.

    >>> import torch
    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), StreamingNorm(3))
    >>> for tokens in (8, 32, 16):
    ...     with loss_scale(model, 1 / tokens):
    ...         y = model(torch.randn(tokens, 4))
    ...     (y.square().sum() / tokens).backward()
    """
    return LossScale(model, scale)
