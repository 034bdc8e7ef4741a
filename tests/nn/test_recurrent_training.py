"""Recurrent layers in training: they learn, hear of weight updates, and are saved and copied with their state."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from close import assert_close
from sequences import NETS, NORMS, STEPS, flat, initial, same_state, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm.nn.norm import norms

PAPER = functools.partial(sn.StreamingNorm, alpha=(0.7, 0.3))
EVERY = {"evidence": sn.StreamingNorm, **NORMS}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", EVERY)
def test_training_remembers_a_symbol(name: str, norm: str) -> None:
    """The first of four symbols is to be told at the end."""
    net, readout = NETS[name](4, 16, norm=EVERY[norm]), nn.Linear(16, 4)
    model = nn.ModuleList([net, readout])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    sn.Warmup(model, optimizer)
    for _ in range(60):
        symbols = torch.randint(4, (4, 32))
        output, _ = net(nn.functional.one_hot(symbols, 4).float())
        loss = nn.functional.cross_entropy(readout(output[-1]), symbols[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.2 * losses[0]


@pytest.mark.parametrize("name", NETS)
def test_a_state_of_zeros_calls_for_a_warm_up(name: str) -> None:
    """W_h h_0 = 0 has no sigma: what H2 would learn of it, divided by sqrt(eps), can keep a net from learning."""

    def warms_up(*starts: Any) -> bool:
        net = NETS[name](4, 3, norm=PAPER).double()
        warmup = sn.Warmup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for start in starts:
            net(torch.randn(6, 5, 4, dtype=torch.float64), start)
        warmup.decide()
        return not warmup.is_over

    given = initial(NETS[name](4, 3), 1, 5)
    zeros = tuple(torch.zeros_like(part) for part in flat(given))
    assert warms_up(None)
    assert warms_up(zeros if len(zeros) > 1 else zeros[0])
    assert warms_up(None, given)  # carried on inside one update cycle
    assert not warms_up(given)


class Last(nn.Module):
    """The output at the last step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0][:, -1]


def test_mini_batches_of_different_lengths_in_one_update_cycle() -> None:
    model = Last(sn.NormGRU(4, 3, batch_first=True, norm=PAPER)).double()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = sn.DAU(
        model, optimizer, nn.functional.mse_loss, samples_per_batch=5, batches_per_update=3, vectorize=False, warmup=0
    )
    arrived = 0
    for T in (4, 9, 6):
        assert all(layer.H1.count == layer.H2.count == arrived for layer in norms(model))
        x, y = torch.randn(5, T, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        cycle.accumulate(x, y)
        (nn.functional.mse_loss(by_hand(x), y) / 3).backward()
        arrived += T
    assert all(layer.H1.count == 0 and layer.H1.updates == 1 for layer in norms(model))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        # By hand, H2 was given a third of each gradient, and so gave back a third: beta makes it no other than that.
        assert_close("weight", a.detach(), (b - 0.1 * b.grad).detach(), STEPS)
    for a, b in zip(norms(model), norms(by_hand), strict=True):
        assert_close("H1", a.H1.long, b.H1.short, STEPS)
        assert_close("H2", a.H2.long, 3 * b.H2.short, STEPS)


def test_a_vectorized_cycle_is_refused() -> None:
    model = Last(sn.NormGRU(4, 3, batch_first=True))
    before = state_of(model)
    cycle = sn.DAU(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.functional.mse_loss,
        samples_per_batch=5,
        batches_per_update=3,
    )
    with pytest.raises(ValueError, match=r"NormGRU inside vectorized\(model, 3\).*vectorize=False"):
        cycle.update(torch.randn(15, 6, 4), torch.randn(15, 3))
    assert same_state(model, before)
    with sn.vectorized(model, 1):
        model(torch.randn(5, 6, 4))
    with sn.vectorized(model.eval(), 3):
        model(torch.randn(15, 6, 4))
    alone = Last(sn.NormGRU(4, 3, batch_first=True, norm=sn.SampleNorm))
    with sn.vectorized(alone, 3):  # where nothing is kept, no order can be wrong
        alone(torch.randn(15, 6, 4))


def test_a_long_sequence_is_one_call() -> None:
    net = sn.NormRNN(1, 1)
    net(torch.randn(1100, 2, 1))
    net(torch.randn(1100, 2, 1))
    assert [norm.follows.unfolded for norm in norms(net)] == [2, 2]
    for _ in range(997):
        net(torch.randn(3, 2, 1))
    with pytest.warns(UserWarning, match="1000 training calls and no weight update") as caught:
        net(torch.randn(3, 2, 1))
    assert len(caught) == 2


def test_autocast() -> None:
    net = sn.NormGRU(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = net(torch.randn(7, 5, 4))
    output.float().sum().backward()
    assert all(norm.H1.short.dtype == torch.float32 for norm in norms(net))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("norm", EVERY)
def test_checkpointing_repeats_a_sequence_or_says_that_it_cannot(norm: str) -> None:
    """A norm that is called at every step remembers its latest call alone; one per step, or none, can be repeated."""
    net = sn.NormGRU(4, 3, norm=EVERY[norm]).double()
    plain = copy.deepcopy(net)
    xs = [torch.randn(6, 5, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    output, _ = checkpoint(net, xs[0], use_reentrant=False)
    if norm in ("evidence", "streaming", "batch"):
        with pytest.raises(RuntimeError, match="called once more since"):
            output.sum().backward()
        return
    output.sum().backward()
    plain(xs[1])[0].sum().backward()
    assert_close("dx", xs[0].grad, xs[1].grad, STEPS)
    assert all(int(layer.H1.seen) == 1 for layer in norms(net) if layer.H1 is not None)


# --- Saving


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", EVERY)
def test_round_trips(name: str, norm: str) -> None:
    def step(net: nn.Module, seed: int) -> Tensor:
        x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(seed))
        y = net(x)[0]
        y.square().sum().backward()
        return y

    net = NETS[name](4, 3, 2, norm=EVERY[norm])
    step(net, 0)
    for one in norms(net):
        one.fold()
    step(net, 1)
    fresh = NETS[name](4, 3, 2, norm=EVERY[norm])
    fresh.load_state_dict(net.state_dict())
    copies = [fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    want = step(net, 2)
    for other in copies:
        assert torch.equal(step(other, 2), want)
        assert same_state(other, net.state_dict())
        x = torch.randn(9, 2, 4)
        assert torch.equal(other.eval()(x)[0], net.eval()(x)[0])
        net.train()
    assert "cells.l0.weight_ih" in net.state_dict()
