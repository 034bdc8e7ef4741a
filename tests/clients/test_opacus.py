"""opacus: layers that mix samples are refused by its validator and in its training; SampleNorm learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import loader
from torch import nn

from streamnorm import BatchNorm, SampleNorm, StreamingNorm, convert

opacus: Any = pytest.importorskip("opacus")
validators: Any = pytest.importorskip("opacus.validators")
pytestmark = pytest.mark.filterwarnings("ignore")


def network(norm: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("norm", [StreamingNorm, BatchNorm, lambda c: convert(nn.BatchNorm1d(c), to=StreamingNorm)])
def test_layers_that_mix_samples_are_refused(norm: Any) -> None:
    assert not validators.ModuleValidator.is_valid(network(norm))
    model = network(norm)
    with pytest.raises(Exception, match="not private; use SampleNorm"):
        opacus.PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(),
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("affine", [True, False])
def test_their_training_is_refused_whatever_was_validated(affine: bool) -> None:
    model = opacus.GradSampleModule(network(lambda c: StreamingNorm(c, affine=affine)))
    with pytest.raises(RuntimeError, match="not private; use SampleNorm"):
        model(torch.randn(8, 4))


def test_sample_norm_learns_and_has_the_gradients_of_single_samples() -> None:
    model, alone = network(SampleNorm), network(SampleNorm)
    assert validators.ModuleValidator.is_valid(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, batches = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0,
        poisson_sampling=False,
    )  # fmt: skip
    x, y = next(iter(batches))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for i in range(len(x)):
        alone.zero_grad()
        F.cross_entropy(alone(x[i : i + 1]), y[i : i + 1]).backward()
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            scale = len(x) if model.loss_reduction == "mean" else 1
            torch.testing.assert_close(mine.grad_sample[i] / scale, theirs.grad, rtol=1e-4, atol=1e-5)
    optimizer.step()
