"""Layers of torch's become ours, and compute the same."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchs import BATCH, SAMPLE, data, trained

import streamnorm as sn

TIGHT = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-6}
"""Of outputs near 1: 1e-6 as promised; in float64 its own rounding; in bfloat16, 8 bits, a few units of the last."""


def close(a: Tensor, b: Tensor) -> bool:
    tolerance = TIGHT[a.dtype]
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# Outputs


TARGETS = [sn.StreamingNorm, sn.BatchNorm, partial(sn.StreamingNorm, alpha=(0.7, 0.3)), lambda c: sn.BatchNorm(c)]


@pytest.mark.parametrize(
    ("name", "dtype", "to"),
    [
        (name, dtype, to)
        for i, name in enumerate(BATCH)
        for j, dtype in enumerate(TIGHT)
        for k, to in enumerate(TARGETS)
        if (i + j + k) % 2
    ],
)
def test_a_trained_batch_normalization_evaluates_as_before(name: str, dtype: torch.dtype, to: Any) -> None:
    make, shape = BATCH[name]
    theirs = trained(make(), shape).to(dtype).eval()
    ours = sn.convert(copy.deepcopy(theirs), to)
    assert isinstance(ours, sn.Norm)
    assert not ours.training
    x = data(shape, 9).to(dtype)
    assert close(ours(x), theirs(x))


@pytest.mark.parametrize("name", BATCH)
def test_batch_normalization_trains_as_torchs_on_each_batch(name: str) -> None:
    make, shape = BATCH[name]
    theirs = trained(make(), shape).double()
    ours = sn.convert(copy.deepcopy(theirs), sn.BatchNorm)
    xs = [data(shape, 9).requires_grad_() for _ in range(2)]
    ys = [ours(xs[0]), theirs(xs[1])]
    assert close(*ys)
    for y in ys:
        y.square().sum().backward()
    assert close(xs[0].grad, xs[1].grad)
    assert all(close(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.moment.eps == theirs.eps
    assert ours.policy.rate == theirs.momentum


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SAMPLE)
def test_normalization_of_each_sample_computes_the_same(name: str, training: bool, dtype: torch.dtype) -> None:
    make, shapes = SAMPLE[name]
    theirs = trained(make(), *shapes).to(dtype).train(training)
    if name == "plain rms":
        theirs.eps = 1e-5  # eps=None is that of the input's dtype, which a layer without a weight cannot tell
    ours = sn.convert(copy.deepcopy(theirs), sn.SampleNorm)
    assert ours.training == training
    for step, shape in enumerate(shapes):
        xs = [data(shape, step).to(dtype).requires_grad_() for _ in range(2)]
        ys = [ours(xs[0]), theirs(xs[1])]
        assert close(*ys), shape
        for layer, y in zip((ours, theirs), ys, strict=True):
            layer.zero_grad()
            (y * torch.arange(y.numel()).reshape(y.shape).to(dtype)).sum().backward()
        if dtype == torch.float64:
            assert all(
                torch.allclose(a.grad, b.grad, atol=1e-9)
                for a, b in zip((xs[0], *ours.parameters()), (xs[1], *theirs.parameters()), strict=True)
            )


@pytest.mark.parametrize("training", [True, False])
def test_instance_normalization_with_running_statistics_is_streamed(training: bool) -> None:
    theirs = trained(nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 6, 5, 3)).eval()
    ours = sn.convert(copy.deepcopy(theirs))
    for shape in ((4, 6, 5, 3), (6, 6, 3)):
        assert close(ours(data(shape, 9).float()), theirs(data(shape, 9).float()))
    assert ours.norm.ref == sn.SP1
    assert ours.train()(torch.randn(6, 6, 3)).shape == (6, 6, 3)
    with pytest.raises(ValueError, match=r"tests with running statistics .*; convert it to StreamingNorm"):
        sn.convert(theirs, sn.SampleNorm)


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.LayerNorm((2, 3))])
@pytest.mark.parametrize("to", [sn.StreamingNorm, sn.BatchNorm])
def test_layer_normalization_can_become_one_with_a_memory(layer: nn.Module, to: Any) -> None:
    last = tuple(getattr(layer, "normalized_shape", ()))
    shape = (8, 5, *last) if last else (8, 6, 5)
    ours = sn.convert(copy.deepcopy(layer), to)
    with pytest.warns(UserWarning, match="before it has seen"):
        copy.deepcopy(ours).eval()(torch.randn(shape))
    x = 3 * torch.randn(shape) + 1
    y = ours(x)
    rows = y.reshape(-1, 6) if last else y.transpose(1, 2).reshape(-1, 6)
    flat = x.reshape(-1, 6) if last else x.transpose(1, 2).reshape(-1, 6)
    if isinstance(layer, nn.RMSNorm):
        # per feature, about 0 and without a shift
        assert torch.allclose((rows / flat).std(0), torch.zeros(6), atol=1e-5)
    elif to is sn.BatchNorm:
        assert torch.allclose(rows.mean(0), torch.zeros(6), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_transformer_computes_the_same_in_training_and_evaluation() -> None:
    """In evaluation torch's encoder takes eps, weight and bias of its norms and calls fused code in their place."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    ours = sn.convert(copy.deepcopy(theirs), sn.SampleNorm)
    x = torch.randn(3, 8, 8)
    mask = torch.tensor([[False] * 8, [False] * 5 + [True] * 3, [False] * 7 + [True]])
    for mode in (True, False):
        for model in (ours, theirs):
            model.train(mode)
        for keys in (None, mask):
            with torch.no_grad():
                ys = [model(x, src_key_padding_mask=keys) for model in (ours, theirs)]
            seen = ~mask if keys is not None else slice(None)
            assert torch.allclose(ys[0][seen], ys[1][seen], atol=2e-6), (mode, keys is None)
    streaming = sn.convert(copy.deepcopy(theirs).train())
    streaming(x)
    with torch.no_grad():  # as torch demands of its fused code
        y, z = streaming.eval()(x), theirs(x)
    assert not torch.allclose(y, z, atol=0.01)  # it is not the fused layer normalization that answers


@pytest.mark.parametrize("to", [sn.StreamingNorm, sn.BatchNorm, partial(sn.StreamingNorm, center="batch", ref=sn.BA2)])
def test_a_gain_without_a_bias_learns_as_one_with_a_bias_of_0(to: Any) -> None:
    alone, both = (sn.convert(nn.LayerNorm(6, bias=bias), to) for bias in (False, True))
    assert alone.bias is None
    assert repr(alone.norm.affine) == "Affine(6, bias=False)"
    for step in range(3):
        xs = [data((4, 3, 6), step).float().requires_grad_() for _ in range(2)]
        ys = [layer(x) for layer, x in zip((alone, both), xs, strict=True)]
        assert torch.allclose(*ys, atol=1e-6)
        for layer, y in zip((alone, both), ys, strict=True):
            layer.zero_grad()
            (y * torch.arange(6)).square().sum().backward()
            layer.norm.fold()
        # float32, sums of 12 squares up to 25 * 10
        assert torch.allclose(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-3)
        assert torch.allclose(alone.weight.grad, both.weight.grad, rtol=1e-4, atol=1e-3)
    assert all(torch.allclose(v, both.state_dict()[k], rtol=1e-4, atol=1e-4) for k, v in alone.state_dict().items())


def test_a_batch_normalization_without_a_bias() -> None:
    theirs = trained(nn.BatchNorm1d(6), (8, 6)).eval()
    theirs.register_parameter("bias", None)
    ours = sn.convert(copy.deepcopy(theirs), sn.BatchNorm)
    x = data((5, 6), 9).float()
    assert close(ours(x), theirs(x))
    assert close(ours.train()(x), theirs.train()(x))
    assert sn.to_torch(ours).bias is None
