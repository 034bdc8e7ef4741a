"""The Manhattan rule: its step by hand, and that it behaves as an optimizer of torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamnorm import StreamingNorm, Warmup
from streamnorm.lab.runs.language.manhattan import Manhattan


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def give(parameter: nn.Parameter, *gradient: float) -> None:
    parameter.grad = torch.tensor(gradient)


def test_a_step_moves_by_the_rate_against_the_sign() -> None:
    w = weight(1.0, 1.0, 1.0, 1.0)
    give(w, 3.0, -1e-30, 0.0, -0.0)
    Manhattan([w], lr=0.25).step()
    assert w.tolist() == [0.75, 1.25, 1.0, 1.0]


def test_maximize_goes_the_other_way_and_groups_have_their_own_rates() -> None:
    a, b = weight(0.0), weight(0.0)
    give(a, 2.0)
    give(b, 2.0)
    Manhattan([{"params": [a]}, {"params": [b], "lr": 0.5, "maximize": True}], lr=0.25).step()
    assert (a.item(), b.item()) == (-0.25, 0.5)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    x = torch.randn(8, 4)
    ends = []
    for scale in (1.0, 1e-6, 1e6):
        torch.manual_seed(3)
        model = nn.Linear(4, 2)
        optimizer = Manhattan(model.parameters(), lr=0.125)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x).square().mean() * scale).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_what_is_not_finite_never_reaches_a_weight() -> None:
    w = weight(1.0, 1.0, 1.0)
    give(w, math.nan, math.inf, -math.inf)
    Manhattan([w], lr=0.25).step()
    assert w.tolist() == [1.0, 0.75, 1.25]


def test_parameters_without_a_gradient_are_left_alone() -> None:
    a, b = weight(1.0), weight(1.0)
    give(a, 1.0)
    Manhattan([a, b], lr=0.5).step()
    assert (a.item(), b.item()) == (0.5, 1.0)


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned() -> None:
    w = weight(1.0)
    optimizer = Manhattan([w], lr=0.25)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert calls == [1.0]
    assert w.item() == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_a_weight_stays(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(2, dtype=dtype))
    w.grad = torch.tensor([5.0, -5.0], dtype=dtype)
    Manhattan([w], lr=0.25).step()
    assert w.dtype == dtype
    assert w.tolist() == [0.75, 1.25]


@pytest.mark.parametrize("lr", [-0.1, math.inf, math.nan])
def test_an_impossible_rate_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match=f"lr is a finite number >= 0, got {lr!r}"):
        Manhattan([weight(1.0)], lr=lr)
    with pytest.raises(ValueError, match="lr is a finite number >= 0"):
        Manhattan([{"params": [weight(1.0)], "lr": lr}])


def test_a_sparse_gradient_is_refused_with_the_way_out() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse one of \(4, 2\); use nn.Embedding\(..., sparse=False\)"):
        Manhattan(table.parameters()).step()


def test_state_dict_scheduler_copies_and_repr_are_those_of_torch() -> None:
    w = weight(1.0)
    optimizer = Manhattan([w], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    give(w, 1.0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    other = Manhattan([weight(1.0)], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.25
    assert copy.deepcopy(optimizer).state_dict() == optimizer.state_dict()
    assert "Manhattan" in repr(optimizer)


def test_layers_hear_of_its_updates() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), StreamingNorm(4, alpha=(0.7, 0.3)))
    optimizer = Manhattan(model.parameters(), lr=0.01)
    Warmup(model, optimizer, 1)
    before = copy.deepcopy(dict(model.named_parameters()))
    counts: list[Any] = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        counts.append(all(torch.equal(before[k], p) for k, p in model.named_parameters()))
    assert counts == [True, False], "a step of the warm-up has no gradients and moves no weight"
    layer: Any = model[1]
    assert layer.H1.updates == 2
