"""What a layer does with bad, odd and broken input."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from cases import LAYERS, draw, trained
from close import assert_close
from torch import nn

import streamnorm as sn


def unchanged(layer: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# Bad input


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(4), r"got \(4,\); for a single sample write x.unsqueeze\(0\)"),
        (torch.randn(2, 4, 1, 1, 1, 1), r"expected \(n, 4\).*got \(2, 4, 1, 1, 1, 1\)"),
        (torch.randn(4, 5, 3, 3), r"expected 4 features on axis 1, got \(4, 5, 3, 3\)"),
        (torch.randint(5, (3, 4, 3, 3)), r"floating dtype, got torch.int64"),
    ],
    ids=["rank 1", "rank 6", "features", "integers"],
)
def test_wrong_input_is_shown_and_changes_nothing(make, mode: str, x: torch.Tensor, message: str) -> None:
    layer = trained(make(4), 3, 4, 3, 3)
    layer.train(mode == "train")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert unchanged(layer, before)


@pytest.mark.parametrize("ref", [sn.BA6, sn.BA4, sn.BA5, sn.BA3], ids=repr)
def test_another_map_size_is_refused_by_a_place_wise_reference(ref: sn.NormRef) -> None:
    layer = trained(sn.StreamingNorm(4, ref), 3, 4, 8, 8)
    before = copy.deepcopy(layer.state_dict())
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(ValueError, match=r"map of size \(8, 8\), got \(7, 8\)"):
            layer(torch.randn(3, 4, 7, 8))
    assert unchanged(layer, before)


def test_a_reference_over_all_places_takes_any_map_size() -> None:
    layer = trained(sn.StreamingNorm(4), 3, 4, 8, 8)
    assert layer(torch.randn(3, 4, 5)).shape == (3, 4, 5)
    assert layer(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.StreamingNorm(4, alpha=(0.7,)), r"alpha is a tuple of 2 numbers, got \(0.7,\)"),
        (lambda: sn.StreamingNorm(4, beta=(0.7, 0.3)), r"beta is a tuple of 3 numbers, got \(0.7, 0.3\)"),
        (lambda: sn.StreamingNorm(4, kappa=(0.7, 0.3)), r"kappa is a tuple of 4 numbers"),
        (lambda: sn.StreamingNorm(4, alpha=(float("nan"), 0.3)), r"alpha holds 2 finite numbers"),
        (lambda: sn.StreamingNorm(4, alpha=(-0.7, 0.3)), r"alpha1 and alpha2 .* >= 0, got alpha=\(-0.7, 0.3\)"),
        (lambda: sn.Streaming(kappa=(1.5, -0.5, 1, 0)), r"kappa1 and kappa2 .* >= 0, got kappa=\(1.5, "),
        (lambda: sn.StreamingNorm(4, alpha=(1, 0)), r"give kappa, for instance"),
        (lambda: sn.StreamingNorm(4, p=0.5), r"p is a number >= 1, got 0.5"),
        (lambda: sn.StreamingNorm(4, center="mean"), r"center is .* got 'mean'"),
        (lambda: sn.StreamingNorm(4, eps=-1), r"eps is a finite number >= 0, got -1"),
        (lambda: sn.StreamingNorm(0), r"num_features is a number of features >= 1, got 0"),
        (lambda: sn.BatchNorm(4, rate=0), r"rate is the weight of the new value"),
        (lambda: sn.BatchNorm(4, sn.SP2), r"use BA1 ... BA6, or Sample\(\)"),
        (lambda: sn.SampleNorm(4, sn.BA1), r"use SP1 ... SP5, or Batch\(\)"),
        (lambda: sn.SampleNorm(4, center="estimate"), r"Setting B.* needs a running estimate"),
        (lambda: sn.SampleNorm(6, sn.NormRef(4, "all", "one")), r"6 features do not divide into 4 groups"),
        (lambda: sn.NormRef("mine", "all", "one"), r'features is "own", "all" or a number of groups'),
        (lambda: sn.NormRef("own", "left", "one"), r'place is "here", "local" or "all", got \'left\''),
        (lambda: sn.NormRef("own", "all", "two"), r'samples is "one" or "batch", got \'two\''),
        (lambda: sn.BA4.with_window(4), r"window is an odd number of positions >= 1, got 4"),
    ],
)
def test_wrong_settings_are_shown(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["streaming", "batch", "place-wise"])
def test_testing_before_training_is_batch_normalization_s_mean_0_and_sigma_1_and_warns_once(name: str) -> None:
    layer = LAYERS[name](4).eval()
    nn.init.uniform_(layer.weight)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    gain = layer.weight.detach().reshape(-1, 1, 1)
    with pytest.warns(UserWarning, match="before it has seen any training data: mean 0 and sigma 1"):
        y = layer(x)
    assert torch.equal(y, gain * x)
    assert torch.equal(*torch.broadcast_tensors(torch.autograd.grad(y.sum(), x)[0], gain))
    layer.train()(torch.full((2, 4, 3, 3), float("nan")))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(layer.eval()(x), gain * x)
    assert not layer.H1.seen


def test_mini_batches_of_unequal_size_are_refused() -> None:
    layer = sn.StreamingNorm(4)
    with sn.vectorized(layer, 3), pytest.raises(ValueError, match="7 samples do not divide into 3 mini-batches"):
        layer(torch.randn(7, 4))


# Broken input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ref", [sn.BA1, sn.BA4, sn.SP2], ids=repr)
def test_a_mini_batch_that_is_not_finite_leaves_no_trace(ref: sn.NormRef, bad: float) -> None:
    layer, clean = sn.StreamingNorm(4, ref), sn.StreamingNorm(4, ref)
    for step in range(4):
        x = draw((3, 4, 5, 5), step).float()
        broken = x.clone()
        broken[1, 2, 3, 4] = bad
        for one in (layer, clean):
            one(x.clone().requires_grad_()).square().sum().backward()
        (layer(broken.requires_grad_()) ** 2).sum().backward()
        for one in (layer, clean):
            if step == 1:
                one.fold()
    for memory in ("H1", "H2"):
        for name, value in getattr(clean, memory).state().items():
            assert torch.equal(value, getattr(layer, memory).state()[name]), f"{memory}.{name}"
        assert torch.equal(getattr(layer, memory).estimate, getattr(clean, memory).estimate)
    assert layer.H1.skipped == 4
    assert layer.H1.seen == 4
    assert layer.eval()(draw((2, 4, 5, 5), 9).float()).isfinite().all()


def test_an_empty_mini_batch_changes_nothing() -> None:
    layer = trained(sn.StreamingNorm(4), 3, 4)
    state = layer.H1.state()
    before = {k: v.clone() for k, v in state.items()}
    assert layer(torch.empty(0, 4)).shape == (0, 4)
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    assert layer.eval()(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_large_means_keep_their_digits(p: int) -> None:
    x = draw((64, 3, 8, 8), 0)
    shifted = (x + 1e6).float()
    layer, exact = sn.StreamingNorm(3, p=p, affine=False), sn.StreamingNorm(3, p=p, affine=False).double()
    y, want = layer(shifted), exact(shifted.double())
    # Values near 1e6 stand 0.06 apart, and so do the means that can be written; the mean of 4,096 of them is off by a
    # few such steps, which sigma >= 0.5 turns into at most twice as much of y.
    assert (y.double() - want).abs().max() < 4 * 0.0625 / 0.5
    assert_close("sigma", layer.H1.short[1], exact.H1.short[1].float(), 4096)


@pytest.mark.parametrize("p", [1.5, 3, 7])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_powers_neither_overflow_nor_vanish(p: float, scale: float) -> None:
    x = draw((16, 3, 4), 0)
    for ref in (sn.BA1, sn.BA4):
        y, want = (
            sn.Norm(3, ref, sn.Lp(p, "batch", eps=0), sn.Batch())((x * s).to(d))
            for s, d in ((scale, torch.float32), (1, torch.float64))
        )
        assert_close("y", y, want.float(), 64)


def test_non_contiguous_input() -> None:
    x = draw((6, 8, 5, 4), 0)
    views = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1].expand(6, -1, -1, -1),
    }
    for name, view in views.items():
        for ref in (sn.BA1, sn.SP2, sn.BA4):
            a, b = sn.StreamingNorm(8, ref).double(), sn.StreamingNorm(8, ref).double()
            u, v = view.detach().clone(memory_format=torch.contiguous_format), view.detach()
            u, v = u.requires_grad_(), v.requires_grad_()
            ya, yb = a(u), b(v)
            assert_close(f"{name} y", yb.detach(), ya.detach(), 64)
            ga, gb = torch.autograd.grad(ya.pow(3).sum(), u), torch.autograd.grad(yb.pow(3).sum(), v)
            assert_close(f"{name} dx", gb[0], ga[0], 64)


def infinite(shape: tuple[int, ...]) -> torch.Tensor:
    """A mini-batch whose statistics are no numbers."""
    x = torch.zeros(shape)
    x[0], x[1] = math.inf, -math.inf
    return x


@pytest.mark.parametrize(("rules", "members"), [({}, ["theta"]), ({"alpha": (0.7, 0.3)}, ["long", "short"])])
def test_h2_learns_only_from_calls_that_h1_learned_from(rules: dict[str, Any], members: list[str]) -> None:
    layer = trained(sn.StreamingNorm(4, **rules), 2, 4)
    x = infinite((2, 4)).requires_grad_()
    layer(x).sum().backward()
    assert layer.H1.skipped == 1
    assert layer.H2.seen == 0
    for member in members:
        assert torch.equal(getattr(layer.H2, member), torch.zeros(2, 4))


RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper's": {"alpha": (0.7, 0.3)},
    "own": {"alpha": (0.6, 0.4), "beta": (0.5, 0.3, 0.2)},
}


@pytest.mark.parametrize("center", ["batch", "estimate", "zero"])
@pytest.mark.parametrize("bad", [(3,), (0, 3, 4), (4, 5)])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_refused_mini_batch_does_not_touch_the_rest_of_its_cycle(
    center: str, bad: tuple[int, ...], rules: dict[str, Any]
) -> None:
    cycle = draw((6, 2, 4), 0).float()
    for step in bad:
        cycle[step] = infinite((2, 4))
    cycle[1, 0, 0] = float("nan")
    once, each = sn.StreamingNorm(4, center=center, **rules), sn.StreamingNorm(4, center=center, **rules)
    x = cycle.flatten(0, 1).requires_grad_()
    with sn.vectorized(once, 6):
        once(x).square().sum().backward()
    for part in cycle:
        each(part.clone().requires_grad_()).square().sum().backward()
    assert each.H1.skipped == len(bad) + 1
    for memory in ("H1", "H2"):
        for name, value in getattr(each, memory).state_dict().items():
            assert_close(f"{memory}.{name}", getattr(once, memory).state_dict()[name].float(), value.float(), 64)


@pytest.mark.parametrize("center", ["batch", "zero"])
def test_a_quiet_window_beside_a_loud_one_keeps_its_sigma(center: str) -> None:
    x = draw((2, 3, 9, 9), 0)
    x[0, 0, 8, 8] = 3e4
    layer = sn.Norm(3, sn.BA4.with_window(3), sn.Lp(7, center), sn.Batch())
    y, want = layer(x.float()), copy.deepcopy(layer).double()(x)
    assert_close("y", y, want.float(), 64)


@pytest.mark.parametrize("make", [sn.StreamingNorm, sn.SampleNorm, lambda c: sn.StreamingNorm(c, p=3)])
def test_an_empty_mini_batch_goes_back_too(make) -> None:
    x = torch.empty(0, 4, requires_grad=True)
    make(4)(x).sum().backward()
    assert x.grad.shape == (0, 4)
