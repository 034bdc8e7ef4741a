"""Frozen layers keep their statistics in whatever mode the model is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import draw
from torch import Tensor, nn

import streamnorm as sn


def net() -> nn.Sequential:
    """A trained network of every kind of layer that remembers, and one that does not."""
    model = nn.Sequential(nn.Linear(4, 6), sn.StreamingNorm(6), sn.BatchNorm(6), sn.SampleNorm(6))
    for step in range(3):
        model(draw((8, 4), step).float()).square().sum().backward()
    return model


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_frozen_layers_normalize_with_constants_in_training_and_learn() -> None:
    model, x = net(), draw((5, 4), 9).float()
    tested = copy.deepcopy(model).eval()(x)
    assert sn.freeze(model) is model
    model.train()
    before = statistics(model)
    y = model(x)
    assert model.training
    assert torch.equal(y, tested)
    y.square().sum().backward()
    assert same(before, statistics(model))
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_weight_updates_leave_the_estimate() -> None:
    model = sn.freeze(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sn.attach(model, optimizer)
    x = draw((5, 4), 9).float()
    first = model(x)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen(again) -> None:
    model = again(sn.freeze(net())).train()
    before = statistics(model)
    model(draw((5, 4), 9).float())
    assert model[1].frozen
    assert same(before, statistics(model))
    assert sn.unfreeze(model)[1].training


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("then", [True, False, None])
def test_unfreezing_returns_to_the_mode_that_was_set_last(before: bool, then: bool | None) -> None:
    model = sn.freeze(net().train(before))
    if then is not None:
        model.train(then)
    assert not model[1].training
    sn.unfreeze(sn.freeze(model))
    assert model[1].training == (before if then is None else then)
    assert not model[1].frozen
    assert model.eval()[1].training is False
    assert model.train()[1].training is True


def test_gain_and_bias_are_frozen_on_demand() -> None:
    model = sn.freeze(net(), affine=True)
    gains = [p for layer in model[1:] for p in layer.parameters()]
    assert not any(p.requires_grad for p in gains)
    assert all(p.requires_grad for p in model[0].parameters())
    sn.unfreeze(model)
    assert not any(p.requires_grad for p in gains)
    sn.unfreeze(model, affine=True)
    assert all(p.requires_grad for p in gains)


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.TimeSpecific(sn.BatchNorm)], ids=["streaming", "time-specific"])
def test_recurrent_layers(norm) -> None:
    gru = sn.NormGRU(3, 5, norm=norm)
    gru(draw((4, 6, 3), 0).float())
    x = draw((7, 6, 3), 1).float()  # longer than in training
    tested = copy.deepcopy(gru).eval()(x)[0]
    before = statistics(sn.freeze(gru))
    output = gru.train()(x)[0]
    assert torch.equal(output, tested)
    output.square().sum().backward()
    assert same(before, statistics(gru))
    sn.unfreeze(gru)(x)
    assert not same(before, statistics(gru))


def test_what_has_no_statistics_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(sn.freeze(net()), sn.StreamingNorm(6))
    sn.unfreeze(model)
    with pytest.raises(ValueError, match=r"'1' \(StreamingNorm\) has no statistics to freeze yet"):
        sn.freeze(model, affine=True)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer.frozen for layer in model.modules() if isinstance(layer, sn.Norm))
    for verb in (sn.freeze, sn.unfreeze):
        with pytest.raises(ValueError, match="Sequential has no layer of streamnorm"):
            verb(nn.Sequential(nn.BatchNorm1d(3)))


def test_a_frozen_model_is_recalibrated_and_compiled() -> None:
    model = sn.freeze(net())
    x = draw((32, 4), 5).float()
    before = model(x)
    sn.recalibrate(model, [x])
    assert model[1].frozen
    assert not torch.equal(before, model(x))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
