"""Windows in closed form: as exact as the definition where squares would lose digits, and chosen where they serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import streamnorm as sn
from streamnorm.definition.layer import Definition
from streamnorm.definition.operation import Standardize
from streamnorm.definition.ref import REFS, window_mean
from streamnorm.ops import windows
from streamnorm.ops.backends import BACKENDS, choose, using

LOCAL = ("SP3", "SP4", "BA3", "BA4")


def passed(name: str, center: str, x: Tensor, dy: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a layer's second call."""
    layer = sn.Norm(x.shape[1], REFS[name], sn.Lp(2, center), sn.Streaming(beta=(0.3, 0.3, 0.4))).to(x.dtype)  # type: ignore[arg-type]
    with using(backend):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            layer.fold()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, dy


@pytest.mark.parametrize("center", ["batch", "estimate", "zero"])
@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize(("far", "loud"), [(3000.0, 1.0), (0.0, 300.0)], ids=["large mean", "loud beside quiet"])
def test_float32_loses_no_more_than_the_definition(name: str, center: str, far: float, loud: float) -> None:
    x, dy = drawn(3, 4, 9, 8)
    x[..., :4] *= loud
    x = (x + far).float().double()
    want = passed(name, center, x, dy, "generic")
    got = passed(name, center, x.float(), dy.float(), "eager")
    slow = passed(name, center, x.float(), dy.float(), "generic")
    for what, a, b, c in zip(("y", "dx"), got, want, slow, strict=True):
        scale = b.abs().amax((0, 1), keepdim=True)  # of each place: quiet ones have gradients of their own size
        off, own = (((v.double() - b) / scale).abs().max().item() for v in (a, c))
        assert off <= 4 * own + 1e-4, f"{what} off by {off:.1e}, the definition by {own:.1e}"


@pytest.mark.parametrize("window", [1, 3, 5, 7, 15])
def test_the_mean_of_a_window_is_that_of_what_it_covers(window: int) -> None:
    x = drawn(2, 3, 1, 1, 7, 6)[0]
    got, reach = window_mean(x, window), window // 2
    for i in range(7):
        for j in range(6):
            part = x[..., max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            assert torch.allclose(got[..., i, j], part.mean((-1, -2)), rtol=1e-14, atol=1e-14)


def test_what_is_not_finite_stays_in_its_windows() -> None:
    x = torch.zeros(1, 1, 1, 1, 9)
    x[..., 4] = torch.inf
    assert window_mean(x, 3).isfinite().flatten().tolist() == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", LOCAL)
def test_who_computes_a_window(name: str) -> None:
    x = torch.zeros(1, 2, 2, 1, 6, 6)
    for p, backend in ((2, "eager"), (1, "generic"), (3, "generic")):
        d = Definition(REFS[name], sn.Lp(p), Standardize())
        assert choose(d, x) is BACKENDS[backend]
    assert BACKENDS["cpu"].unsupported(Definition(REFS[name], sn.Lp(2), Standardize())) == "the reference is a window"


def test_a_gradient_that_would_lose_its_digits_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    define = windows.generic.input_grad
    monkeypatch.setattr(windows.generic, "input_grad", lambda *all_: (asked.append("generic"), define(*all_))[1])
    x, dy = (of.float() for of in drawn(2, 3, 12, 12))
    passed("SP4", "batch", x, dy, None)
    assert not asked
    x[..., :6] *= 1e6
    passed("SP4", "batch", x, dy, None)
    assert asked
