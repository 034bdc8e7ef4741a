"""What changes between online steps is found at the next one: backends, hooks, rates, groups, tensors and modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import NORMS, RATES, TERMS, Pair, compiled, mlp, online, samples

from streamnorm import OnlineTrainer, Warmup
from streamnorm.ops import backends, library


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(OnlineTrainer, "_compiled", lambda *_: pytest.fail("a compiled step"))
    for rates in ("plain", "momentum"):
        Pair(mlp(NORMS["mixed"]).double(), RATES[rates]).compare(*samples(), TERMS)


def test_other_backends_mean_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnlineTrainer, "_compiled", lambda *_: pytest.fail("a compiled step"))
    with backends.using("generic"):
        Pair(mlp(NORMS["mixed"]).double(), RATES["plain"]).compare(*samples(6), TERMS)


def test_hooks_are_called() -> None:
    seen = []
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"])
    x, y = samples(9)
    pair.compare(x[:3], y[:3], TERMS)
    handle = pair.trainer.model[1].affine.register_forward_hook(lambda *_: seen.append(0))
    pair.compare(x[3:5], y[3:5], TERMS)
    handle.remove()
    handle = pair.trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    pair.compare(x[5:7], y[5:7], TERMS)
    handle.remove()
    pair.compare(x[7:], y[7:], TERMS)
    assert seen == [0, 0, 1, 1]


def test_hooks_on_parameters_are_called() -> None:
    """Masks and clipping."""

    def halve(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"])
    for model in (pair.trainer.model, pair.twin):
        model[0].weight.register_hook(lambda grad: grad * 0)
        model[3].weight.register_post_accumulate_grad_hook(halve)
    before = pair.trainer.model[0].weight.detach().clone()
    pair.compare(*samples(4), TERMS)
    assert torch.equal(pair.trainer.model[0].weight, before)


def test_hooks_of_all_modules_are_called() -> None:
    seen = []
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        pair.trainer.step(*(part[0] for part in samples(1)))
    finally:
        handle.remove()
    assert "Linear" in seen


def test_without_its_warm_up_an_optimizer_s_hooks_are_strangers() -> None:
    seen = []
    trainer = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"]).trainer
    trainer.warmup.remove()
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(0))
    trainer.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    trainer.steps(*samples(2))
    assert seen == [0, 1, 0, 1]


def test_results_are_where_the_model_is() -> None:
    """Whatever the default device of new tensors."""
    trainer = Pair(mlp(NORMS["mixed"]), RATES["plain"]).trainer
    x, y = samples(3)
    with torch.device("meta"):
        trainer._plan = type(trainer._plan)(trainer.model, trainer.optimizer, trainer.loss_fn)
        losses, outputs = trainer.steps(x.float(), y)
    assert losses.isfinite().all()
    assert outputs.isfinite().all()


@pytest.mark.parametrize("rates", ["momentum", "adam", "adamw"])
def test_rates_are_read_at_each_step(rates: str, compiled_steps: None) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES[rates])
    optimizers = (pair.trainer.optimizer, pair.optimizer)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8) for optimizer in optimizers]
    x, y = samples(12)
    for i in range(0, 12, 2):
        pair.compare(x[i : i + 2], y[i : i + 2], TERMS)
        for scheduler in schedulers:
            scheduler.step()
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.2
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01, dtype=torch.float64)
    pair.compare(x, y, TERMS)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] *= 0.5
    pair.compare(x, y, TERMS)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_groups_of_parameters(kind: Any) -> None:
    own = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.5, 0.6), "eps": 1e-2}
    model = mlp(NORMS["mixed"]).double()
    twin = copy.deepcopy(model)
    pair = Pair(model, RATES["plain"])
    pair.twin = twin

    def grouped(m: nn.Sequential, left_out: tuple[str, ...]) -> Any:
        rest = [p for name, p in m.named_parameters() if name not in ("0.weight", *left_out)]
        groups = [{"params": [m[0].weight], "weight_decay": 0.1}, {"params": rest, "lr": 0.005, **own}]
        return kind(groups, lr=0.01)

    for left_out in ((), ("3.weight",)):
        pair.trainer.warmup.remove(), pair.warmup.remove()
        pair.trainer = OnlineTrainer(model, grouped(model, left_out))
        pair.optimizer = grouped(twin, left_out)
        pair.warmup = Warmup(twin, pair.optimizer, 0)
        pair.compare(*samples(), TERMS)
        twin.zero_grad(), model.zero_grad()


@pytest.mark.parametrize("name", ["0.weight", "3.weight", "1.affine.weight", "6.bias"])
def test_what_is_frozen_stays(name: str) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["decay"])
    x, y = samples(12)
    pair.compare(x[:6], y[:6], TERMS)
    for model in (pair.trainer.model, pair.twin):
        model.get_parameter(name).requires_grad_(False)
        model.zero_grad()
    before = pair.trainer.model.get_parameter(name).clone()
    pair.compare(x[6:], y[6:], TERMS)
    assert torch.equal(pair.trainer.model.get_parameter(name), before)


def test_what_moved_is_found_again(compiled_steps: None) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["momentum"])
    x, y = samples(12)

    def train(dtype: torch.dtype = torch.float64) -> None:
        for optimizer in (pair.trainer.optimizer, pair.optimizer):
            for state in optimizer.state.values():
                state["momentum_buffer"] = state["momentum_buffer"].to(dtype, copy=True)
        pair.compare(x.to(dtype), y, 2 * TERMS)

    train()
    saved = [copy.deepcopy(model.state_dict()) for model in (pair.trainer.model, pair.twin)]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (pair.trainer.optimizer, pair.optimizer)]
    for model in (pair.trainer.model, pair.twin):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model[1].H1.long = model[1].H1.long.clone()
    train()
    for model in (pair.trainer.model, pair.twin):
        model.float()
    train(torch.float32)
    for model, state in zip((pair.trainer.model, pair.twin), saved, strict=True):
        model.double()
        model.load_state_dict(state, assign=False)
    for optimizer, state in zip((pair.trainer.optimizer, pair.optimizer), states, strict=True):
        optimizer.load_state_dict(state)
    train()


@pytest.mark.parametrize("what", ["weight", "momentum"])
def test_what_is_turned_where_it_lies_is_read_as_it_lies_now(what: str) -> None:
    """The same tensor at the same address, of the same size."""
    pair = Pair(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double(), RATES["nesterov"])
    x, y = samples(6, (6, 6, 3))
    pair.compare(x[:3], y[:3], TERMS)
    for model, optimizer in ((pair.trainer.model, pair.trainer.optimizer), (pair.twin, pair.optimizer)):
        weight = model[0].weight
        if what == "weight":
            weight.data = weight.data.t()
        else:
            optimizer.state[weight]["momentum_buffer"].t_()
    pair.compare(x[3:], y[3:], TERMS)


def test_a_sample_with_a_negative_bit(compiled_steps: None) -> None:
    x, y = samples(6, loss=F.mse_loss)
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"], F.mse_loss)
    pair.compare(torch._neg_view(x), torch._neg_view(y), TERMS)


MISFITS = {
    "x": torch.zeros(4, 19).double(),
    "y": torch.tensor([0, 1, 3, 0]),
    "losses": torch.empty(5),
    "outputs": torch.empty(3, 4).t(),
}


@compiled
@pytest.mark.parametrize("what", [*MISFITS, "memory", "nothing"])
def test_an_operator_refuses_what_does_not_fit(what: str) -> None:
    """By a code, with everything as it was; the trainer asks before."""
    trainer = online(mlp(NORMS["mixed"]), RATES["adam"])
    before, plan = copy.deepcopy(trainer.model.state_dict()), trainer._plan
    x, y = samples(4)
    given = {"x": x.float(), "y": y, "losses": torch.empty(4), "outputs": torch.empty(4, 3)}
    if what == "memory":
        plan._tensors = [tensor.double() if tensor.ndim == 3 else tensor for tensor in plan._tensors]
    if what in MISFITS:
        given[what] = MISFITS[what]
    done = plan.train(tuple(given.values()), moving=True, raises=False)
    assert done == ((4, 0, 3, 0) if what == "nothing" else None)
    same = [torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items()]
    assert all(same) == (what != "nothing")
    assert bool(trainer.optimizer.state) == (what == "nothing")


def test_eval_mode_is_the_ordinary_step() -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["plain"])
    x, y = samples(12)
    pair.compare(x[:6], y[:6], TERMS)
    pair.trainer.model.eval(), pair.twin.eval()
    pair.compare(x[6:], y[6:], TERMS)


@compiled
def test_autograd_knows_that_weights_changed() -> None:
    x, y = samples(6)
    trainer = online(mlp(NORMS["layer"]).double(), RATES["plain"])
    loss = F.cross_entropy(trainer.model(x), y)
    trainer.steps(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_adam_goes_on_from_its_state(options: dict[str, Any], compiled_steps: None) -> None:
    """A state that torch began, saved, and loaded into another trainer; and one that was begun here."""
    rates = {**RATES["adam"], **options}
    pair = Pair(mlp(NORMS["layer"]).double(), rates)
    x, y = samples(12)
    pair.compare(x[:4], y[:4], TERMS)
    other = Pair(copy.deepcopy(pair.trainer.model), rates)
    other.trainer.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(pair.trainer.optimizer.state_dict()))
    other.trainer.warmup.load_state_dict(pair.warmup.state_dict())
    other.warmup.load_state_dict(pair.warmup.state_dict())
    other.compare(x[4:], y[4:], TERMS)


def test_maximize_is_the_ordinary_step() -> None:
    Pair(mlp(NORMS["layer"]).double(), {"lr": 1e-3, "maximize": True}).compare(*samples(6), TERMS)
