"""The compiled kernels' backend: closed forms for p = 1 and 2 over references that are whole axes, on a CPU.

Besides the five functions of a backend there are fused operators for statistics, F or G and map together
(``streamnorm.ops.fused`` uses them). This module computes what the C code needs to know: where the rows of a tensor
are and which of them share a statistic (drawn in ``csrc/norm.h``). Imports the definitions and the library.

Legend: ``n = g m`` inputs, ``c = G q`` features, ``P`` places.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, strided
from torch.nn import Parameter

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.definition.operation import Scale
from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import all_squarable
from streamnorm.ops import eager, library
from streamnorm.tracing import is_traced

__all__ = ["apply", "input_grad", "mean", "sigma", "stat_grads", "unsupported"]

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The data dtypes that have kernels."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, state and weights for data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Plan(ctypes.Structure):
    """A kernel's parameters for one layer and input shape: ``sn_plan`` of ``csrc/norm.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("k0", "k1", "r0", "r1", "L", "xk0", "xk1", "xr0", "xr1")),
        *((name, ctypes.c_int32) for name in ("columns", "p", "center", "uses_estimate", "scale", "reversed")),
        *((name, ctypes.c_double) for name in ("eps", "unit", "samples", "trust")),
    ]

    @property
    def slots(self) -> int:
        """``S``, the number of statistics in one step."""
        return self.k1 * (self.L if self.columns else 1)


class RuleNumbers(ctypes.Structure):
    """The parameters of F or G: ``sn_rule`` of ``csrc/rule.h``."""

    _fields_ = [("kind", ctypes.c_int64), ("numbers", ctypes.c_double * 3)]


LONG_SHORT, EXPONENTIAL, POOLED, RESIDUAL = range(4)
"""The kinds of rule that the kernels support."""


class Places(ctypes.Structure):
    """The indices of a memory's members in its two buffers: ``sn_places`` of ``csrc/call.h``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("long", "short", "estimate", "tables")),
        *((name, ctypes.c_int32) for name in ("count", "updates", "seen", "skipped", "counts")),
    ]


class Stream(ctypes.Structure):
    """A memory and its rule: ``sn_stream`` of ``csrc/call.h``."""

    _fields_ = [("rule", RuleNumbers), ("at", Places), ("keep", ctypes.c_double * 2)]


AXES = 8
"""The most axes of a tensor that the operators take."""


class Call(ctypes.Structure):
    """The operators' parameters for one kind of input to one layer: ``sn_call`` of ``csrc/call.h``."""

    _fields_ = [
        ("plan", Plan),
        ("ndim", ctypes.c_int64),
        *((name, ctypes.c_int64 * AXES) for name in ("shape", "stride")),
        *((name, ctypes.c_int64) for name in ("slots", "kept", "scratch")),
        *((name, ctypes.c_int32) for name in ("dtype", "has_f", "has_g", "reserved")),
        *((name, Stream) for name in ("f", "g")),
    ]

    def tensor(self) -> Tensor:
        """The struct as a tensor of bytes, for the operators."""
        return torch.frombuffer(bytearray(self), dtype=torch.uint8)


_ARGUMENTS = {"moments": 4, "map": 5, "sums": 6, "input": 8}
"""How many pointers each kernel takes, followed by the number of threads."""


@cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """The compiled function ``name`` for data of ``dtype``."""
    return library.function(
        f"{name}_{NAMES[dtype]}", [ctypes.c_void_p] * _ARGUMENTS[name] + [ctypes.c_int], ctypes.c_int
    )


def unsupported(d: Definition) -> str | None:
    """Why there are no kernels for a definition (they are for p = 1 or 2, whole axes, the built-in S and N) or none at
    all; None: there are."""
    if (why := eager.unsupported(d)) is not None:
        return why
    if d.ref.place == "local":
        return "the reference is a window"
    if d.moment.p not in (1, 2):
        return f"kernels are for p = 1 and 2, not {d.moment.p:g}"
    return None if library.library() is not None else "there are no compiled kernels"


def takes(x: Tensor) -> bool:
    """Whether the kernels can read ``x`` and its operations are not recorded (tracing, compiling, transforms)."""
    return (
        not is_traced()
        and (type(x) is Tensor or type(x) is Parameter)
        and x.is_cpu
        and x.layout is strided
        and x.dtype in NAMES
        and not x.is_neg()
        and not x.is_inference()
    )


# --- where the rows are ---


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether values are contiguous in the order of the axes."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def features_last(shape: Sequence[int], stride: Sequence[int]) -> bool | None:
    """The memory format of ``x (n, c, *place)``: True for features last (channels_last, and (n, c)), False for places
    last (contiguous), None for any other."""
    n, c, *place = shape
    if math.prod(place) > 1 and is_dense(shape, stride):
        return False
    return True if is_dense((n, *place, c), (stride[0], *stride[2:], stride[1])) else None


def rows(ref: NormRef, steps: int, shape: Sequence[int], last: bool) -> dict[str, int] | None:
    """The rows of ``x (n, c, *place)`` and their slots, or None if they have no regular pattern."""
    n, c, *places = shape
    g, m = steps, n // steps
    groups = ref.groups(c)
    q, P = c // groups, math.prod(places)
    batch = ref.samples == "batch"
    k0, xk0, samples = (g, m * c * P, m) if batch else (n, c * P, 1)
    one = {"k1": 1, "xk1": 0, "r1": 1, "xr1": 0}
    if ref.place == "all" or P == 1:
        if not last:
            found = {"L": q * P, "k1": groups, "xk1": q * P, "r0": samples, "xr0": c * P, "r1": 1, "xr1": 0}
        elif q == 1:
            found = {**one, "columns": 1, "L": c, "r0": samples * P, "xr0": c}
        elif groups == 1:
            found = {**one, "L": samples * P * c, "r0": 1, "xr0": 0}
        else:
            found = {"L": q, "k1": groups, "xk1": q, "r0": samples, "xr0": c * P, "r1": P, "xr1": c}
    elif last:
        if groups != 1:
            return None
        found = {"L": c, "k1": P, "xk1": c, "r0": samples, "xr0": c * P, "r1": 1, "xr1": 0}
    else:
        if q == 1:
            count, apart = samples, c * P
        elif groups == 1 or samples == 1:
            count, apart = samples * q, P
        else:
            return None
        found = {"columns": 1, "L": P, "k1": groups, "xk1": q * P, "r0": count, "xr0": apart, "r1": 1, "xr1": 0}
    return {"k0": k0, "xk0": xk0, **found}


@lru_cache(maxsize=256)
def plan(
    d: Definition,
    steps: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    uses_estimate: bool = False,
    is_reversed: bool = False,
    unit: float = 1.0,
    trust: float = 1.0,
) -> Plan | None:
    """The kernel parameters for ``x (n, c, *place)`` of this shape and stride; None: there is no kernel for it."""
    last = features_last(shape, stride)
    found = None if last is None or 0 in shape else rows(d.ref, steps, shape, last)
    if found is None:
        return None
    center = ("batch", "estimate", "zero").index(d.moment.center)
    return Plan(
        **found,
        p=int(d.moment.p),
        center=center,
        uses_estimate=uses_estimate,
        scale=type(d.op) is Scale,
        reversed=is_reversed,
        eps=d.moment.eps,
        unit=unit,
        samples=shape[0] // steps,
        trust=trust,
    )


# --- the five functions of a backend, on the canonical view (g, m, G, q, *place) ---


def mean(x: Tensor, d: Definition) -> Tensor:
    """``mu`` of every reference."""
    told, x = _told(x, d)
    if told is None:
        return eager.mean(x, d)
    found = _moments(x, d, told, None)
    return found if found.abs().sum().isfinite() else eager.mean(x, d)


def sigma(x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
    """``sigma`` of every reference."""
    told, x = _told(x, d)
    if told is None:
        return eager.sigma(x, d, mu, center)
    about = {"batch": mu, "estimate": center, "zero": torch.zeros_like(mu)}[d.moment.center]
    assert about is not None
    value = _moments(x, d, told, _own(about, mu.shape))
    found = value + d.moment.eps**0.5 if d.moment.p == 1 else (value + d.moment.eps).sqrt()
    return found if all_squarable(found) else eager.sigma(x, d, mu, center)


def apply(x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> Tensor:
    """``y = N(x, s_hat)``."""
    told, x = _told(x, d)
    if told is None:
        return eager.apply(x, d, mu_hat, sigma_hat)
    y, shape = torch.empty_like(x), _stat_shape(x, d)
    shift = None if type(d.op) is Scale else _own(mu_hat, shape)
    scale = _own(1 / sigma_hat, shape)
    _call("map", x, told, x, shift, scale, y)
    return y


def stat_grads(dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
    told, x = _told(x, d)
    if told is None or not all_squarable(sigma_hat):
        return eager.stat_grads(dy, x, d, mu_hat, sigma_hat)
    shape, dy = _stat_shape(x, d), like(dy, x)
    s1, s2 = (x.new_empty(shape, dtype=mu_hat.dtype) for _ in range(2))
    shift = None if type(d.op) is Scale else _own(mu_hat, shape)
    _call("sums", x, told, x, dy, shift, s1, s2)
    if s1.shape[1] != mu_hat.shape[1]:  # one estimate for the m samples of a mini-batch
        s1, s2 = s1.sum(1, keepdim=True), s2.sum(1, keepdim=True)
    return torch.zeros_like(s1) if shift is None else -s1 / sigma_hat, -s2 / sigma_hat / sigma_hat


def input_grad(dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
    told, x = _told(x, d)
    uncommon = d.moment.p == 1 and d.moment.center == "batch"
    if told is None or uncommon or not all_squarable(s.sigma, s.sigma_hat):
        return eager.input_grad(dy, x, d, s, g_mu, g_sigma)
    shape, dy, dx = s.mu.shape, like(dy, x), torch.empty_like(x)
    center = {"batch": s.mu, "estimate": s.center, "zero": None}[d.moment.center]
    count = x.numel() // s.mu.numel()
    slope = g_sigma / count if d.moment.p == 1 else g_sigma / (count * s.sigma)
    about = None if center is None else _own(center, shape)
    scale, slope, level = _own(1 / s.sigma_hat, shape), _own(slope, shape), _own(g_mu / count, shape)
    _call("input", x, told, x, dy, scale, about, slope, level, dx)
    return dx


def like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` with the strides and dtype of ``x``."""
    if dy.stride() == x.stride() and dy.dtype == x.dtype and not dy.is_neg():
        return dy
    return torch.empty_like(x).copy_(dy)


def _told(x: Tensor, d: Definition) -> tuple[Plan | None, Tensor]:
    if not takes(x) or not x.numel():
        return None, x
    g = len(x)
    merged = x.flatten(2, 3).flatten(0, 1)
    if merged.data_ptr() != x.data_ptr():  # flatten had to copy
        return None, x
    return plan(d, g, tuple(merged.shape), merged.stride()), x


def _stat_shape(x: Tensor, d: Definition) -> list[int]:
    reduced = d.ref.dims(x.ndim)
    return [1 if axis in reduced else size for axis, size in enumerate(x.shape)]


def _own(table: Tensor, shape: Sequence[int]) -> Tensor:
    return table.expand(shape).contiguous()


def _moments(x: Tensor, d: Definition, told: Plan, center: Tensor | None) -> Tensor:
    out = x.new_empty(_stat_shape(x, d), dtype=wide(x.dtype))
    _call("moments", x, told, x, center, out)
    return out


def _call(name: str, x: Tensor, told: Plan, *tensors: Tensor | None) -> None:
    pointers: list[Any] = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if kernel(name, x.dtype)(ctypes.byref(told), *pointers, torch.get_num_threads()):
        raise MemoryError(f"the kernel {name!r} found no memory for its partial sums")
