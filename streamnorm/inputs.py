"""Validation of inputs, independent of shape: not a tensor, not a floating dtype. Imports torch alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def expect_tensor(what: str, x: Any) -> None:
    """Raise unless ``x`` is a tensor.

    Raises:
        TypeError: with its type.

    >>> expect_tensor("the input", [1.0])
    Traceback (most recent call last):
    TypeError: the input has to be a tensor, got list; write torch.as_tensor(x, dtype=torch.float32)
    """
    if not isinstance(x, Tensor):
        numbers = isinstance(x, (list, tuple, int, float)) or hasattr(x, "__array__")
        advice = "; write torch.as_tensor(x, dtype=torch.float32)" if numbers and not _holds_tensors(x) else ""
        raise TypeError(f"{what} has to be a tensor, got {type(x).__name__}{advice}")


def expect_floating(what: str, x: Tensor) -> None:
    """Raise unless the values of ``x`` are real and floating.

    Raises:
        ValueError: with its dtype.

    >>> import torch
    >>> expect_floating("the input", torch.ones(2, dtype=torch.int64))
    Traceback (most recent call last):
    ValueError: the input has to be of a floating dtype, got torch.int64; write x.float()
    """
    if x.is_complex():
        raise ValueError(
            f"{what} has to be real, got {x.dtype}; give its real and imaginary parts as features of their own, for "
            "instance torch.cat([x.real, x.imag], 1)"
        )
    if not x.is_floating_point():
        raise ValueError(f"{what} has to be of a floating dtype, got {x.dtype}; write x.float()")


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and any(isinstance(part, Tensor) for part in x)
