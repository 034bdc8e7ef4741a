"""Evaluation: the mean loss and the error in eval mode, without a trace in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import flat, small, steps, toy

from streamnorm.lab.runs.classifier import loop
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate


def test_evaluation_is_the_mean_cross_entropy_and_the_error_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = steps(Trainer(small(arm="batch"), toy()), 3)
    x, y = trainer.data.test_x, trainer.data.test_y
    with torch.no_grad():
        output = trainer.model.eval()(x)
        trainer.model.train()
    want = F.cross_entropy(output.double(), y).item(), (output.argmax(1) != y).sum().item() / len(x)
    for size in (1000, 20, 7, 1):
        monkeypatch.setattr(loop, "EVALUATION_BATCH", size)
        assert evaluate(trainer.model, x, y) == pytest.approx(want, rel=1e-5)  # float32, 6e-8, over sums of 20


@pytest.mark.parametrize("arm", ["streaming", "batch", "BA6-S", "layer", "none"])
def test_evaluation_changes_no_state(arm: str) -> None:
    trainer = steps(Trainer(small(arm=arm), toy()), 2)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(trainer.model, trainer.data.test_x, trainer.data.test_y)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in trainer.model.parameters())
    twin = steps(Trainer(small(arm=arm), toy()), 2)
    assert torch.equal(flat(steps(trainer, 1).model), flat(steps(twin, 1).model))


def test_evaluation_keeps_no_graph() -> None:
    grad_modes: list[bool] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    data = toy()
    evaluate(model, data.test_x, data.test_y)
    assert grad_modes == [False]


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("as the test wants it")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [nn.Identity, Raises])
def test_evaluation_restores_the_mode_of_every_module_even_when_the_model_raises(
    training: bool, last: Callable[[], nn.Module]
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(), last()).train(training)
    model[2].train(not training)
    modes = [m.training for m in model.modules()]
    data = toy()
    if last is Raises:
        with pytest.raises(ArithmeticError):
            evaluate(model, data.test_x, data.test_y)
    else:
        evaluate(model, data.test_x, data.test_y)
    assert [m.training for m in model.modules()] == modes
