"""How close is close: tolerances derived from the arithmetic, never chosen to pass."""

from __future__ import annotations

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
