"""A compiled online step is the ordinary step: same weights, state, momentum, outputs and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import MIXED, NORMS, RATES, STEPS, TERMS, WIDTHS, Pair, close, compiled, mlp, online, samples

from streamnorm import Affine, StreamingNorm
from streamnorm.ops import backends


@pytest.mark.parametrize(
    ("norm", "rates"),
    [(norm, rates) for i, norm in enumerate(NORMS) for j, rates in enumerate(RATES) if (i + j) % 2 == i // 6],
)
def test_equals_the_ordinary_loop(norm: str, rates: str, compiled_steps: None) -> None:
    Pair(mlp(NORMS[norm]).double(), RATES[rates]).compare(*samples(), TERMS)


@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_ordinary_loop_in_float32(norm: str, compiled_steps: None) -> None:
    x, y = samples()
    for rates in ("momentum", "adam", "adamw"):
        Pair(mlp(NORMS[norm]), RATES[rates]).compare(x.float(), y, TERMS)


@pytest.mark.parametrize("widths", [WIDTHS, (1, 1, 1), (64, 32, 16, 8), (100, 33, 2), (3, 4)], ids=str)
def test_every_instruction_set(isa: str, widths: tuple[int, ...], compiled_steps: None) -> None:
    x, y = samples(widths=widths)
    for dtype in (torch.float64, torch.float32):
        for rates in ("decay", "nesterov", "adam"):
            Pair(mlp(NORMS["mixed"], widths).to(dtype), RATES[rates]).compare(x.to(dtype), y, STEPS * max(widths))


@pytest.mark.parametrize("norm", ["mixed", "layer", "none"])
def test_squared_error(norm: str, compiled_steps: None) -> None:
    Pair(mlp(NORMS[norm]).double(), RATES["plain"], F.mse_loss).compare(*samples(loss=F.mse_loss), TERMS)


@compiled
@pytest.mark.parametrize("rates", ["decay", "adam"])
def test_many_steps_are_the_same_steps(rates: str) -> None:
    x, y = samples()
    one, many = (online(mlp(NORMS["mixed"]), RATES[rates]) for _ in range(2))
    many.model.load_state_dict(one.model.state_dict())
    x = x.float()
    results = [one.step(a, b) for a, b in zip(x, y, strict=True)]
    losses, outputs = many.steps(x, y)
    assert torch.equal(losses, torch.stack([loss for loss, _ in results]))
    assert torch.equal(outputs, torch.stack([output for _, output in results]))
    for a, b in zip(one.model.state_dict().values(), many.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@compiled
def test_the_number_of_threads_changes_nothing() -> None:
    """A layer of so many weights that threads share its rows, which do not divide evenly."""
    x, y = samples(widths=(700, 401, 2))
    before, made = torch.get_num_threads(), []
    start = mlp(NORMS["mixed"], (700, 401, 2)).state_dict()
    for threads in (1, 2, 3):
        trainer = online(mlp(NORMS["mixed"], (700, 401, 2)), RATES["nesterov"])
        trainer.model.load_state_dict(start)
        torch.set_num_threads(threads)
        try:
            made.append([*trainer.step(x[0].float(), y[0]), *trainer.steps(x[1:].float(), y[1:])])
        finally:
            torch.set_num_threads(before)
        made[-1] += trainer.model.state_dict().values()
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_shapes() -> None:
    x, y = samples(4)
    trainer = online(mlp(NORMS["mixed"]).double(), RATES["plain"])
    losses, outputs = trainer.steps(x[:0], y[:0])
    assert (losses.shape, outputs.shape) == ((0,), (0, 3))
    loss, output = trainer.step(x[0], y[0])
    assert (loss.shape, output.shape) == ((), (3,))
    loss, output = trainer.step(x[:1], y[:1])
    assert (loss.shape, output.shape) == ((), (1, 3))
    losses, outputs = trainer.steps(x.T.contiguous().T, y)
    assert (losses.shape, outputs.shape) == ((4,), (4, 3))


@pytest.mark.parametrize("warmup", ["auto", 0, 1, 7])
@pytest.mark.parametrize("rates", ["plain", "momentum"])
def test_warm_up(warmup: Any, rates: str, compiled_steps: None) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES[rates], warmup=warmup)
    before = pair.trainer.model[-1].bias.detach().clone()
    x, y = samples(10)
    for i in range(10):
        pair.compare(x[i : i + 1], y[i : i + 1], TERMS)
        assert torch.equal(pair.trainer.model[-1].bias, before) == (i < (4 if warmup == "auto" else warmup))


def test_without_norms_there_is_no_warm_up(compiled_steps: None) -> None:
    pair = Pair(mlp(nn.LayerNorm).double(), RATES["plain"])
    pair.compare(*samples(3), TERMS)
    assert pair.trainer.warmup.is_over


FRONTS = {
    "plain": lambda c: [StreamingNorm(c, affine=False, **MIXED)],
    "gain": lambda c: [StreamingNorm(c, **MIXED)],
    "p1": lambda c: [StreamingNorm(c, p=1, center="zero")],
    "affine": lambda c: [StreamingNorm(c, affine=False), Affine(c)],
    "layer": lambda c: [nn.LayerNorm(c)],
    "bare layer": lambda c: [nn.LayerNorm(c, elementwise_affine=False)],
}


@pytest.mark.parametrize("rates", ["momentum", "adam"])
@pytest.mark.parametrize("front", FRONTS)
def test_a_norm_of_the_input(front: str, rates: str, compiled_steps: None) -> None:
    x, y = samples()
    for dtype in (torch.float64, torch.float32):
        for rest in (mlp(NORMS["mixed"]), mlp(None, (19, 3))):
            model = nn.Sequential(*FRONTS[front](19), *rest).to(dtype)
            Pair(model, RATES[rates]).compare((5 * x + 100).to(dtype), y, 100 * TERMS)


@compiled
@pytest.mark.parametrize("rates", ["momentum", "adam"])
def test_steps_of_both_kinds_may_follow_each_other(rates: str) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES[rates])
    x, y = samples()
    for i in range(0, STEPS, 3):
        pair.compare(x[i : i + 2], y[i : i + 2], TERMS)
        for model, optimizer in ((pair.twin, pair.optimizer), (pair.trainer.model, pair.trainer.optimizer)):
            with backends.using("generic"):
                model(x[i : i + 1])  # an arrival that waits for the next weight update
                F.cross_entropy(model(x[i + 2 : i + 3]), y[i + 2 : i + 3]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if i % 2:
                    model(x[i : i + 1])
    assert pair.trainer.model[1].H1.updates == STEPS
    pair.twin.eval(), pair.trainer.model.eval()
    close("tested", pair.trainer.model(x), pair.twin(x), TERMS)


def test_a_gain_and_bias_of_its_own(compiled_steps: None) -> None:
    model = nn.Sequential(nn.Linear(19, 7), StreamingNorm(7, affine=False), Affine(7), nn.Linear(7, 3)).double()
    Pair(model, RATES["plain"]).compare(*samples(), TERMS)


def test_layer_norm_without_gain_or_bias(compiled_steps: None) -> None:
    for options in ({"elementwise_affine": False}, {"bias": False, "eps": 0.1}):
        model = nn.Sequential(nn.Linear(19, 7), nn.LayerNorm(7, **options), nn.ReLU(), nn.Linear(7, 3)).double()
        Pair(model, RATES["plain"]).compare(*samples(), TERMS)


def test_losses_as_modules() -> None:
    x, y = samples(3)
    for loss, target in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), torch.randn(3, 3).double())):
        Pair(mlp(None).double(), RATES["plain"], loss).compare(x, target, TERMS)


def test_it_learns() -> None:
    """Two classes on either side of a circle."""
    x = torch.randn(3000, 2)
    y = (x.norm(dim=1) > 1.2).long()
    model = nn.Sequential(nn.Linear(2, 32), StreamingNorm(32, p=1, center="zero"), nn.ReLU(), nn.Linear(32, 2))
    trainer = online(model, RATES["plain"])
    _, outputs = trainer.steps(x, y)
    wrong = (outputs.argmax(1) != y).float()
    assert wrong[-500:].mean() < 0.6 * wrong[:500].mean()
