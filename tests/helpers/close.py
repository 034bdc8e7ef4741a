"""How close is close: tolerances derived from the arithmetic, never chosen to pass; and what is equal to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rounding(dtype: torch.dtype, terms: int, scale: float = 1.0) -> float:
    """Bound on the error of a quantity of size ``scale`` that took sums of ``terms`` values: each addition rounds by
    half an eps of the running total, in the worst case all the same way; 16 for the few operations around the sums."""
    return 16 * terms * torch.finfo(dtype).eps * scale


def assert_close(name: str, got: Tensor, want: Tensor, terms: int = 1, dtype: torch.dtype | None = None) -> None:
    """``got`` equals ``want`` up to rounding in ``dtype`` (of ``got``), relative to the largest value of ``want``."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
    bound = rounding(dtype or got.dtype, terms, scale)
    worst = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    assert worst <= bound, f"{name}: off by {worst:.2e}, rounding allows {bound:.2e}"


def same(a: Any, b: Any) -> bool:
    """Whether two nests are equal to the bit: in structure, types, dtypes, shapes and values; "seconds" may differ."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(k == "seconds" or same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):  # of a tuple a checkpoint makes a list
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
