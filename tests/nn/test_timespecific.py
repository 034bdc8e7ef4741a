"""Statistics for each time step: as many as training had, and what is tested with beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequences import identity, same_state, state_of

import streamnorm as sn


def test_time_specific_tests_with_the_statistics_of_the_step() -> None:
    layer, plain = sn.TimeSpecific(sn.BatchNorm)(3), [sn.BatchNorm(3) for _ in range(4)]
    for _ in range(3):
        for t, norm in enumerate(plain):
            x = torch.randn(5, 3) * (t + 1) + t
            assert torch.equal(layer(x, t), norm(x))
    layer.eval()
    for norm in plain:
        norm.eval()
    x = torch.randn(5, 3)
    for t in range(8):
        assert torch.equal(layer(x, t), plain[min(t, 3)](x))
    assert layer.trained_steps == 4


def test_time_specific_holds_as_many_as_there_are_steps() -> None:
    net = sn.NormGRU(4, 3, norm=sn.TimeSpecific(sn.BatchNorm))
    layers = list(net.cells["l0"].norms())
    for T, held in ((3, 3), (7, 7), (5, 7)):
        net(torch.randn(T, 5, 4))
        assert [layer.trained_steps for layer in layers] == [held] * 6
    assert [int(at.H1.seen) for at in layers[0].times] == [3, 3, 3, 2, 2, 1, 1]
    gains = [name for name, _ in layers[0].named_parameters()]
    assert gains == ["affine.weight", "affine.bias"]


def test_time_specific_loads_any_number_of_steps() -> None:
    nets = [sn.NormRNN(4, 3, norm=sn.TimeSpecific(sn.BatchNorm)) for _ in range(3)]
    nets[0](torch.randn(9, 5, 4)), nets[1](torch.randn(2, 5, 4))
    for source, target in ((0, 1), (0, 2)):
        nets[target].load_state_dict(nets[source].state_dict())
    short = sn.NormRNN(4, 3, norm=sn.TimeSpecific(sn.BatchNorm))
    short(torch.randn(4, 5, 4))
    nets[2].load_state_dict(short.state_dict())
    held = [net.cells["l0"].norm_hh["h"].trained_steps for net in (*nets, short)]
    assert held == [9, 9, 4, 4]
    x = torch.randn(12, 2, 4)
    assert torch.equal(nets[1].eval()(x)[0], nets[0].eval()(x)[0])


def test_time_specific_without_reuse_shows_both_lengths() -> None:
    net = sn.NormGRU(4, 3, norm=sn.TimeSpecific(sn.BatchNorm, reuse_last=False))
    net(torch.randn(4, 5, 4))
    net.eval()
    before = state_of(net)
    assert net(torch.randn(4, 5, 4))[0].shape == (4, 5, 3)
    with pytest.raises(ValueError, match="statistics for 4 time steps and the sequence has 9"):
        net(torch.randn(9, 5, 4))
    assert same_state(net, before)
    assert "reuse_last=False" in repr(net)


def test_time_specific_begun_in_the_middle() -> None:
    layer = sn.TimeSpecific(sn.BatchNorm)(3)
    with pytest.warns(UserWarning, match="before it has seen any training data"):
        layer.eval()(torch.randn(5, 3), 2)
    layer.train()(torch.randn(5, 3), 2)
    assert (len(layer.times), layer.trained_steps) == (3, 1)
    with pytest.raises(ValueError, match="expected 3 features"):
        layer(torch.randn(5, 4), 3)
    with pytest.raises(ValueError, match="time step >= 0, got -1"):
        layer(torch.randn(5, 3), -1)
    assert len(layer.times) == 3


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.SampleNorm, identity])
def test_time_specific_is_for_batch_normalization(norm: Any) -> None:
    with pytest.raises(TypeError, match="statistics per time step are for a batch normalization such as BatchNorm"):
        sn.NormRNN(4, 3, norm=sn.TimeSpecific(norm))


@pytest.mark.parametrize("steps", [None, 6])
def test_evaluation_compiles_and_exports_whole(steps: int | None) -> None:
    torch.compiler.reset()
    model = sn.NormRNN(4, 3, norm=sn.TimeSpecific(sn.BatchNorm, steps=steps))
    for _ in range(3):
        model(torch.randn(3, 5, 4))
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    for length in (3, 2, 5):  # beyond the third step the third's statistics stand in
        x = torch.randn(length, 5, 4)
        torch.testing.assert_close(compiled(x)[0], model(x)[0])
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x)[0], model(x)[0])
