"""However a tensor lies in memory, the numbers are the same: x and dy of random strides against the oracle in float64.

An axis of size 1 may have any stride, and torch takes the layout of a tensor from its strides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from cases import ALL_REFS, MIXED, MOMENTS, SHORT, Case, draw, policies_for
from close import rounding
from torch import Tensor

import streamnorm as sn
from streamnorm.ops.backends import using
from streamnorm.oracle import Oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["dense", "permuted", "sliced", "flipped", "offset", "odd strides", "expanded"]


def laid(x: Tensor, layout: str, draw: random.Random) -> Tensor:
    """A tensor of the shape of ``x`` and, unless it is expanded, with its values, that lies in memory in this way."""
    axes = list(range(x.ndim))
    draw.shuffle(axes)
    places = [axis for axis in range(2, x.ndim) if x.shape[axis] > 1]
    if layout in ("permuted", "odd strides"):
        x = x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(x.ndim)])
    if layout == "sliced":
        x = torch.stack([x, x + 1], axes[0] + 1).select(axes[0] + 1, 0)
    if layout == "flipped":
        x = x.flip(axes[:2]).contiguous(memory_format=torch.preserve_format).flip(axes[:2])
    if layout == "offset":
        x = torch.cat([x.new_zeros(5), x.flatten()])[5:].view(x.shape)
    if layout == "odd strides":
        strides = [step if size > 1 else draw.randrange(99) for size, step in zip(x.shape, x.stride(), strict=True)]
        x = x.as_strided(x.shape, strides)
    if layout == "expanded" and len(places) > 1:  # one of two at least, so that no reference is all alike
        x = x.narrow(places[-1], 0, 1).expand(x.shape)
    return x


def drawn(draw_: random.Random) -> Iterator[tuple[sn.Norm, Oracle, tuple[int, ...]]]:
    """Layers of random definitions and shapes, with their oracles."""
    while True:
        name, moment = draw_.choice(list(ALL_REFS)), draw_.choice(MOMENTS)
        # What torch's batch normalization stands in for, as often as all the rest.
        name = draw_.choice([name, "BA1"])
        ref = ALL_REFS[name]
        policy = draw_.choice(policies_for(ref, moment))
        c = draw_.choice([1, 3, 6])
        place = [draw_.choice([1, 1, 3, 4]) for _ in range(draw_.randint(0, 3))]
        if isinstance(ref.features, int) and c % ref.features:
            continue
        layer = sn.Norm(c, ref, moment, policy, affine=True)
        shape = (draw_.choice([1, 1, 2, 3]), c, *place)
        if ref.size(ref.view(torch.empty(shape)).shape) == 1:  # sigma is that of eps, by which all rounding is divided
            continue
        with torch.no_grad():
            assert layer.weight is not None
            assert layer.bias is not None
            layer.weight.copy_(1 + torch.arange(c) / 8), layer.bias.copy_(torch.arange(c) / 4 - 1)
        yield layer, Case(name, moment, policy).oracle(), shape


def near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> None:
    """Computed in float32 or wider, in sums of fewer than 256 values, of data that are rounded twice at most: behind
    the normalization, and behind gain and bias. ``terms``: of a sum."""
    assert got.shape == want.shape, name
    scale = max(want.abs().max().item(), 1.0, 0.0 if terms is None else terms.abs().sum().item())
    bound = rounding(torch.promote_types(dtype, torch.float32), 256, scale) + 2 * torch.finfo(dtype).eps * scale
    worst = (got.double() - want).abs().max().item()
    assert worst <= bound, f"{name}: off by {worst:.2e}, rounding allows {bound:.2e}"


def follow(layer: sn.Norm, oracle: Oracle, shape: tuple[int, ...], dtype: torch.dtype, draw_: random.Random) -> None:
    layer = layer.to(torch.promote_types(dtype, torch.float32))
    weight, bias = layer.weight, layer.bias
    assert weight is not None
    assert bias is not None
    column = (-1, *[1] * (len(shape) - 2))
    w, b = (q.detach().double().reshape(column) for q in (weight, bias))
    rest = [axis for axis in range(len(shape)) if axis != 1]
    trust = layer.policy.trust(shape[0])
    for step in range(3):
        layouts = [draw_.choice(LAYOUTS) for _ in range(2)]
        x, dy = (laid(draw(shape, k).to(dtype), how, draw_) for k, how in zip((step, 100 + step), layouts, strict=True))
        name = f"{layer!r} {shape} x {x.stride()} dy {dy.stride()} step {step}"
        x.requires_grad_()
        if step == 2:
            layer.eval()
        if step == 2 and layer.H1 is not None:
            plain = oracle.evaluate(x.detach().double())
            ones = torch.ones(shape, dtype=torch.float64)
            want_dx = dy.double() * w * (oracle.evaluate(x.detach().double() + ones) - plain)
            trust = 1.0
        else:
            plain = oracle.forward(x.detach().double())
            want_dx = oracle.backward(dy.double() * w)
        y = layer(x)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
        near(f"{name} y", y.detach(), plain * w + b, dtype)
        near(f"{name} dx", dx, want_dx, dtype, dy.abs().max())
        near(f"{name} dgain", dw, trust * (dy.double() * plain).sum(rest), dtype, dy.double() * plain)
        near(f"{name} dbias", db, trust * dy.double().sum(rest), dtype, dy.double())
        if step == 2:
            with torch.no_grad():  # is computed otherwise
                near(f"{name} y", layer(x), plain * w + b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager", "generic"])
def test_any_layout(backend: str, dtype: torch.dtype) -> None:
    draw_ = random.Random(f"{backend} {dtype}")
    layers = drawn(draw_)
    with using(backend):
        for _ in range(60):
            layer, oracle, shape = next(layers)
            follow(layer, oracle, shape, dtype, draw_)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "eager", "generic"])
def test_one_image_that_lies_features_last(backend: str, training: bool) -> None:
    """It is dense in two orders, and torch's batch normalization takes it for the other one going back."""
    for policy, p in ((MIXED, 2), (SHORT, 3), (SHORT, 2)):
        layer = sn.Norm(3, sn.BA1, sn.Lp(p, "estimate"), policy, affine=True).double()
        oracle = Case("BA1", layer.moment, policy).oracle()
        with using(backend):
            layer(draw((9, 3, 7, 7), 0)), oracle.forward(draw((9, 3, 7, 7), 0))
            layer.train(training)
            x = draw((7, 7, 3), 1).permute(2, 0, 1)[None].requires_grad_()
            dy = draw((1, 3, 7, 7), 2)
            (dx,) = torch.autograd.grad(layer(x), x, dy)
        if training:
            oracle.forward(x.detach())
            want = oracle.backward(dy)
        else:
            assert layer.H1 is not None
            want = dy / layer.H1.estimate[1].reshape(1, 3, 1, 1)
        near(f"{policy} {p}", dx, want, torch.float64)
