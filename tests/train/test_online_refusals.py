"""What an online trainer refuses: models, optimizers, losses and data, before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import NORMS, RATES, mlp, online, samples

from streamnorm import Affine, BatchNorm, OnlineTrainer, SampleNorm, StreamingNorm
from streamnorm.definition.ref import BA2

TIED = nn.Linear(4, 4)
CROSSED = nn.Linear(4, 4)
CROSSED.weight.data = CROSSED.weight.data.T


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Linear(4, 3), nn.Dropout()], "module '1', Dropout.*none of nn.Linear"),
        ([nn.Linear(4, 3), nn.ReLU()], "last module"),
        ([nn.Linear(4, 3), nn.ReLU(), StreamingNorm(3), nn.Linear(3, 2)], "module '2', StreamingNorm.*the order"),
        ([nn.ReLU(), nn.Linear(3, 2)], "module '0', ReLU.*the order"),
        ([Affine(3), nn.Linear(3, 2)], "module '0', Affine.*the order"),
        ([StreamingNorm(3), nn.ReLU(), nn.Linear(3, 2)], "module '1', ReLU.*the order"),
        ([StreamingNorm(3), nn.LayerNorm(3), nn.Linear(3, 2)], "module '1', LayerNorm.*the order"),
        ([StreamingNorm(3), nn.Linear(4, 2)], "takes 4 features and gets 3"),
        ([StreamingNorm(3)], "last module"),
        ([nn.Linear(4, 3), nn.Linear(4, 2)], "takes 4 features and gets 3"),
        ([nn.Linear(4, 3), StreamingNorm(4), nn.Linear(3, 2)], "takes 4 features and gets 3"),
        ([nn.Linear(4, 3), StreamingNorm(3, center="batch"), nn.Linear(3, 2)], "makes sigma 0"),
        ([nn.Linear(4, 3), StreamingNorm(3, p=3), nn.Linear(3, 2)], "p=1 or p=2"),
        ([nn.Linear(4, 3), StreamingNorm(3, BA2), nn.Linear(3, 2)], "each feature with itself"),
        ([nn.Linear(4, 3), SampleNorm(3), nn.Linear(3, 2)], "none of nn.Linear"),
        ([nn.Linear(4, 3), BatchNorm(3), nn.Linear(3, 2)], "none of nn.Linear"),
        ([nn.Linear(4, 3), Affine(3), nn.Linear(3, 2)], "has no gain"),
        ([nn.Linear(4, 3), StreamingNorm(3), Affine(3), nn.Linear(3, 2)], "has no gain"),
        ([nn.Linear(4, 3), nn.LayerNorm(4), nn.Linear(3, 2)], "gets 3"),
        ([TIED, nn.ReLU(), TIED], "twice"),
        ([nn.Linear(4, 3).half()], "float32 or float64"),
        ([nn.Linear(4, 3).to("meta")], "on the CPU"),
        ([nn.Linear(4, 3), nn.Linear(3, 2).double()], "torch.float32, on the CPU and contiguous; .*float64"),
        ([CROSSED], "not contiguous"),
        ([], "last module"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(type(m).__name__ for m in value) or "empty",
)
def test_models_that_it_refuses(modules: list[nn.Module], message: str) -> None:
    model = nn.Sequential(*modules)
    optimizer = torch.optim.SGD([*model.parameters(), torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        OnlineTrainer(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_what_else_it_refuses() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"nn\.Sequential"):
        OnlineTrainer(nn.Linear(4, 3), sgd)
    with pytest.raises(TypeError, match="SGD, Adam or AdamW, got RMSprop"):
        OnlineTrainer(model, torch.optim.RMSprop(model.parameters()))  # type: ignore[arg-type]
    for option in ("amsgrad", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"Adam with {option}=True"):
            OnlineTrainer(model, torch.optim.Adam(model.parameters(), **{option: True}))
    with pytest.raises(ValueError, match="on_nonfinite is"):
        OnlineTrainer(model, sgd, on_nonfinite="pass")  # type: ignore[arg-type]
    for loss in (F.l1_loss, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(ignore_index=1)):
        with pytest.raises(ValueError, match="loss_fn is"):
            OnlineTrainer(model, sgd, loss)
    with pytest.raises(ValueError, match="a warm-up is"):
        OnlineTrainer(model, sgd, warmup=-1)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="share their memory"):
        OnlineTrainer(model, sgd)


def test_data_that_it_refuses() -> None:
    x, y = samples(4)
    trainer = online(mlp(NORMS["mixed"]).double(), RATES["plain"], warmup=0)
    before = copy.deepcopy(trainer.model.state_dict())
    for call, message in (
        (lambda: trainer.step(x, y), r"19 values, got \(4, 19\); for many samples call steps"),
        (lambda: trainer.step(x[0, :5], y[0]), "19 values"),
        (lambda: trainer.step(torch.zeros((), dtype=torch.float64), y[0]), "19 values"),
        (lambda: trainer.steps(x[0], y[0]), "19 values"),
        (lambda: trainer.steps(x.float(), y), r"float64 on the CPU, got torch\.float32"),
        (lambda: trainer.steps(x, y[:3]), r"\(4,\) here"),
        (lambda: trainer.steps(x, y.int()), r"got torch\.int32"),
        (lambda: trainer.step(x[:1], y[0]), r"\(1,\) here"),
        (lambda: trainer.steps(x, torch.tensor([0, 1, 3, 0])), "classes 0 to 2, got 0 to 3"),
        (lambda: trainer.step(x[0], torch.tensor(-100)), "classes 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    squared = online(mlp(None).double(), RATES["plain"], F.mse_loss)
    with pytest.raises(ValueError, match=r"\(4, 3\) here"):
        squared.steps(x, torch.zeros(4, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_another_norm_needs_another_trainer() -> None:
    x, y = samples(2)
    trainer = online(mlp(NORMS["mixed"]).double(), RATES["plain"])
    trainer.model[1] = StreamingNorm(37).double()
    with pytest.raises(ValueError, match="make another OnlineTrainer"):
        trainer.steps(x, y)
