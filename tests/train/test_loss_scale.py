"""The unit of the loss: whatever a loss is multiplied by, training is the same up to rounding if the layers know it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.nn.norm import Norm, norms
from streamnorm.ops import backends

SCALES = (1.0, 4.0, 1024.0, 1 / 7, 3.0, 1e-3)
RULES = {"evidence": sn.StreamingNorm, "paper": partial(sn.StreamingNorm, alpha=(0.7, 0.3), beta=(0.7, 0.2, 0.1))}


def net(norm: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), norm(6), nn.Tanh(), nn.Linear(6, 2)).double()


class Recurrent(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = sn.NormGRU(4, 6, norm=norm).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(0).expand(3, -1, -1))[0]


def train(model: nn.Module, scales: Sequence[float], told: bool) -> list[Tensor]:
    """Losses are multiplied by ``scales``, and gradients divided by them before the update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    for scale in scales:
        for _ in range(2):
            x = torch.randn(5, 4, dtype=torch.float64)
            handle = sn.loss_scale(model, scale) if told else None
            (model(x).square().mean() * scale).backward()
            if handle is not None:
                handle.remove()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
    memories = [m for n in norms(model) for m in (n.H1, n.H2) if m is not None]
    return [*(p.detach() for p in model.parameters()), *(m.tables for m in memories)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", [net, Recurrent])
@pytest.mark.parametrize("backend", [None, "eager", "generic"])
def test_a_scale_that_is_known_changes_nothing(make: Any, rule: Any, backend: str | None) -> None:
    with backends.using(backend):
        plain = train(make(rule), [1.0] * len(SCALES), told=False)
        known = train(make(rule), SCALES, told=True)
        unknown = train(make(rule), SCALES, told=False)
    for a, b in zip(plain, known, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)
    assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain, unknown, strict=True))


def test_a_growing_gradient_scaler_changes_nothing() -> None:
    ends = []
    for growth in (10**9, 1):
        model = net(sn.StreamingNorm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=growth)
        sn.loss_scale(model, scaler)
        torch.manual_seed(1)
        for _ in range(8):
            scaler.scale(model(torch.randn(5, 4, dtype=torch.float64)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert scaler.get_scale() == 512
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_a_cycle_in_one_call_knows_it_too() -> None:
    layers = [sn.StreamingNorm(3).double() for _ in range(2)]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 3, dtype=torch.float64)
    for layer, scale in zip(layers, (1.0, 8.0), strict=True):
        with sn.vectorized(layer, 4, averaged=True), sn.loss_scale(layer, scale):
            layer(x).backward(dy * scale)
    assert torch.allclose(layers[0].H2.tables, layers[1].H2.tables, rtol=1e-13, atol=0)


def test_compiled_steps_of_an_online_trainer_are_not_used_with_a_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), sn.StreamingNorm(3), nn.ReLU(), nn.Linear(3, 2))
    online = sn.OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sn.loss_scale(model, 2.0).scale == 2
    assert not online._is_served()


def test_a_copy_of_the_model_goes_on_with_the_scaler() -> None:
    scales = [2.0]
    model = net(sn.StreamingNorm)
    sn.loss_scale(model, lambda: scales[0])
    twin = copy.deepcopy(model)
    scales[0] = 4.0
    twin(torch.randn(5, 4, dtype=torch.float64))
    assert [layer.loss_scale for one in (model, twin) for layer in norms(one)] == [2.0, 4.0]


def test_the_handle_ends_it() -> None:
    model = net(sn.StreamingNorm)
    with sn.loss_scale(model, 3.0):
        assert [layer.loss_scale for layer in norms(model)] == [3.0]
    assert [layer.loss_scale for layer in norms(model)] == [1.0]
    model(torch.randn(5, 4, dtype=torch.float64))
    assert isinstance(model[1], Norm)
    assert model[1].loss_scale == 1.0


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), "2", None])
def test_a_scale_that_is_no_number_above_0_is_refused(scale: Any) -> None:
    model = net(sn.StreamingNorm)
    with pytest.raises(ValueError, match="the scale of a loss is a finite number above 0, got"):
        sn.loss_scale(model, scale)
    assert not model._forward_pre_hooks
