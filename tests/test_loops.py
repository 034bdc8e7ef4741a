"""Architectures C and D, whose convolutions are recurrent in time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm.training.architectures import Convolutional, FullyRecurrent


def image(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.BatchNorm, sn.SampleNorm, nn.BatchNorm2d])
def test_c_of_one_and_one_is_b_bit_for_bit(norm: type[nn.Module]) -> None:
    torch.manual_seed(3)
    b = Convolutional(3, 5, norm, 4)
    torch.manual_seed(3)
    c = Convolutional(3, 5, norm, 4, loops=(1, 1))
    for _ in range(3):
        x = image()
        y, z = b(x), c(x)
        assert torch.equal(y, z)
        y.sum().backward(), z.sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(b.parameters(), c.parameters(), strict=True))


def test_b_is_its_stages_one_after_another() -> None:
    model, x = Convolutional(3, 5, sn.SampleNorm, 4), image()
    y = x
    for stage in model:
        y = stage(y)
    assert torch.equal(model(x), y)


def test_blocks_share_weights_and_statistics_over_time() -> None:
    model = Convolutional(3, 5, sn.StreamingNorm, 4, loops=(2, 3))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in Convolutional(3, 5, sn.StreamingNorm, 4).parameters()
    )
    model(image())
    assert [int(block.branch[0].H1.count) for block in (model[1], model[3])] == [2, 3]


def test_statistics_per_time_step_are_as_many_as_the_loops() -> None:
    model = Convolutional(3, 5, sn.TimeSpecific(sn.BatchNorm), 4, loops=(2, 3))
    model(image())
    assert [block.branch[0].trained_steps for block in (model[1], model[3])] == [2, 3]
    model.loops = (4, 4)
    assert model.eval()(image()).isfinite().all()


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.BatchNorm, sn.SampleNorm, sn.TimeSpecific(sn.BatchNorm)])
def test_d_trains(norm: sn.TimeSpecific) -> None:
    torch.manual_seed(0)
    model = FullyRecurrent(3, 2, norm, 4, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sn.attach(model, optimizer)
    x = image(16)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_d_renews_every_state_from_all() -> None:
    """With every transition but one silenced, the read-out hears the image only by way of the one from 0 to 2."""
    model = FullyRecurrent(3, 2, partial(sn.SampleNorm, affine=True), 4, steps=1)
    x = image(2)
    for name, transition in model.transitions.items():
        if name != "0to2":
            nn.init.zeros_(
                transition[2][-1].weight if isinstance(transition[2], nn.Sequential) else transition[2].weight
            )
    heard = model(x)
    nn.init.zeros_(model.transitions["0to2"][2].weight)
    assert not torch.equal(heard, model(x))
    assert torch.equal(model(x)[0], model(x)[1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="both >= 1"):
        Convolutional(3, 5, sn.StreamingNorm, 4, loops=(0, 1))
    with pytest.raises(ValueError, match="steps is a number"):
        FullyRecurrent(3, 5, sn.StreamingNorm, 4, steps=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        FullyRecurrent(3, 5, sn.StreamingNorm, 4)(torch.randn(1, 3, 6, 8))


def test_a_vectorized_cycle_refuses_a_layer_that_is_called_twice() -> None:
    model = Convolutional(3, 5, sn.StreamingNorm, 4, loops=(2, 1))
    with pytest.raises(ValueError, match="called twice in a vectorized cycle"), sn.vectorized(model, 2):
        model(image())
    once = Convolutional(3, 5, sn.StreamingNorm, 4)
    for _ in range(2):
        with sn.vectorized(once, 2):
            once(image())
    assert once[1].branch[0].H1.count == 4
