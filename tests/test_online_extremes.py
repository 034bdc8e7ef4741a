"""Online steps on what is tiny, huge or not finite are the ordinary steps, with refusals and their counts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import NORMS, RATES, TERMS, Pair, compiled, mlp, online, samples


@compiled
@pytest.mark.parametrize("norm", ["p1-zero", "p2-zero", "p2-estimate", "layer", "none"])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e10, 1e18, 1e30])
def test_tiny_and_huge_inputs(norm: str, scale: float) -> None:
    x, y = samples(8)
    pair = Pair(mlp(NORMS[norm]), {"lr": 1e-3})
    x = x.float()
    x[5] = (x[5].double() * scale).float()
    if scale < 1:
        pair.compare(x, y, TERMS)
    else:  # what follows an explosion is a matter of its last digit
        pair.compare(x[:6], y[:6], TERMS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["mixed", "p1-zero", "layer", "none"])
def test_a_sample_that_is_not_finite(norm: str, value: float) -> None:
    """Weights and state are what the ordinary path makes of it, in a warm-up and after it."""
    x, y = samples(12)
    for at in (2, 8):
        bad = x.clone()
        bad[at, 3] = value
        pair = Pair(mlp(NORMS[norm]).double(), RATES["momentum"])
        pair.compare(bad, y, TERMS)
        if norm == "mixed":
            assert pair.trainer.model[1].H1.skipped == (1 if at == 2 else 4)


@compiled
def test_a_refused_sample_is_found_before_anything_changed() -> None:
    x, y = samples(1)
    trainer = online(mlp(NORMS["mixed"]).double(), RATES["momentum"], warmup=0)
    before = copy.deepcopy(trainer.model.state_dict())
    x[0, 0] = float("inf")
    loss, output = torch.empty(1).double(), torch.empty(1, 3).double()
    assert trainer._is_served()
    assert trainer._compiled(x, y, 1, 0, 1, False, loss, output) == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not trainer.optimizer.state_dict()["state"]
    assert trainer.link.updates == 0


@pytest.mark.parametrize("norm", ["mixed", "own", "layer", "none"])
@pytest.mark.parametrize("target", [float("nan"), float("inf"), 1e38])
def test_gradients_that_are_not_finite(norm: str, target: float, compiled_steps: None) -> None:
    """The forward pass is finite: H1 learns, H2 refuses."""
    x, y = samples(6, loss=F.mse_loss)
    y[5, 0] = target
    pair = Pair(mlp(NORMS[norm]), {"lr": 1e-3}, F.mse_loss, warmup=2)
    pair.compare(x.float(), y.float(), TERMS)


@compiled
def test_an_empty_memory_refuses_too() -> None:
    x, y = samples(1, loss=F.mse_loss)
    model = mlp(NORMS["mixed"]).double()
    for parameter in model.parameters():  # at the first sample every y is 0, and ReLU would stop what comes back
        nn.init.normal_(parameter)
    pair = Pair(model, {"lr": 1e-3}, F.mse_loss, warmup=0)
    pair.compare(x, y * float("inf"), TERMS)
    assert pair.trainer.model[1].H2.skipped == 1
