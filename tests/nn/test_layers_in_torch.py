"""A layer inside the machinery of torch: checkpointing, autocast, compilation, saved states, devices and dtypes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import LAYERS, draw, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn

# Autograd


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing_observes_once(name: str, reentrant: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), LAYERS[name](4), nn.ReLU()).double()
    saved = copy.deepcopy(plain)
    for step in range(4):
        xs = [draw((3, 2, 5, 5), step).requires_grad_() for _ in range(2)]
        (plain(xs[0]) ** 2).sum().backward()
        (checkpoint(saved, xs[1], use_reentrant=reentrant) ** 2).sum().backward()
        assert torch.equal(xs[0].grad, xs[1].grad)
        if step == 1:
            plain[1].fold(), saved[1].fold()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in plain.state_dict().items())


def test_checkpointing_a_layer_that_was_called_twice_is_refused() -> None:
    layer = sn.StreamingNorm(4)
    x = torch.randn(3, 4, requires_grad=True)
    first = checkpoint(layer, x, use_reentrant=False)
    second = checkpoint(layer, 2 * x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="called once more since"):
        (first + second).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("make", [sn.StreamingNorm, sn.BatchNorm, sn.SampleNorm])
def test_checkpointing_a_vectorized_cycle_whose_backward_comes_after_it(make, reentrant: bool) -> None:
    plain = nn.Sequential(nn.Linear(5, 4), make(4)).double()
    saved = copy.deepcopy(plain)
    xs = [draw((8, 5), 0).requires_grad_() for _ in range(2)]
    with sn.vectorized(plain, 4), sn.vectorized(saved, 4):
        a, b = plain(xs[0]), checkpoint(saved, xs[1], use_reentrant=reentrant)
    a.square().sum().backward(), b.square().sum().backward()
    assert torch.equal(xs[0].grad, xs[1].grad)


def test_checkpointing_after_ordinary_steps() -> None:
    layer = sn.BatchNorm(4)
    for step in range(2):
        layer(draw((6, 4), step).float().requires_grad_()).sum().backward()
    x = draw((6, 4), 5).float().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.H1.seen == 3


def test_checkpointing_past_another_call_is_refused_and_never_wrong() -> None:
    layer = sn.StreamingNorm(4)
    y = checkpoint(layer, draw((3, 4), 0).float().requires_grad_(), use_reentrant=False)
    layer.fold()
    layer(draw((3, 4), 1).float())
    with pytest.raises(RuntimeError, match="called once more since"):
        y.square().sum().backward()


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = sn.StreamingNorm(3)(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(("rules", "per_call"), [({}, 4), ({"alpha": (0.7, 0.3)}, 1)], ids=["default", "the paper's"])
def test_no_grad_training_calls_observe_and_frozen_input_is_fine(rules: dict[str, Any], per_call: int) -> None:
    layer = sn.StreamingNorm(3, **rules)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.H1.count == 2 * per_call
    assert layer.H1.seen == 2
    assert layer.H2.seen == 0
    assert layer.weight.grad is not None


def test_autocast_keeps_statistics_wide() -> None:
    model = nn.Sequential(nn.Linear(6, 4), sn.StreamingNorm(4))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, 6))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert model[1].H1.short.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# State


def test_buffers_are_changed_in_place() -> None:
    layer = sn.StreamingNorm(4, sn.BA6)
    layer(torch.randn(3, 4, 5, 5, requires_grad=True)).sum().backward()  # tells the size of a map
    before = {name: id(b) for name, b in layer.named_buffers()}
    layer(torch.randn(3, 4, 5, 5, requires_grad=True)).sum().backward()
    layer.fold()
    layer.eval()(torch.randn(3, 4, 5, 5))
    assert {name: id(b) for name, b in layer.named_buffers()} == before


def test_a_loaded_layer_can_be_tested_at_once() -> None:
    for ref in (sn.BA1, sn.BA6):
        layer = trained(sn.StreamingNorm(4, ref), 3, 4, 5, 5)
        other = sn.StreamingNorm(4, ref)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(other.eval()(x), layer.eval()(x))


def test_resuming_in_the_middle_of_a_cycle_is_exact() -> None:
    def cycle(layer: sn.Norm, steps: range) -> None:
        for step in steps:
            layer(draw((2, 4), step).float().requires_grad_()).square().sum().backward()

    through = sn.StreamingNorm(4)
    cycle(through, range(5))
    through.fold()
    cycle(through, range(5, 10))
    first = sn.StreamingNorm(4)
    cycle(first, range(5))
    first.fold()
    cycle(first, range(5, 7))
    second = sn.StreamingNorm(4)
    second.load_state_dict(first.state_dict())
    cycle(second, range(7, 10))
    assert all(torch.equal(v, through.state_dict()[k]) for k, v in second.state_dict().items())


def test_clearing_forgets_that_there_was_an_estimate() -> None:
    layer = trained(sn.StreamingNorm(4), 3, 4).eval()
    layer(torch.randn(2, 4))
    layer.H1.clear()
    with pytest.warns(UserWarning, match="before it has seen"):
        layer(torch.randn(2, 4))


def test_a_layer_does_not_keep_activations_in_its_file() -> None:
    layer = sn.StreamingNorm(4, sn.BA6)
    with sn.vectorized(layer, 32):
        layer(torch.randn(32, 4, 8, 8))
    assert len(pickle.dumps(layer)) < 3 * len(pickle.dumps(layer.state_dict()))


# Devices and dtypes


@pytest.mark.parametrize("rules", [{}, {"alpha": (0.7, 0.3)}], ids=["default", "the paper's"])
def test_statistics_are_wide_under_a_narrow_default(rules: dict[str, Any]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = sn.StreamingNorm(4, **rules)
    finally:
        torch.set_default_dtype(before)
    narrow = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in sn.StreamingNorm(4, **rules).state_dict().items()
    }
    other = sn.StreamingNorm(4, **rules)
    other.load_state_dict(narrow, assign=True)
    for one in (layer, other):
        assert {b.dtype for b in one.buffers() if b.is_floating_point()} == {torch.float32}
        assert one.H1.tables.shape == (3, 2, 4)


def test_a_layer_made_on_meta_can_be_given_memory() -> None:
    with torch.device("meta"):
        layer = sn.StreamingNorm(4)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = sn.StreamingNorm(4)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in layer.state_dict().items())


def test_another_default_device_does_not_matter() -> None:
    layer, place = sn.StreamingNorm(4), sn.StreamingNorm(4, sn.BA6)
    with torch.device("meta"):
        for one in (layer, place):
            with sn.vectorized(one, 7):
                one(torch.ones(7, 4, device="cpu"))
    with sn.vectorized(layer, 7):
        layer(torch.ones(7, 4))
    assert layer.H1.count == 14


@pytest.mark.parametrize(
    "make",
    [
        sn.Affine,
        sn.StreamingNorm,
        sn.BatchNorm,
        sn.SampleNorm,
        partial(sn.Norm, ref=sn.BA4, moment=sn.Lp(1), policy=sn.Streaming(), affine=True),
        partial(sn.NormRNN, 3),
        partial(sn.NormGRU, 3),
        partial(sn.NormLSTM, 3),
    ],
)
def test_layers_are_made_on_a_device_and_of_a_dtype(make: Callable[..., nn.Module]) -> None:
    """As ``nn.utils.skip_init`` and people who replace a layer of torch's expect it."""
    there = make(6, device="meta", dtype=torch.float64)
    tensors = [*there.parameters(), *(b for b in there.buffers() if b.is_floating_point())]
    assert all(t.is_meta and t.dtype == torch.float64 for t in tensors)
    narrow = make(6, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in narrow.buffers() if b.is_floating_point()} <= {torch.float32}


def test_nothing_is_said_of_a_state_that_fits() -> None:
    class Watched(sn.StreamingNorm):
        def __init__(self, c: int) -> None:
            super().__init__(c)
            self.register_buffer("running_mean", torch.zeros(c))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Watched(4).load_state_dict(Watched(4).state_dict())


@pytest.mark.parametrize("make", [sn.StreamingNorm, lambda c: sn.StreamingNorm(c, alpha=(0.7, 0.3)), sn.BatchNorm])
def test_a_state_with_a_buffer_for_each_member_goes_on(make) -> None:
    """As files from before November 2026 have it."""
    trained, loaded = make(4), make(4)
    for step in range(3):
        trained(draw((5, 4), step).float().requires_grad_()).square().sum().backward()
        trained.fold()
    saved = {name: value for name, value in trained.state_dict().items() if name.startswith("affine")}
    for which in ("H1", "H2"):
        memory = getattr(trained, which)
        saved |= {f"{which}.{name}": value for name, value in (memory.members() if memory else {}).items()}
    loaded.load_state_dict(saved)
    assert all(map(torch.equal, loaded.state_dict().values(), trained.state_dict().values()))


def test_what_is_called_running_is_enough_to_test() -> None:
    """Tools copy target networks by that name, and as numbers that may be averaged."""
    trained, target = trained_twins()
    for name, value in target.state_dict().items():
        if "running_" in name:
            value.mul_(1 - 1.0)
            torch.add(value, trained.state_dict()[name], alpha=1.0, out=value)
    x = draw((3, 4), 9).float()
    with pytest.warns(UserWarning, match="before it has seen"):
        sn.StreamingNorm(4).eval()(x)
    assert torch.equal(target.eval()(x), trained.eval()(x))


def trained_twins() -> tuple[sn.StreamingNorm, sn.StreamingNorm]:
    """A layer that has seen data, and one that has not."""
    layer = sn.StreamingNorm(4)
    layer(draw((5, 4), 0).float())
    return layer, sn.StreamingNorm(4)
