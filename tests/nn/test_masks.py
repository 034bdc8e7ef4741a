"""Masks: statistics and gradients of what is real, equal to the computation on cropped or packed inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.nn.norm import Norm
from streamnorm.ops import backends

LAYERS: dict[str, Any] = {
    "streaming": sn.StreamingNorm,
    "the paper's rule": partial(sn.StreamingNorm, alpha=(0.7, 0.3), beta=(0.7, 0.1, 0.2)),
    "p = 1, C": partial(sn.StreamingNorm, p=1, center="zero"),
    "p = 3, BA2": partial(sn.StreamingNorm, ref=sn.BA2, p=3),
    "batch": sn.BatchNorm,
    "layer": sn.SampleNorm,
    "instance": partial(sn.SampleNorm, ref=sn.SP1),
    "each position": partial(sn.SampleNorm, ref=sn.SP5),
    "groups, p = 4": partial(sn.SampleNorm, ref=sn.NormRef(2, "all", "one"), p=4),
    "streaming layer norm": partial(sn.StreamingNorm, ref=sn.SP2),
}
EVERY = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def pair(make: Any, c: int = 4) -> tuple[Norm, Norm]:
    layers = make(c).double(), make(c).double()
    for layer in layers:
        torch.manual_seed(0)
        for p in layer.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
    return layers


def called(layer: Norm, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x) if mask is None else layer(x, mask=mask)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def same_inside(one: Norm, other: Norm) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@EVERY
def test_padded_maps_are_the_cropped_ones(make: Any) -> None:
    cropped, padded = pair(make)
    torch.manual_seed(1)
    for _ in range(3):
        x, dy = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64) + 5
        mask = torch.zeros(3, 5, 6, dtype=torch.bool)
        mask[:, :3, :4] = True
        y, dx = called(cropped, x[:, :, :3, :4], dy[:, :, :3, :4])
        x = torch.where(mask[:, None], x, torch.nan)  # whatever stands there
        got, gradient = called(padded, x, dy, mask)
        torch.testing.assert_close(got[:, :, :3, :4], y, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradient[:, :, :3, :4], dx, rtol=1e-9, atol=1e-11)
        assert not got.masked_select(~mask[:, None]).any()
        assert not gradient.masked_select(~mask[:, None]).any()
        same_inside(cropped, padded)
        cropped.fold(), padded.fold()
    cropped.eval(), padded.eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    mask = torch.rand(2, 5, 6) > 0.5
    want = cropped(x) if cropped.H1 is not None else None
    got = padded(x, mask=mask)
    assert not got.masked_select(~mask[:, None]).any()
    if want is not None:
        torch.testing.assert_close(got, want.masked_fill(~mask[:, None], 0), rtol=1e-9, atol=1e-11)


@EVERY
def test_a_mask_of_everything_is_none(make: Any) -> None:
    plain, masked = pair(make)
    x, dy = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    for a, b in zip(called(plain, x, dy), called(masked, x, dy, torch.ones(3, 7, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    same_inside(plain, masked)


@pytest.mark.parametrize("name", ["batch", "instance", "layer"])
def test_sequences_of_several_lengths(name: str) -> None:
    """Batch normalization is that of the packed rows; a sample by itself is that of its own length."""
    cropped, padded = pair(LAYERS[name])
    lengths = [7, 2, 5]
    x, dy = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    y, dx = called(padded, x, dy, mask)
    if name == "batch":
        rows, gradients = (t.movedim(1, -1)[mask] for t in (x, dy))
        want = called(cropped, rows, gradients)
        got = [t.movedim(1, -1)[mask] for t in (y, dx)]
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
        same_inside(cropped, padded)
        return
    for i, length in enumerate(lengths):
        want = called(cropped, x[i : i + 1, :, :length], dy[i : i + 1, :, :length])
        for a, b in zip(want, (y, dx), strict=True):
            torch.testing.assert_close(b[i : i + 1, :, :length], a, rtol=1e-9, atol=1e-11)


def test_large_means_lose_no_precision_and_large_values_do_not_overflow() -> None:
    mask = torch.rand(64, 9) > 0.3
    layer = sn.BatchNorm(2)
    x = torch.randn(64, 2, 9)
    want = layer(x, mask=mask)
    torch.testing.assert_close(layer(x + 4096, mask=mask), want, rtol=0, atol=5e-3)
    assert layer(x * 1e37, mask=mask).isfinite().all()


def test_nothing_real_changes_nothing() -> None:
    layer = sn.StreamingNorm(4)
    x = torch.randn(2, 4, 3, requires_grad=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    y.sum().backward()
    assert not y.any()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert layer.weight is not None
    assert torch.equal(layer.weight.grad, torch.zeros(4))


@pytest.mark.parametrize("make", [sn.StreamingNorm, sn.SampleNorm])
def test_masks_compile(make: Any) -> None:
    torch._dynamo.reset()
    plain, compiled = pair(make)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x, mask = torch.randn(3, 4, 7, dtype=torch.float64), torch.rand(3, 7) > 0.4
    torch.testing.assert_close(run(x, mask=mask), plain(x, mask=mask), rtol=1e-9, atol=1e-11)
    same_state = zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b) for a, b in same_state)


@pytest.mark.parametrize("backend", ["eager", "generic"])
def test_every_backend_masks(backend: str) -> None:
    plain, limited = pair(sn.StreamingNorm)
    x, dy = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.4
    want = called(plain, x, dy, mask)
    with backends.using(backend):
        got = called(limited, x, dy, mask)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a)


BAD: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(3, 7), TypeError, r"torch\.bool, true where x is real, got torch\.float32; write mask\.bool\(\)"),
    ([True], TypeError, "got list"),
    (torch.ones(3, 4, 7, dtype=torch.bool), ValueError, r"is \(3, 7\), without the feature axis, got \(3, 4, 7\)"),
    (torch.ones(7, dtype=torch.bool), ValueError, r"is \(3, 7\)"),
]


@pytest.mark.parametrize(("mask", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_a_mask_that_is_none_is_refused(mask: Any, error: type[Exception], said: str) -> None:
    layer = sn.StreamingNorm(4)
    with pytest.raises(error, match=said):
        layer(torch.randn(3, 4, 7), mask=mask)
    assert not layer.H1.seen


@pytest.mark.parametrize("ref", [sn.BA3, sn.BA4, sn.BA5, sn.BA6, sn.SP3, sn.SP4], ids=repr)
def test_references_that_could_be_left_empty_are_refused(ref: sn.NormRef) -> None:
    with pytest.raises(ValueError, match="use a reference over all places"):
        sn.StreamingNorm(4, ref=ref)(torch.randn(3, 4, 7), mask=torch.ones(3, 7, dtype=torch.bool))
