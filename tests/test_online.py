"""A compiled online step is the ordinary step: same weights, state, momentum, outputs and losses, whatever comes in.

The ordinary loop runs on the generic backend, so that nothing compiled is compared with itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import rounding
from torch import Tensor, nn

from streamnorm import Affine, BatchNorm, Lp, Norm, OnlineTrainer, SampleNorm, Streaming, StreamingNorm, attach, kernels
from streamnorm import online as module
from streamnorm.kernels import library
from streamnorm.normref import BA1, BA2, SP1

STEPS = 30
WIDTHS = (19, 37, 5, 3)
"""No width is a multiple of a vector's, some are less than one."""

MIXED = {"alpha": (0.6, 0.4), "beta": (0.5, 0.2, 0.3), "kappa": (0.8, 0.2, 0.9, 0.1)}
LAGGED = {"alpha": (1.0, 0.0), "beta": (1.0, 0.0, 0.0), "kappa": (0.5, 0.5, 0.6, 0.4)}
OWN = {"alpha": (0.0, 1.0), "beta": (0.0, 0.0, 1.0), "kappa": (0.5, 0.5, 0.5, 0.5)}

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    **{
        f"p{p}-{center}": lambda c, p=p, center=center: StreamingNorm(c, p=p, center=center)
        for p in (1, 2)
        for center in ("estimate", "zero")
    },
    "mixed": lambda c: StreamingNorm(c, **MIXED),
    "mixed-p1": lambda c: StreamingNorm(c, p=1, center="zero", **MIXED),
    "lagged": lambda c: StreamingNorm(c, center="zero", **LAGGED),
    "own": lambda c: StreamingNorm(c, center="zero", eps=0.5, **OWN),
    "one-sample": lambda c: StreamingNorm(c, SP1),
    "bare": lambda c: Norm(c, BA1, Lp(2, "zero"), Streaming()),
    "layer": nn.LayerNorm,
    "none": None,
}
RATES = {
    "plain": {"lr": 0.02},
    "decay": {"lr": 0.02, "weight_decay": 0.1},
    "momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.2},
    "nesterov": {"lr": 0.01, "momentum": 0.8, "nesterov": True},
}

compiled = pytest.mark.skipif(library.library() is None, reason="there are no compiled kernels")


def mlp(norm: Callable[[int], nn.Module] | None, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    modules: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(pairwise(widths[:-1])):
        modules += [nn.Linear(inputs, outputs, bias=k > 0), *([norm(outputs)] if norm else []), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(*widths[-2:]))


def online(
    model: nn.Sequential, rates: dict[str, Any], loss: Any = F.cross_entropy, warmup: Any = "auto"
) -> OnlineTrainer:
    return OnlineTrainer(model, torch.optim.SGD(model.parameters(), **rates), loss, warmup)


def samples(n: int = STEPS, widths: tuple[int, ...] = WIDTHS, loss: Any = F.cross_entropy) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, widths[0], dtype=torch.float64) + 0.3
    y = torch.randint(widths[-1], (n,)) if loss is F.cross_entropy else torch.randn(n, widths[-1], dtype=torch.float64)
    return x, y


class Pair:
    """One model trained by an ``OnlineTrainer`` and its twin trained by an ordinary loop."""

    def __init__(self, model: nn.Sequential, rates: dict[str, Any], loss: Any = F.cross_entropy, warmup: Any = "auto"):
        self.twin = copy.deepcopy(model)
        self.loss = loss
        self.trainer = online(model, rates, loss, warmup)
        self.optimizer = torch.optim.SGD(self.twin.parameters(), **rates)
        self.link = attach(self.twin, self.optimizer, warmup)

    def ordinary(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        with kernels.using("generic"):
            for one, target in zip(x.split(1), y.split(1), strict=True):
                output = self.twin(one)
                loss = self.loss(output, target)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                results.append((loss.detach(), output.detach()[0]))
        losses, outputs = map(torch.stack, zip(*results, strict=True))
        return losses, outputs

    def compare(self, x: Tensor, y: Tensor, terms: int) -> None:
        """Train both on the samples, and hold everything that they have against one another."""
        losses, outputs = self.trainer.steps(x, y)
        self.same(x, y, losses, outputs, terms)

    def same(self, x: Tensor, y: Tensor, losses: Tensor, outputs: Tensor, terms: int) -> None:
        want_losses, want_outputs = self.ordinary(x, y)
        close("losses", losses, want_losses, terms)
        close("outputs", outputs, want_outputs, terms)
        for name, value in self.twin.state_dict().items():
            close(name, self.trainer.model.state_dict()[name], value, terms)
        assert self.trainer.link.state_dict() == self.link.state_dict()
        got, want = self.trainer.optimizer.state_dict()["state"], self.optimizer.state_dict()["state"]
        assert got.keys() == want.keys()
        for key, state in want.items():
            assert state.keys() == got[key].keys()
            if state.get("momentum_buffer") is not None:
                close("momentum", got[key]["momentum_buffer"], state["momentum_buffer"], terms)


def close(name: str, got: Tensor, want: Tensor, terms: int) -> None:
    """Equal up to rounding, what is not finite in the same places."""
    assert got.shape == want.shape, name
    if not got.is_floating_point():
        assert torch.equal(got, want), name
        return
    finite = want.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(got.isnan(), want.isnan())
    assert same, f"{name}: not finite at other places"
    if finite.any():
        bound = rounding(want.dtype, terms, max(want[finite].abs().max().item(), 1.0))
        worst = (got[finite].double() - want[finite].double()).abs().max().item()
        assert worst <= bound, f"{name}: off by {worst:.2e}, rounding allows {bound:.2e}"


TERMS = STEPS * max(WIDTHS)
"""Sums over a layer's inputs, once more at each step."""


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a compiled step is expected and an ordinary one is taken."""
    if library.library() is None:
        pytest.skip("there are no compiled kernels")

    def never(*_: Any) -> Any:
        raise AssertionError("an ordinary step")

    monkeypatch.setattr(OnlineTrainer, "_ordinary", never)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_ordinary_loop(norm: str, rates: str, fast: None) -> None:
    Pair(mlp(NORMS[norm]).double(), RATES[rates]).compare(*samples(), TERMS)


@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_ordinary_loop_in_float32(norm: str, fast: None) -> None:
    x, y = samples()
    Pair(mlp(NORMS[norm]), RATES["momentum"]).compare(x.float(), y, TERMS)


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("widths", [WIDTHS, (1, 1, 1), (64, 32, 16, 8), (100, 33, 2), (3, 4)], ids=str)
def test_every_instruction_set(isa: str, widths: tuple[int, ...], fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library.library()
    assert loaded is not None
    if library.ISAS[isa] > loaded.streamnorm_isa():
        pytest.skip("more than this machine has")
    own = module._steps()
    step = loaded[f"online_steps_{isa}"]
    step.argtypes, step.restype = own.argtypes, own.restype  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_steps", lambda: step)
    x, y = samples(widths=widths)
    for dtype in (torch.float64, torch.float32):
        for rates in ("decay", "nesterov"):
            Pair(mlp(NORMS["mixed"], widths).to(dtype), RATES[rates]).compare(x.to(dtype), y, STEPS * max(widths))


@pytest.mark.parametrize("norm", ["mixed", "layer", "none"])
def test_squared_error(norm: str, fast: None) -> None:
    Pair(mlp(NORMS[norm]).double(), RATES["plain"], F.mse_loss).compare(*samples(loss=F.mse_loss), TERMS)


@compiled
def test_many_steps_are_the_same_steps() -> None:
    x, y = samples()
    one, many = (online(mlp(NORMS["mixed"]), RATES["decay"]) for _ in range(2))
    many.model.load_state_dict(one.model.state_dict())
    x = x.float()
    results = [one.step(a, b) for a, b in zip(x, y, strict=True)]
    losses, outputs = many.steps(x, y)
    assert torch.equal(losses, torch.stack([loss for loss, _ in results]))
    assert torch.equal(outputs, torch.stack([output for _, output in results]))
    for a, b in zip(one.model.state_dict().values(), many.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


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
def test_warm_up(warmup: Any, rates: str, fast: None) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES[rates], warmup=warmup)
    before = pair.trainer.model[-1].bias.detach().clone()
    x, y = samples(10)
    for i in range(10):
        pair.compare(x[i : i + 1], y[i : i + 1], TERMS)
        assert torch.equal(pair.trainer.model[-1].bias, before) == (i < (4 if warmup == "auto" else warmup))


def test_without_norms_there_is_no_warm_up(fast: None) -> None:
    pair = Pair(mlp(nn.LayerNorm).double(), RATES["plain"])
    pair.compare(*samples(3), TERMS)
    assert not pair.trainer.link.warming_up


@compiled
def test_steps_of_both_kinds_may_follow_each_other() -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["momentum"])
    x, y = samples()
    for i in range(0, STEPS, 3):
        pair.compare(x[i : i + 2], y[i : i + 2], TERMS)
        for model, optimizer in ((pair.twin, pair.optimizer), (pair.trainer.model, pair.trainer.optimizer)):
            with kernels.using("generic"):
                model(x[i : i + 1])  # an arrival that waits for the next weight update
                F.cross_entropy(model(x[i + 2 : i + 3]), y[i + 2 : i + 3]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if i % 2:
                    model(x[i : i + 1])
    assert pair.trainer.model[1].H1.updates == STEPS
    pair.twin.eval(), pair.trainer.model.eval()
    close("tested", pair.trainer.model(x), pair.twin(x), TERMS)


@compiled
@pytest.mark.parametrize("norm", ["p1-zero", "p2-zero", "p2-estimate", "layer", "none"])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e10, 1e18, 1e30])
def test_tiny_and_huge_inputs(norm: str, scale: float) -> None:
    x, y = samples(8)
    pair = Pair(mlp(NORMS[norm]), {"lr": 1e-3})
    x = x.float()
    x[5] = (x[5].double() * scale).float()
    if scale < 1:
        pair.compare(x, y, TERMS)
    else:  # what follows an explosion is a matter of its last digit
        pair.compare(x[:6], y[:6], TERMS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["mixed", "p1-zero", "layer", "none"])
def test_a_sample_that_is_not_finite(norm: str, value: float) -> None:
    """Weights and state are what the ordinary path makes of it, in a warm-up and after it."""
    x, y = samples(12)
    for at in (2, 8):
        bad = x.clone()
        bad[at, 3] = value
        pair = Pair(mlp(NORMS[norm]).double(), RATES["momentum"])
        pair.compare(bad, y, TERMS)
        if norm == "mixed":
            assert pair.trainer.model[1].H1.skipped == (1 if at == 2 else 4)


@compiled
def test_a_refused_sample_is_found_before_anything_changed() -> None:
    x, y = samples(1)
    trainer = online(mlp(NORMS["mixed"]).double(), RATES["momentum"], warmup=0)
    before = copy.deepcopy(trainer.model.state_dict())
    x[0, 0] = float("inf")
    loss, output = torch.empty(1).double(), torch.empty(1, 3).double()
    assert trainer._is_served()
    assert trainer._compiled(x, y, 1, 0, 1, False, loss, output) == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not trainer.optimizer.state_dict()["state"]
    assert trainer.link.updates == 0


@pytest.mark.parametrize("norm", ["mixed", "own", "layer", "none"])
@pytest.mark.parametrize("target", [float("nan"), float("inf"), 1e38])
def test_gradients_that_are_not_finite(norm: str, target: float, fast: None) -> None:
    """The forward pass is finite: H1 learns, H2 refuses."""
    x, y = samples(6, loss=F.mse_loss)
    y[5, 0] = target
    pair = Pair(mlp(NORMS[norm]), {"lr": 1e-3}, F.mse_loss, warmup=2)
    pair.compare(x.float(), y.float(), TERMS)


@compiled
def test_an_empty_memory_refuses_too() -> None:
    x, y = samples(1, loss=F.mse_loss)
    model = mlp(NORMS["mixed"]).double()
    for parameter in model.parameters():  # at the first sample every y is 0, and ReLU would stop what comes back
        nn.init.normal_(parameter)
    pair = Pair(model, {"lr": 1e-3}, F.mse_loss, warmup=0)
    pair.compare(x, y * float("inf"), TERMS)
    assert pair.trainer.model[1].H2.skipped == 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(OnlineTrainer, "_compiled", lambda *_: pytest.fail("a compiled step"))
    for rates in ("plain", "momentum"):
        Pair(mlp(NORMS["mixed"]).double(), RATES[rates]).compare(*samples(), TERMS)


def test_other_backends_mean_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnlineTrainer, "_compiled", lambda *_: pytest.fail("a compiled step"))
    with kernels.using("generic"):
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


def test_rates_are_read_at_each_step(fast: None) -> None:
    pair = Pair(mlp(NORMS["mixed"]).double(), RATES["momentum"])
    optimizers = (pair.trainer.optimizer, pair.optimizer)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8) for optimizer in optimizers]
    x, y = samples(12)
    for i in range(0, 12, 2):
        pair.compare(x[i : i + 2], y[i : i + 2], TERMS)
        for scheduler in schedulers:
            scheduler.step()
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.2
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    pair.compare(x, y, TERMS)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] *= 0.5
    pair.compare(x, y, TERMS)


def test_groups_of_parameters() -> None:
    model = mlp(NORMS["mixed"]).double()
    twin = copy.deepcopy(model)
    pair = Pair(model, RATES["plain"])
    pair.twin = twin

    def grouped(m: nn.Sequential) -> torch.optim.SGD:
        rest = [p for name, p in m.named_parameters() if name not in ("0.weight", "3.weight")]
        return torch.optim.SGD(
            [
                {"params": [m[0].weight], "weight_decay": 0.1},
                {"params": rest, "lr": 0.005, "momentum": 0.9},
            ],
            lr=0.01,
        )  # the second weight is in no group

    pair.trainer = OnlineTrainer(model, grouped(model))
    pair.optimizer = grouped(twin)
    pair.link = attach(twin, pair.optimizer)
    pair.compare(*samples(), TERMS)


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


def test_what_moved_is_found_again(fast: None) -> None:
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


def test_a_gain_and_bias_of_its_own(fast: None) -> None:
    model = nn.Sequential(nn.Linear(19, 7), StreamingNorm(7, affine=False), Affine(7), nn.Linear(7, 3)).double()
    Pair(model, RATES["plain"]).compare(*samples(), TERMS)


def test_layer_norm_without_gain_or_bias(fast: None) -> None:
    for options in ({"elementwise_affine": False}, {"bias": False, "eps": 0.1}):
        model = nn.Sequential(nn.Linear(19, 7), nn.LayerNorm(7, **options), nn.ReLU(), nn.Linear(7, 3)).double()
        Pair(model, RATES["plain"]).compare(*samples(), TERMS)


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
    with pytest.raises(TypeError, match="Adam"):
        OnlineTrainer(model, torch.optim.Adam(model.parameters()))  # type: ignore[arg-type]
    for loss in (F.l1_loss, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(ignore_index=1)):
        with pytest.raises(ValueError, match="loss_fn is"):
            OnlineTrainer(model, sgd, loss)
    with pytest.raises(ValueError, match="warmup"):
        OnlineTrainer(model, sgd, warmup=-1)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="share their memory"):
        OnlineTrainer(model, sgd)


def test_maximize_is_the_ordinary_step() -> None:
    Pair(mlp(NORMS["layer"]).double(), {"lr": 1e-3, "maximize": True}).compare(*samples(6), TERMS)


def test_losses_as_modules() -> None:
    x, y = samples(3)
    for loss, target in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), torch.randn(3, 3).double())):
        Pair(mlp(None).double(), RATES["plain"], loss).compare(x, target, TERMS)


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


def test_it_learns() -> None:
    """Two classes on either side of a circle."""
    x = torch.randn(3000, 2)
    y = (x.norm(dim=1) > 1.2).long()
    model = nn.Sequential(nn.Linear(2, 32), StreamingNorm(32, p=1, center="zero"), nn.ReLU(), nn.Linear(32, 2))
    trainer = online(model, RATES["plain"])
    _, outputs = trainer.steps(x, y)
    wrong = (outputs.argmax(1) != y).float()
    assert wrong[-500:].mean() < 0.6 * wrong[:500].mean()
