"""One input, one answer: finite values of any size are normalized right, on every path.

The law: ``layer(a x)`` with ``a^2 eps`` is ``layer(x)``, with ``1 / a`` of its gradient and ``a`` times its statistics.
What is expected is computed in float64 on values near 1, where nothing can overflow.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from close import rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import streamnorm as sn
from streamnorm.definition.ref import REFS
from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.ops import backends, library

NATIVE = pytest.mark.skipif(library.library() is None, reason="there are no compiled kernels")
PATHS = [pytest.param("compiled", marks=NATIVE), pytest.param("strided", marks=NATIVE), "eager", "generic", "traced"]
SAMPLES = [ref for name, ref in REFS.items() if name.startswith("SP")] + [sn.NormRef(2, "all", "one")]
BATCHES = [ref for name, ref in REFS.items() if name.startswith("BA")] + [sn.NormRef(3, "all", "batch")]
SHAPES = [(8, 6), (6, 6, 4, 5), (1, 6, 4, 5), (40, 6)]
EXPONENTS = {torch.float32: (-116, 122), torch.bfloat16: (-116, 122), torch.float64: (-980, 1000)}
"""1e-35 and 5e36, with room for the sums of what is that large to overflow; 1e-295 and 1e301."""


def make(draw: random.Random) -> tuple[Any, Any]:
    """A constructor of a layer, given eps, and its shape of input."""
    kind = draw.choice(["sample", "batch", "default", "paper"])
    ref = draw.choice(SAMPLES if kind == "sample" else BATCHES if kind == "batch" else SAMPLES + BATCHES)
    ref = ref.with_window(3) if ref.place == "local" else ref
    given: dict[str, Any] = {"p": draw.choice([1, 1.5, 2, 2, 2, 3, 4]), "affine": draw.random() < 0.5, "ref": ref}
    given["center"] = draw.choice(["batch", "zero"] + (["estimate"] * 2 if kind in ("default", "paper") else []))
    if kind == "paper":
        given["alpha"] = 0.7, 0.3
    of = {"sample": sn.SampleNorm, "batch": sn.BatchNorm}.get(kind, sn.StreamingNorm)
    return lambda eps: of(6, eps=eps, **given), draw.choice(SHAPES)


def lay(x: Tensor, layout: str) -> Tensor:
    """``x`` in another order of memory; a leaf."""
    if layout == "strided":
        wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        x = wide[..., ::2]
    elif layout == "last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.detach().requires_grad_()


def run(layer: Any, xs: list[Tensor], dys: list[Tensor], layout: str, call: Any = None) -> dict[str, Tensor]:
    """Everything that a few updates and a test make of a layer: outputs, gradients, what is remembered."""
    seen: dict[str, Tensor] = {}
    if layer.affine is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 6))
            layer.bias.copy_(torch.linspace(-1, 1, 6))
    for t, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        if t == len(xs) - 1:
            layer.eval()
        x = lay(x, layout)
        y = (layer if call is None else call)(x)
        y.backward(dy)
        seen |= {f"y{t}": y.detach(), f"dx{t}": x.grad}  # type: ignore[dict-item]
        if layer.affine is not None:
            seen |= {f"dw{t}": layer.weight.grad, f"db{t}": layer.bias.grad}
            layer.weight.grad = layer.bias.grad = None
        for memory in (layer.H1, layer.H2):
            if memory is not None:
                memory.fold()
    if layer.H1 is not None:
        seen["H1"] = layer.H1.estimate
        assert not layer.H1.skipped
    if layer.H2 is not None:
        seen["H2"] = layer.H2.estimate
        assert not layer.H2.skipped
    return seen


def agree(got: dict[str, Tensor], want: dict[str, Tensor], exponent: int, dtype: torch.dtype, terms: int) -> None:
    """``got`` of values times ``2**exponent`` is ``want`` up to rounding, in units of ``want``."""
    for name, value in got.items():
        back = {"dx": exponent, "H2": exponent, "H1": -exponent}.get(name[:2], 0)
        value = value.double()
        for half in (back // 2, back - back // 2):  # 2**1000 is a number, 2**1030 is none
            value = value * 2.0**half
        assert value.isfinite().all(), f"{name}: not finite"
        bound = rounding(dtype, terms, max(1, want[name].abs().max().item()))
        worst = (value - want[name]).abs().max().item()
        assert worst <= bound, f"{name}: off by {worst:.2e}, rounding allows {bound:.2e}"


def compare(draw: random.Random, layout: str, exponent: int, dtype: torch.dtype) -> None:
    while True:
        eps = draw.choice([1e-5, 0.0]) if exponent > -400 else 0.0
        build, shape = make(draw)
        layout = "dense" if shape[0] == 1 and layout == "last" else layout
        generator = torch.Generator().manual_seed(draw.randrange(10**6))
        xs, dys = ([torch.randn(shape, generator=generator).to(dtype).double() for _ in range(4)] for _ in range(2))
        terms = math.prod(shape)
        unit = 2.0**-exponent
        try:
            with backends.using("generic"):
                want = run(build(eps * unit * unit).double(), xs, dys, "dense")
        except DegenerateReferenceError:
            continue
        if all(value.isfinite().all() for value in want.values()):  # with eps = 0, one value has no deviation
            break
    layer = build(eps).to(torch.float64 if dtype == torch.float64 else torch.float32)
    big = [(x * 2.0**exponent).to(dtype) for x in xs]
    got = run(layer, big, [dy.to(dtype) for dy in dys], layout)
    try:
        agree(got, want, exponent, dtype, terms)
    except AssertionError as error:
        raise AssertionError(f"{layer!r} of {shape}, {layout}, 2**{exponent}, {dtype}, eps={eps}: {error}") from None


class Watched(TorchDispatchMode):
    """Somebody who watches operations: layers do what they do for a compiler."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextmanager
def on(path: str) -> Iterator[None]:
    with (
        Watched() if path == "traced" else nullcontext(),
        backends.using(path if path in ("eager", "generic") else None),
    ):
        yield


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(30))
def test_any_scale(path: str, seed: int) -> None:
    """Values from 1e-35 to 1e37 and their like in float64 have the answer of values near 1."""
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    low, high = EXPONENTS[dtype]
    exponent = draw.choice([low, high, draw.randint(low, high)])
    layout = "strided" if path == "strided" else draw.choice(["dense", "last"])
    with on(path):
        compare(draw, layout, exponent, dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_layer() -> None:
    """What a compiler makes of the traced path, which ``test_any_scale`` is about."""
    generator = torch.Generator().manual_seed(0)
    xs, dys = ([torch.randn(8, 6, generator=generator) for _ in range(2)] for _ in range(2))
    layer, twin = (sn.StreamingNorm(6, eps=eps) for eps in (1e-5, 1e-5 / 4.0**122))
    want = run(twin.double(), [x.double() for x in xs], [dy.double() for dy in dys], "dense")
    got = run(layer, [x * 2.0**122 for x in xs], dys, "dense", torch.compile(layer))
    agree(got, want, 122, torch.float32, 8)


OUTLIERS = 1e20, -3e37
LAID = [((8, 6), "dense"), ((4, 6, 3, 3), "dense"), ((4, 6, 3, 3), "last")]
LAYERS = [
    lambda p: sn.SampleNorm(6, p=p),
    lambda p: sn.BatchNorm(6, p=p),
    lambda p: sn.StreamingNorm(6, p=p),
    lambda p: sn.StreamingNorm(6, p=p, alpha=(0.7, 0.3)),
]


def with_outlier(shape: tuple[int, ...], value: float) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs, dys = ([torch.randn(shape, generator=generator) for _ in range(4)] for _ in range(2))
    xs[1].view(-1)[7] = value
    return xs, dys


@functools.cache
def of_float64(of: int, p: float, shape: tuple[int, ...], value: float) -> dict[str, Tensor]:
    """What every path is compared with."""
    xs, dys = with_outlier(shape, value)
    with backends.using("generic"):
        return run(LAYERS[of](p).double(), [x.double() for x in xs], [dy.double() for dy in dys], "dense")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("turn", "p"), [*enumerate((1, 1.5, 2, 3, 4))])
def test_one_outlier(path: str, turn: int, p: float) -> None:
    """One finite value whose square is no number: everything is what float64 makes of it, and the memory too."""
    for i, (shape, layout) in enumerate(LAID):
        layout = "strided" if path == "strided" else layout
        for k, of in enumerate(LAYERS):
            value = OUTLIERS[(turn + i + k) % 2]
            xs, dys = with_outlier(shape, value)
            want = of_float64(k, p, shape, value)
            layer = of(p)
            with on(path):
                got = run(layer, xs, dys, layout)
            for name, right in want.items():
                by = right.abs().amax().clamp_min(1e-40)
                worst = ((got[name].double() - right) / by).abs().max().item()
                bound = rounding(torch.float32, math.prod(shape))
                assert worst <= bound, f"{layer!r} {shape} {layout} {name}: off by {worst:.1e} of {bound:.1e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_what_no_number_can_hold_shows_and_is_not_remembered(path: str, p: float) -> None:
    """A deviation beyond the largest number: y is not finite, and the memory stays what it was and counts it."""
    for layer in (sn.BatchNorm(6, p=p), sn.StreamingNorm(6, p=p), sn.StreamingNorm(6, p=p, alpha=(0.7, 0.3))):
        with on(path):
            layer(lay(torch.randn(8, 6), path))
            before = {name: value.clone() for name, value in layer.H1.state().items()}
            x = torch.randn(8, 6)
            x[:, 2] = torch.tensor([3.4e38, -3.4e38] * 4)
            x[0, 3] = math.inf
            assert not layer(lay(x, path)).isfinite().all()
        assert layer.H1.skipped == 1
        for name, value in layer.H1.state().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("path", PATHS)
def test_a_jump_of_the_mean_does_not_spoil_the_coefficients(path: str) -> None:
    """In Setting A sigma says nothing of a mean that jumps: y is huge, and G's regression on it stays finite."""
    for jump in (1e12, 1e17, 1e25):
        layer, twin = sn.StreamingNorm(4, center="batch"), sn.StreamingNorm(4, center="batch").double()
        for t in range(4):
            z, dy = torch.randn(16, 4), torch.randn(16, 4)
            x = z + jump * (torch.arange(16) % 2 * 0 + 1).reshape(-1, 1) if t == 2 else z
            with on(path):
                layer(leaf := lay(x, path)).backward(dy)
            with backends.using("generic"):
                twin(x.double().requires_grad_()).backward(dy.double())
            layer.fold(), twin.fold()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
            assert layer.H2.theta.isfinite().all(), f"{jump} {t}"
            off, largest = (layer.H2.theta - twin.H2.theta).abs().max(), twin.H2.theta.abs().max().item()
            assert off <= rounding(torch.float32, 64, largest), f"{jump} {t}"
