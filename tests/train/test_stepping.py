"""One weight update a sample: the loop skips what the compiled steps skip."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from streamnorm import OnlineTrainer, StreamingNorm
from streamnorm.train.stepping import Loop, stepper


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), StreamingNorm(4), nn.ReLU(), nn.Linear(4, 2))


def test_a_loop_is_taken_where_compiled_steps_do_not_serve() -> None:
    served, other = network(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert isinstance(stepper(served, torch.optim.SGD(served.parameters(), 0.1), F.cross_entropy), OnlineTrainer)
    assert isinstance(stepper(other, torch.optim.SGD(other.parameters(), 0.1), F.cross_entropy), Loop)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_changes_nothing(wrong: float) -> None:
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    holes = x.clone()
    holes[[5, 11]] = wrong
    rest = [i for i in range(20) if i not in (5, 11)]
    ends = []
    for samples, targets in ((holes, y), (x[rest], y[rest])):
        model = network()
        loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy)
        losses, outputs = loop.steps(samples, targets)
        assert loop.skipped == (2 if samples is holes else 0)
        ends.append((copy.deepcopy(model.state_dict()), losses, outputs))
    (holed, losses, outputs), (whole, other_losses, other_outputs) = ends
    assert losses.isnan().nonzero().flatten().tolist() == [5, 11]
    assert torch.equal(losses[rest], other_losses)
    assert torch.equal(outputs[rest], other_outputs)
    counts = [name for name in whole if "skipped" in name]
    assert all(torch.equal(holed[name], whole[name]) for name in whole if name not in counts)
