"""The warm-up: first cycles that move the statistics and leave weights and gradient memory alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import (
    CLASSES,
    FEATURES,
    RULES,
    MakeNorm,
    assert_equal,
    batch,
    dau,
    everything,
    memories,
    moved,
    net,
    paper,
    sgd,
    take_steps,
    weights,
)
from torch import nn

import streamnorm as sn
from streamnorm.train.warmup import AUTO_WARMUP


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_warm_up_cycle_moves_h1_alone(vectorize: bool) -> None:
    model = net("FC", paper)
    cycle = dau(model, 2, 3, vectorize=vectorize)
    before = weights(model)
    cycle.warm_up(batch("FC", 6, 0)[0])
    assert not moved(before, model)
    assert all(p.grad is None for p in model.parameters())
    for layer in memories(model):
        assert (layer.H1.seen, layer.H1.updates, layer.H1.count) == (3, 1, 0)
        assert (layer.H2.seen, layer.H2.updates, layer.H2.count) == (0, 0, 0)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_warm_up_cycle_moves_h1_alone_where_memory_counts_samples(vectorize: bool) -> None:
    model = net("FC")
    cycle = dau(model, 2, 3, vectorize=vectorize)
    before = weights(model)
    cycle.warm_up(batch("FC", 6, 0)[0])
    assert not moved(before, model)
    for layer in memories(model):
        assert (layer.H1.seen, layer.H1.held, layer.H1.count) == (3, 6, 0)
        assert (layer.H2.seen, layer.H2.held) == (0, 0)
        assert not layer.H2.theta.any()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum and decay": lambda model: sgd(model, lr=0.1, weight_decay=0.1, nesterov=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    "fused": lambda model: sgd(model, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_warm_up_folds_statistics_and_leaves_weights_and_gradient_memory_alone(steps: int, make: Any) -> None:
    model = net("FC", paper)
    optimizer = make(model)
    warmup = sn.Warmup(model, optimizer, steps)
    before = weights(model)
    for step in range(steps + 2):
        assert warmup.is_over == (step >= steps)
        for part in range(2):
            x, y = batch("FC", 1, 2 * step + part)
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < steps:
            assert not moved(before, model)
            assert not optimizer.state, "a step that did nothing left a trace in the optimizer"
        for layer in memories(model):
            assert (layer.H1.count, layer.H1.updates, layer.H1.seen) == (0, step + 1, 2 * (step + 1))
            assert layer.H2.updates == max(0, step + 1 - steps)
            assert layer.H2.count == 0
            if step < steps:
                assert layer.H2.seen == 0
                assert not layer.H2.long.any()
                assert not layer.H2.estimate.any()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@RULES
def test_a_warm_up_leaves_the_weights_alone_when_step_is_given_a_closure(norm: MakeNorm) -> None:
    model = net("FC", norm)
    optimizer = sgd(model)
    sn.Warmup(model, optimizer, 2)
    before = weights(model)
    x, y = batch("FC", 1, 0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert not moved(before, model)


def deep_convolutional() -> nn.Module:
    """A normalized layer with a map of 8x8."""
    torch.manual_seed(0)
    norm = paper(FEATURES)
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2, FEATURES, 3, padding=1, bias=False),
        norm,
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64 * FEATURES, CLASSES),
    ).double()


def test_auto_warms_up_for_one_sample_a_batch_of_a_connected_layer() -> None:
    model = net("FC", paper)
    optimizer = sgd(model)
    sn.Warmup(model, optimizer)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(AUTO_WARMUP))
    assert not moved(before, model)
    take_steps(model, optimizer, "FC", 1, range(1))
    assert moved(before, model)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(deep_convolutional, "conv", id="a convolutional layer"),
        pytest.param(lambda: net("FC", sn.SampleNorm), "FC", id="nothing streams"),
        pytest.param(lambda: net("FC"), "FC", id="memory in samples"),
    ],
)
def test_auto_does_not_warm_up_for_one_sample_a_batch(make: Callable[[], nn.Module], kind: str) -> None:
    model = make()
    optimizer = sgd(model)
    sn.Warmup(model, optimizer)
    before = weights(model)
    take_steps(model, optimizer, kind, 1, range(1))
    assert moved(before, model)


@RULES
def test_nothing_warms_up_unasked(norm: MakeNorm) -> None:
    model = net("FC", norm)
    optimizer = sgd(model)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(1))
    assert moved(before, model)


def test_dau_warms_up_by_itself_in_one_call_and_in_the_loop() -> None:
    for vectorize in (True, False):
        model = net("FC", paper)
        cycle = dau(model, 1, 3, warmup="auto", vectorize=vectorize)
        before = weights(model)
        for step in range(AUTO_WARMUP):
            cycle.update(*batch("FC", 3, step))
        assert not moved(before, model)
        cycle.update(*batch("FC", 3, AUTO_WARMUP))
        assert moved(before, model)


@pytest.mark.parametrize("warmup", [-1, 1.5, True, "always", None])
def test_a_warmup_that_is_no_number_of_steps_is_refused(warmup: Any) -> None:
    model = net("FC")
    with pytest.raises(ValueError, match=f'>= 0 or "auto", got {warmup!r}'):
        sn.Warmup(model, sgd(model), warmup)


@pytest.mark.parametrize("warmup", [3, "auto"])
@pytest.mark.parametrize("stop", [1, 2, 5])
@RULES
def test_a_run_goes_on_in_the_middle_of_a_warm_up(stop: int, warmup: Any, norm: MakeNorm) -> None:
    through = net("FC", norm)
    optimizer = sgd(through)
    sn.Warmup(through, optimizer, warmup)
    take_steps(through, optimizer, "FC", 1, range(7))

    stopped = net("FC", norm)
    optimizer = sgd(stopped)
    kept_by = sn.Warmup(stopped, optimizer, warmup)
    take_steps(stopped, optimizer, "FC", 1, range(stop))
    kept = pickle.dumps((stopped.state_dict(), optimizer.state_dict(), kept_by.state_dict()))

    resumed = net("FC", norm, seed=1)
    optimizer = sgd(resumed)
    renewed = sn.Warmup(resumed, optimizer, warmup)
    states = pickle.loads(kept)
    for part, state in zip((resumed, optimizer, renewed), states, strict=True):
        part.load_state_dict(state)
    take_steps(resumed, optimizer, "FC", 1, range(stop, 7))
    assert_equal(everything(resumed), everything(through))


def closures(model: nn.Module, optimizer: torch.optim.Optimizer, samples: int, seed: int) -> Any:
    x, y = batch("FC", samples, seed)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def test_auto_holds_back_the_very_first_update_by_a_closure() -> None:
    """The layers are called for the first time inside ``step``."""
    model = net("FC", paper)
    optimizer = sgd(model)
    sn.Warmup(model, optimizer)
    before = weights(model)
    for step in range(AUTO_WARMUP):
        optimizer.step(closures(model, optimizer, 1, step))
        assert not moved(before, model)
    optimizer.step(closures(model, optimizer, 1, 9))
    assert moved(before, model)


def test_auto_decides_at_the_first_update_and_small_batches_later_lose_nothing() -> None:
    model = net("FC", paper)
    optimizer = sgd(model)
    warmup = sn.Warmup(model, optimizer)
    assert not warmup.is_over, "unknown yet"
    for step, samples in enumerate((8, 1, 2)):
        before = weights(model)
        take_steps(model, optimizer, "FC", samples, range(step, step + 1))
        assert moved(before, model)
    assert warmup.is_over


def test_a_removed_warm_up_drops_no_gradient() -> None:
    model = net("FC")
    optimizer = sgd(model)
    warmup = sn.Warmup(model, optimizer, 5)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(2))
    assert not moved(before, model)
    warmup.remove()
    take_steps(model, optimizer, "FC", 1, range(2, 4))
    assert moved(before, model)
    assert warmup.updates == 2
