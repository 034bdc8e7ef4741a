"""Online steps on what is tiny or huge, and samples that are not finite, which leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import NORMS, RATES, TERMS, Pair, close, compiled, mlp, online, samples

from streamnorm import OnlineTrainer, StreamingNorm
from streamnorm.ops import backends

INF, NAN = float("inf"), float("nan")


@compiled
@pytest.mark.parametrize("norm", ["p1-zero", "p2-zero", "p2-estimate", "layer", "none"])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e10, 1e18, 1e30])
def test_tiny_and_huge_inputs(norm: str, scale: float) -> None:
    """Compiled steps and ordinary ones learn and skip the same."""
    x, y = samples(8)
    x = x.float()
    x[5] = (x[5].double() * scale).float()
    n = 8 if scale < 1 else 6  # what follows an explosion is a matter of its last digit
    a = online(mlp(NORMS[norm]), {"lr": 1e-3})
    b = online(copy.deepcopy(a.model), {"lr": 1e-3})
    got = a.steps(x[:n], y[:n])
    with backends.using("generic"):
        want = b.steps(x[:n], y[:n])
    assert a.skipped == b.skipped
    assert scale > 1 or not a.skipped
    for one, other in zip([*got, *a.model.state_dict().values()], [*want, *b.model.state_dict().values()], strict=True):
        close("state", one, other, TERMS)


def spoil_input(x: Tensor, y: Tensor, at: int) -> None:
    x[at, 3] = (NAN, INF, -INF)[at % 3]


def spoil_target(x: Tensor, y: Tensor, at: int) -> None:
    y[at, 1] = (NAN, INF, -INF)[at % 3]


def spoil_activations(x: Tensor, y: Tensor, at: int) -> None:
    x[at] = 1e308


def spoil_loss(x: Tensor, y: Tensor, at: int) -> None:
    y[at, 0] = 1e200


@pytest.fixture(params=[pytest.param("compiled", marks=compiled), "ordinary"])
def path(request: Any) -> Iterator[None]:
    if request.param == "compiled":
        request.getfixturevalue("compiled_steps")
    with backends.using("generic" if request.param == "ordinary" else None):
        yield


SPOILERS = {"input": spoil_input, "target": spoil_target, "activations": spoil_activations, "loss": spoil_loss}
BAD = (0, 2, 3, 8, 11)


@pytest.mark.parametrize("rates", ["momentum", "adam"])
@pytest.mark.parametrize("norm", ["mixed", "p1-zero", "layer", "none"])
@pytest.mark.parametrize("what", SPOILERS)
def test_a_sample_that_is_not_finite_is_skipped(what: str, norm: str, rates: str, path: None) -> None:
    """In a warm-up and after it, with what was to be learned before it still on its way."""
    x, y = samples(12, loss=F.mse_loss)
    for at in BAD:
        SPOILERS[what](x, y, at)
    model = mlp(NORMS[norm]).double()
    with torch.no_grad():
        model[0].weight *= 4  # type: ignore[operator]
    pair = Pair(model, {**RATES[rates], "lr": 1e-3}, F.mse_loss)
    pair.compare(x, y, TERMS, BAD)
    assert pair.trainer.warmup.updates == 12 - len(BAD)


@pytest.mark.parametrize("what", SPOILERS)
def test_or_it_is_refused(what: str, path: None) -> None:
    x, y = samples(12, loss=F.mse_loss)
    SPOILERS[what](x, y, 7)
    model = mlp(NORMS["mixed"]).double()
    with torch.no_grad():
        model[0].weight *= 4  # type: ignore[operator]
    pair = Pair(model, {"lr": 1e-3}, F.mse_loss)
    pair.trainer.on_nonfinite = "raise"
    message = f"sample 7 of this call is not finite in its {what}; the 7 before it were learned"
    with pytest.raises(ValueError, match=message):
        pair.trainer.steps(x, y)
    pair.ordinary(x[:7], y[:7])
    for name, value in pair.twin.state_dict().items():
        close(name, pair.trainer.model.state_dict()[name], value, TERMS)
    assert pair.trainer.warmup.updates == 7
    assert pair.trainer.skipped == 0
    pair.compare(x[8:], y[8:], TERMS)


def overflowing(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model and a sample with a finite loss whose gradients overflow only in the lowest layer, and 3 samples more."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    x, y = torch.randn(4, 4), torch.randn(4, 2)
    with torch.no_grad():
        if kind == "sum":  # of W^T g
            model[1].weight[:, 0] = 1e30
            model[0].weight[0], model[0].bias[0] = 0, 0
            y[1] = 1e12
        else:  # of a weight
            x[1], model[0].weight[:] = 1e25, 1e-25
            y[1] = 1e15
    return model, x, y


@pytest.mark.parametrize("kind", ["sum", "weight"])
@pytest.mark.parametrize("rates", ["momentum", "adam"])
def test_gradients_that_overflow_move_no_layer(kind: str, rates: str, path: None) -> None:
    model, x, y = overflowing(kind)
    trainer = online(model, {**RATES[rates], "lr": 1e-30}, F.mse_loss)
    before = copy.deepcopy(model.state_dict())
    loss, output = trainer.step(x[1], y[1])
    assert trainer.skipped == 1
    assert loss.isnan()
    assert output.isnan().all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not trainer.optimizer.state_dict()["state"]


def test_a_square_that_overflows_does_not_enter_adam(path: None) -> None:
    x, y = torch.tensor([[1e3, 0, 1], [1, 2, 3]]), torch.tensor([[1e18, 0.0], [1.0, 0.0]])
    for kind, skipped in ((torch.optim.SGD, 0), (torch.optim.AdamW, 1)):
        model = nn.Sequential(nn.Linear(3, 2))
        trainer = OnlineTrainer(model, kind(model.parameters(), lr=1e-30), F.mse_loss)
        trainer.steps(x, y)
        assert trainer.skipped == skipped


@pytest.mark.parametrize("name", ["0.weight", "1.affine.weight", "3.bias"])
def test_parameters_that_are_not_finite_are_reported(name: str, path: None) -> None:
    x, y = samples(4)
    trainer = online(mlp(NORMS["p1-zero"], (19, 7, 3)), {"lr": 1e-3})
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = NAN
    with pytest.raises(OverflowError, match=f"before the call: {name}"):
        trainer.steps(x.float(), y)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("many", [1, 4])
def test_an_update_that_overflows_is_reported(layer: int, many: int, path: None) -> None:
    """A weight whose input is 0 does nothing until its decay throws it away."""
    x, y = samples(many, (19, 7, 3))
    x[:, 0] = 0
    model = nn.Sequential(nn.Linear(19, 7), nn.Linear(7, 3))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 0  # type: ignore[index]
        model[layer].weight[1, 0] = 3e38  # type: ignore[index]
    trainer = online(model, {"lr": 1e-3, "weight_decay": 3e3})
    with pytest.raises(OverflowError, match=f"after the update by sample 0 of this call: {layer}.weight"):
        trainer.steps(x.float(), y)


@pytest.mark.parametrize("norm", ["p2-zero", "default", "layer", "none"])
@pytest.mark.parametrize("what", ["input", "target"])
def test_a_stream_that_begins_with_samples_that_are_not_finite(what: str, norm: str, path: None) -> None:
    """As if it began with the first one that is; they take no ordinary step each, and many are spoken of."""
    x, y = samples(112, loss=F.mse_loss)
    for at in range(104):
        SPOILERS[what](x, y, at)
    model = mlp(StreamingNorm if norm == "default" else NORMS[norm]).double()
    begun = online(model, {"lr": 1e-3}, F.mse_loss)
    whole = online(copy.deepcopy(model), {"lr": 1e-3}, F.mse_loss)
    with pytest.warns(UserWarning, match=r"104 of 112 samples were skipped, for they were not finite"):
        losses, outputs = whole.steps(x, y)
    want = begun.steps(x[104:], y[104:])
    assert (whole.skipped, begun.skipped) == (104, 0)
    assert losses[:104].isnan().all()
    assert outputs[:104].isnan().all()
    assert torch.equal(losses[104:], want[0])
    assert torch.equal(outputs[104:], want[1])
    for name, value in begun.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], value), name
    assert whole.steps(x[:50], y[:50])[0].isnan().all(), "it is said once"


def test_one_sample_that_is_not_finite_at_first_is_refused_with_its_number(path: None) -> None:
    trainer = online(nn.Sequential(nn.Linear(19, 4), StreamingNorm(4), nn.Linear(4, 3)), {"lr": 1e-3})
    trainer.on_nonfinite = "raise"
    x, y = samples(3, (19, 4, 3))
    x[0, 0] = NAN
    with pytest.raises(ValueError, match="sample 0 of this call is not finite in its input"):
        trainer.steps(x.float(), y)
