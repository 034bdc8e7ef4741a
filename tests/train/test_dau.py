"""Decoupled accumulation and update: what a cycle computes, what it refuses, and the memory that it takes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import MakeNorm, assert_equal, batch, dau, everything, memories, moved, net, sgd, streaming, weights
from torch import Tensor, nn

import streamnorm as sn

# --- One mini-batch a cycle


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("norm", [streaming, sn.BatchNorm, sn.SampleNorm, nn.BatchNorm1d], ids=lambda f: f.__name__)
def test_one_batch_an_update_is_conventional_training_to_the_bit(norm: MakeNorm, vectorize: bool) -> None:
    ours, plain = net("FC", norm), net("FC", norm)
    cycle = dau(ours, 4, 1, vectorize=vectorize)
    optimizer = sgd(plain)
    for step in range(5):
        x, y = batch("FC", 4, step)
        loss, output = cycle.update(x, y)
        want = plain(x)
        want_loss = F.cross_entropy(want, y)
        want_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in memories(plain):
            layer.fold()
        assert torch.equal(loss, want_loss.detach())
        assert torch.equal(output, want.detach())
        assert_equal(everything(ours), everything(plain))


def test_an_update_uses_the_mean_of_the_mini_batch_gradients_and_clears_them() -> None:
    model = net("FC", sn.SampleNorm)
    x, y = batch("FC", 6, 0)
    start = weights(model)
    dau(model, 2, 3, optimizer=sgd(model, lr=1.0, momentum=0, weight_decay=0)).update(x, y)
    assert all(p.grad is None for p in model.parameters())
    twin = net("FC", sn.SampleNorm)
    F.cross_entropy(twin(x), y).backward()
    for before, after, want in zip(start, model.parameters(), twin.parameters(), strict=True):
        assert want.grad is not None
        # The mean of 3 mean gradients is the mean over all: 6 terms of about 1, 2e-16 each.
        torch.testing.assert_close(before - after, want.grad, rtol=0, atol=1e-13)


# --- Mini-batches as they arrive


@pytest.mark.parametrize(("m", "n"), [(1, 5), (3, 2), (2, 1)])
@pytest.mark.parametrize("norm", [streaming, sn.BatchNorm, sn.SampleNorm], ids=lambda f: f.__name__)
def test_mini_batches_as_they_arrive_equal_the_loop_to_the_bit(norm: MakeNorm, m: int, n: int) -> None:
    at_once, arriving = net("conv", norm), net("conv", norm)
    loop, stream = dau(at_once, m, n, vectorize=False), dau(arriving, m, n)
    for step in range(3):
        x, y = batch("conv", m * n, step)
        loss, output = loop.update(x, y)
        results = [stream.accumulate(a, b) for a, b in zip(x.split(m), y.split(m), strict=True)]
        assert torch.equal(torch.stack([part for part, _ in results]).mean(), loss)
        assert torch.equal(torch.cat([part for _, part in results]), output)
        assert not output.requires_grad
        assert_equal(everything(arriving), everything(at_once))


def test_weights_move_at_the_last_mini_batch_of_a_cycle_alone() -> None:
    model = net("FC")
    cycle = dau(model, 2, 3)
    for step in range(7):
        before = weights(model)
        cycle.accumulate(*batch("FC", 2, step))
        assert moved(before, model) == (step % 3 == 2)


# --- What a cycle is not: n batches of m are not one of m n


def gradient(norm: MakeNorm, m: int, n: int) -> Tensor:
    """The weight update of one cycle at rate 1, end to end."""
    model = net("FC", norm)
    before = weights(model)
    dau(model, m, n, optimizer=sgd(model, lr=1.0, momentum=0, weight_decay=0)).update(*batch("FC", 12, 0))
    return torch.cat([(a - b.detach()).flatten() for a, b in zip(before, model.parameters(), strict=True)])


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("m", "n"), [(2, 6), (4, 3), (6, 2)])
def test_batch_normalization_sees_the_mini_batches_and_not_the_cycle(m: int, n: int) -> None:
    assert apart(gradient(sn.BatchNorm, m, n), gradient(sn.BatchNorm, 12, 1)) > 1e-4


@pytest.mark.parametrize(("m", "n"), [(1, 12), (2, 6), (6, 2)])
def test_layer_normalization_does_not_care_how_a_cycle_is_cut(m: int, n: int) -> None:
    assert apart(gradient(sn.SampleNorm, m, n), gradient(sn.SampleNorm, 12, 1)) <= 1e-10


# --- What it refuses


@pytest.mark.parametrize("name", ["samples_per_batch", "batches_per_update"])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_dau_refuses_what_is_no_number_of_samples_or_batches(name: str, value: Any) -> None:
    model = net("FC")
    with pytest.raises(ValueError, match=f"{name} is a whole number >= 1, got {value}"):
        sn.DAU(model, sgd(model), F.cross_entropy, **{name: value})


@pytest.mark.parametrize(("inputs", "targets"), [(5, 5), (7, 7), (6, 5), (0, 0)])
def test_an_update_refuses_another_number_of_samples_and_changes_nothing(inputs: int, targets: int) -> None:
    model = net("FC")
    before = everything(model)
    x, y = batch("FC", 7, 0)
    with pytest.raises(ValueError, match=f"3 mini-batches of 2 samples, 6 in all; got {inputs} .* {targets} targets"):
        dau(model, 2, 3).update(x[:inputs], y[:targets])
    assert_equal(everything(model), before)


def test_an_update_in_the_middle_of_a_cycle_is_refused() -> None:
    cycle = dau(net("FC"), 2, 3)
    x, y = batch("FC", 6, 0)
    cycle.accumulate(x[:2], y[:2])
    with pytest.raises(ValueError, match="1 of 3 mini-batches are accumulated"):
        cycle.update(x, y)


# --- What autograd holds meanwhile


class Saved:
    """What autograd keeps of one tensor; counts those alive, and their most."""

    alive = most = 0

    def __init__(self, value: Tensor) -> None:
        self.value, self.size = value, value.numel()
        Saved.alive += self.size
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.size


def most_saved(n: int, vectorize: bool) -> int:
    """The largest number of values that autograd holds at once in a cycle of n mini-batches."""
    cycle = dau(net("conv"), 2, n, vectorize=vectorize)
    gc.collect()
    Saved.alive = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        cycle.update(*batch("conv", 2 * n, 0))
    assert Saved.alive == 0, "graphs outlive their update"
    return Saved.most


def test_the_loop_needs_the_memory_of_one_mini_batch_whatever_the_cycle() -> None:
    assert most_saved(2, vectorize=False) == most_saved(24, vectorize=False) > 0


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_warm_up_cycle_keeps_no_graph(vectorize: bool) -> None:
    cycle = dau(net("conv"), 2, 3, vectorize=vectorize)
    gc.collect()
    Saved.alive = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        cycle.warm_up(batch("conv", 6, 0)[0])
    assert Saved.most == 0


def test_one_call_needs_the_memory_of_all_mini_batches() -> None:
    assert most_saved(24, vectorize=True) > 8 * most_saved(2, vectorize=True)


def test_a_cycle_waits_for_its_step() -> None:
    """So that weights can be tested with which the statistics were taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), sn.StreamingNorm(4), nn.Linear(4, 2))
    sizes = {"samples_per_batch": 2, "batches_per_update": 3}
    twin = copy.deepcopy(model)
    ours, plain = (
        sn.DAU(net, torch.optim.SGD(net.parameters(), lr=0.1), F.cross_entropy, **sizes) for net in (model, twin)
    )
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    with pytest.raises(ValueError, match="0 of 3 mini-batches are accumulated"):
        ours.step()
    before = model[0].weight.detach().clone()
    ours.cycle(x, y)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="finish that cycle and its step first"):
        ours.cycle(x, y)
    with pytest.raises(ValueError, match=r"call step\(\) first"):
        ours.accumulate(x[:2], y[:2])
    ours.step()
    plain.update(x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
