"""Runs, architectures and the training loop: what they refuse, what an arm is, and that a run is a plain loop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import small, toy

from streamnorm.layers import Affine, Norm
from streamnorm.normref import REFS
from streamnorm.normstats import DegenerateReferenceError
from streamnorm.training import loop
from streamnorm.training.architectures import ARMS, Block, build
from streamnorm.training.data import Data
from streamnorm.training.loop import Trainer, evaluate, learning_rate, order, train
from streamnorm.training.run import Run

# --- Run


WHOLE, FINITE = "a whole number >= 1", "a finite number >= 0"
SIZES = ("width", "samples_per_batch", "batches_per_update", "epochs")
RATES = ("learning_rate", "momentum", "weight_decay")
REFUSED = [
    *[(name, value, WHOLE) for name in SIZES for value in (0, -3, 2.5, "8", None)],
    *[(name, value, FINITE) for name in RATES for value in (-0.1, math.inf, math.nan)],
    ("architecture", "C", '"A" (fully connected) or "B" (convolutional)'),
    ("warmup", -1, "a number of cycles >= 0"),
]


@pytest.mark.parametrize(("name", "value", "mend"), REFUSED)
def test_a_run_refuses_an_impossible_value_and_says_what_came_and_what_may_come(
    name: str, value: Any, mend: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} is ") as refusal:
        Run(**{name: value})
    assert f"got {value!r}" in str(refusal.value)
    assert mend in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [("momentum", 0), ("learning_rate", 0.0), ("warmup", 0), ("width", 1)])
def test_a_run_takes_the_smallest_values_it_names(name: str, value: float) -> None:
    assert getattr(Run(**{name: value}), name) == value


FULL = Run(
    data="mnist",
    architecture="B",
    width=24,
    arm="BA6-S",
    p=1.5,
    center="zero",
    alpha=(0.6, 0.4),
    beta=(0.5, 0.3, 0.2),
    kappa=(0.8, 0.2, 0.9, 0.1),
    samples_per_batch=3,
    batches_per_update=5,
    epochs=7,
    learning_rate=0.02,
    momentum=0.5,
    weight_decay=1e-4,
    warmup=3,
    seed=11,
    train_limit=100,
    test_limit=50,
)


@pytest.mark.parametrize("run", [Run(), FULL], ids=["defaults", "nothing default"])
def test_a_run_comes_back_from_json_as_it_was(run: Run) -> None:
    text = json.dumps(run.to_json(), allow_nan=False)
    assert Run.from_json(json.loads(text)) == run


def test_the_run_of_the_round_trip_has_no_default_left() -> None:
    assert [f.name for f in dataclasses.fields(Run) if getattr(FULL, f.name) == f.default] == []


def test_a_field_that_json_leaves_out_takes_its_default() -> None:
    assert Run.from_json({"width": 16}) == Run(width=16)


def test_an_unknown_field_is_refused_by_name_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="has no dropout, wdith; it has") as refusal:
        Run.from_json({"wdith": 16, "dropout": 0.5, "width": 8})
    assert all(f.name in str(refusal.value) for f in dataclasses.fields(Run))


def test_json_with_an_impossible_value_is_refused_like_the_constructor() -> None:
    with pytest.raises(ValueError, match="width is a whole number >= 1, got 0"):
        Run.from_json({"width": 0})


def test_a_run_cannot_be_changed_and_can_be_a_key() -> None:
    run = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.width = 9  # type: ignore[misc]
    assert {run: 1}[small()] == 1


def test_a_run_knows_its_samples_per_update_and_its_label() -> None:
    run = small(arm="BA6-S", samples_per_batch=3, batches_per_update=5)
    assert run.samples_per_update == 15
    assert run.label == "BA6-S 3 S/B x 5 B/U"


# --- Architectures and arms


IMAGE = (1, 8, 8)
ONE_ACTIVATION = {
    # In A there is no place: one feature of one sample is one activation.
    ("A", 2): {"instance", "SP1-B", "SP4-B"},
    ("A", 1): {"instance", "SP1-B", "SP4-B", "batch", "BA1-B", "BA4-B", "BA6-B"},
    # In B the maps of an 8x8 image hold at least 4x4 places; only "here" leaves one of them.
    ("B", 2): set(),
    ("B", 1): {"BA6-B"},
}
"""The arms of Setting A whose references hold a single activation, by architecture and samples per batch."""


def images(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *IMAGE, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def test_the_arms_are_seven_names_and_every_reference_in_two_forms() -> None:
    named = {"none", "layer", "instance", "group", "rms", "batch", "streaming"}
    assert set(ARMS) == named | {f"{ref}-{form}" for ref in REFS for form in "BS"}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("architecture", "m"), ONE_ACTIVATION)
def test_every_arm_has_finite_gradients_or_says_that_sigma_would_be_zero(architecture: str, m: int, arm: str) -> None:
    run = small(architecture=architecture, arm=arm, width=16)  # 16: two features in each of the 8 groups of "group"
    model = build(run, torch.zeros(IMAGE), 3)
    if arm in ONE_ACTIVATION[architecture, m]:
        with pytest.raises(DegenerateReferenceError, match=r"Setting A.*sigma = 0.*Setting B"):
            model(images(m)[0])
        return
    for step in range(3):  # one sample about its own estimate is 0: only a second one has a gradient
        x, y = images(m, step)
        output = model(x)
        assert output.shape == (m, 3)
        F.cross_entropy(output, y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.any(), f"{name} has no gradient"
    assert model.eval()(images(5)[0]).isfinite().all()


@pytest.mark.parametrize("architecture", ["A", "B"])
def test_arms_with_one_seed_start_from_the_same_weights(architecture: str) -> None:
    def weights(arm: str, seed: int) -> list[Tensor]:
        model = build(small(architecture=architecture, arm=arm, width=16, seed=seed), torch.zeros(IMAGE), 3)
        return [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]

    reference = weights("none", 5)
    assert len(reference) == {"A": 3 + 2, "B": 6 + 2}[architecture]
    for arm in ARMS:
        for a, b in zip(weights(arm, 5), reference, strict=True):
            assert torch.equal(a, b), arm
    assert not torch.equal(weights("none", 6)[0], reference[0])


@pytest.mark.parametrize("architecture", ["A", "B"])
def test_building_leaves_the_global_generator_alone(architecture: str) -> None:
    before = torch.get_rng_state()
    build(small(architecture=architecture, seed=3), torch.zeros(IMAGE), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_do_not_depend_on_the_global_generator() -> None:
    first = build(small(), torch.zeros(IMAGE), 3)
    torch.manual_seed(99)
    second = build(small(), torch.zeros(IMAGE), 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("architecture", "layers", "linears", "convolutions"), [("A", 3, 4, 0), ("B", 7, 1, 6)])
def test_the_architectures_have_their_layers_and_no_bias_before_a_normalization(
    architecture: str, layers: int, linears: int, convolutions: int
) -> None:
    model = build(small(architecture=architecture, width=8), torch.zeros(IMAGE), 3)
    kinds = [sum(isinstance(m, kind) for m in model.modules()) for kind in (Norm, nn.Linear, nn.Conv2d)]
    assert kinds == [layers, linears, convolutions]
    biased = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None]
    assert [type(m) for m in biased] == [nn.Linear]
    assert not biased[0].bias.any()


def test_architecture_b_halves_the_map_once_and_doubles_the_features() -> None:
    model = build(small(architecture="B", width=8), torch.zeros(IMAGE), 3)
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: shapes.append(tuple(y.shape[1:])))
    model(images(2)[0])
    assert shapes == [(8, 8, 8)] * 3 + [(16, 4, 4)] * 3


def test_a_block_adds_to_what_came_in() -> None:
    block = Block(4, Affine)
    nn.init.zeros_(block.branch[-1].weight)
    h = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(h), h)


def norm_of(arm: str, **changes: Any) -> nn.Module:
    model = build(small(arm=arm, width=16, **changes), torch.zeros(IMAGE), 3)
    return next(m for m in model.modules() if isinstance(m, (Norm, Affine)))


@pytest.mark.parametrize(
    ("arm", "changes", "layer"),
    [
        ("none", {}, "Affine(16)"),
        ("layer", {}, "Norm(16, SP2, Lp(p=2.0, center='batch', eps=1e-05), Sample(), affine=True)"),
        ("instance", {}, "Norm(16, SP1, Lp(p=2.0, center='batch', eps=1e-05), Sample(), affine=True)"),
        ("group", {}, "NormRef(features=8, place='all', samples='one')"),
        ("rms", {}, "Norm(16, SP2, Lp(p=2, center='zero', eps=1e-05), Sample(), affine=True, op=Scale())"),
        ("batch", {}, "Norm(16, BA1, Lp(p=2.0, center='batch', eps=1e-05), Batch(rate=0.1), affine=True)"),
        ("BA4-B", {"p": 1}, "Norm(16, BA4, Lp(p=1, center='batch', eps=1e-05), Batch(rate=0.1), affine=True)"),
        ("SP3-B", {"center": "zero"}, "Norm(16, SP3, Lp(p=2.0, center='zero', eps=1e-05), Sample(), affine=True)"),
        ("streaming", {}, "Norm(16, BA1, Lp(p=2.0, center='estimate', eps=1e-05), Streaming("),
        ("SP1-S", {"center": "zero"}, "Norm(16, SP1, Lp(p=2.0, center='zero', eps=1e-05), Streaming("),
        ("streaming", {"alpha": (0.5, 0.5)}, "Streaming(alpha=(0.5, 0.5), beta=(0.7, 0.3, 0.0), kappa=None)"),
        ("BA6-S", {"kappa": (0.9, 0.1, 0.8, 0.2)}, "kappa=(0.9, 0.1, 0.8, 0.2))"),
    ],
)
def test_an_arm_is_the_layer_that_its_name_and_the_run_say(arm: str, changes: dict[str, Any], layer: str) -> None:
    assert layer in repr(norm_of(arm, **changes))


@pytest.mark.parametrize(
    ("typo", "meant"), [("streming", "streaming"), ("BA6_S", "BA6-S"), ("layers", "layer"), ("Batch", "batch")]
)
def test_an_unknown_arm_is_refused_with_the_nearest_one(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown arm {typo!r}; did you mean {meant!r}?") as refusal:
        build(small(arm=typo), torch.zeros(IMAGE), 3)
    assert all(arm in str(refusal.value) for arm in ARMS)


def test_an_arm_like_no_other_is_refused_with_the_list_and_no_guess() -> None:
    with pytest.raises(ValueError, match="unknown arm '123'") as refusal:
        build(small(arm="123"), torch.zeros(IMAGE), 3)
    assert "did you mean" not in str(refusal.value)
    assert all(arm in str(refusal.value) for arm in ARMS)


@pytest.mark.parametrize("shape", [(16,), (4, 4), (1, 2, 4, 4)])
def test_architecture_b_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images \(c, height, width\), got") as refusal:
        build(small(architecture="B"), torch.zeros(shape), 3)
    assert f"got {shape}; use A" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 0.5}, "p is a number >= 1, got 0.5"),
        ({"center": "median"}, "center is \"batch\".*got 'median'"),
        ({"alpha": (1.0,)}, r"alpha is a tuple of 2 numbers, got \(1.0,\)"),
        ({"kappa": (1.0, 0.0)}, r"kappa is a tuple of 4 numbers, got \(1.0, 0.0\)"),
        ({"alpha": (1.0, 0.0)}, "give kappa"),
        ({"arm": "layer", "center": "estimate"}, r"needs a running estimate and Sample\(\) keeps none"),
        ({"arm": "group", "width": 12}, "12 features do not divide into 8 groups; choose a divisor of 12"),
    ],
)
def test_a_run_whose_layers_cannot_be_is_refused_before_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small(**changes), torch.zeros(IMAGE), 3)


# --- The loop


def steps(trainer: Trainer, count: int) -> Trainer:
    for _ in range(count):
        assert not trainer.finished
        trainer.step()
    return trainer


def to_the_end(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def seen_by(trainer: Trainer) -> list[Tensor]:
    """What goes through the model in training, call by call, from now on."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        if module is trainer.model and module.training:  # and not a copy of it that something is tried on
            seen.append(args[0].detach().clone())

    trainer.model.register_forward_pre_hook(keep)
    return seen


def test_the_order_is_a_permutation_of_the_seed_and_the_epoch_alone() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            orders[seed, epoch] = order(seed, epoch, 52)
            assert orders[seed, epoch].sort().values.tolist() == list(range(52))
    assert len({tuple(o.tolist()) for o in orders.values()}) == len(orders)
    order.cache_clear()
    state = torch.manual_seed(5).get_state()
    assert torch.equal(order(1, 2, 52), orders[1, 2])
    assert torch.equal(torch.get_rng_state(), state)


def test_all_arms_and_architectures_see_the_same_data_in_the_same_order() -> None:
    seen = []
    for architecture, arm, m, n in (("A", "layer", 3, 4), ("B", "batch", 6, 2), ("A", "none", 12, 1)):
        run = small(architecture=architecture, arm=arm, samples_per_batch=m, batches_per_update=n, seed=4)
        trainer = Trainer(run, toy())
        calls = seen_by(trainer)
        torch.manual_seed(m)
        to_the_end(trainer)
        seen.append(torch.cat(calls))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_an_epoch_leaves_out_what_does_not_fill_its_last_cycle() -> None:
    data = toy(52)
    trainer = Trainer(small(arm="layer", seed=3), data)
    calls = seen_by(trainer)
    to_the_end(trainer)
    assert trainer.updates == trainer.done == 2 * (52 // 12)
    for epoch in (0, 1):
        whole = data.train_x[order(3, epoch, 52)][:48]
        assert torch.equal(torch.cat(calls[4 * epoch : 4 * epoch + 4]), whole)


@pytest.mark.parametrize(("updates", "last"), [(30, 5), (6, 1), (7, 1), (1, 0), (1200, 200)])
def test_the_learning_rate_is_a_tenth_in_the_last_sixth(updates: int, last: int) -> None:
    rates = [learning_rate(small(learning_rate=0.4), update, updates) for update in range(updates)]
    full = updates - last
    assert rates == pytest.approx([0.4] * full + [0.04] * last)


def test_the_optimizer_uses_the_learning_rate_of_each_update() -> None:
    trainer = Trainer(small(epochs=3, learning_rate=0.4), toy())
    used: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    to_the_end(trainer)
    assert used == pytest.approx([0.4] * 10 + [0.04] * 2)


def by_hand(run: Run, data: Data, dtype: torch.dtype, warmup: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """The run as a plain loop over mini-batches of m samples, written apart from the code under test."""
    model = build(run, data.train_x[0], data.classes).to(dtype)
    optimizer = torch.optim.SGD(
        model.parameters(), run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
    )
    layers = [m for m in model.modules() if isinstance(m, Norm)]
    m, n, epochs = run.samples_per_batch, run.batches_per_update, []
    cycles = len(data.train_x) // (m * n)

    def batches(epoch: int, cycle: int) -> list[tuple[Tensor, Tensor]]:
        index = order(run.seed, epoch, len(data.train_x))[cycle * m * n : (cycle + 1) * m * n]
        return [(data.train_x[i].to(dtype), data.train_y[i]) for i in index.split(m)]

    for cycle in range(warmup):
        for x, _ in batches(0, cycle):
            model(x)
        for layer in layers:
            layer.fold()
    for epoch in range(run.epochs):
        loss_sum = wrong = 0.0
        for cycle in range(cycles):
            for x, y in batches(epoch, cycle):
                output = model(x)
                loss = F.cross_entropy(output, y)
                loss.backward()
                loss_sum += loss.item() * m
                wrong += (output.argmax(1) != y).sum().item()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= n
            late = epoch * cycles + cycle >= run.epochs * cycles * 5 / 6
            optimizer.param_groups[0]["lr"] = run.learning_rate * (0.1 if late else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for layer in layers:
                layer.fold()
        samples = cycles * m * n
        with torch.no_grad():
            output = model.eval()(data.test_x.to(dtype))
            model.train()
        epochs.append(
            {
                "epoch": epoch + 1,
                "updates": (epoch + 1) * cycles,
                "samples": (epoch + 1) * samples,
                "train_loss": loss_sum / samples,
                "train_error": wrong / samples,
                "test_loss": F.cross_entropy(output, data.test_y).item(),
                "test_error": (output.argmax(1) != data.test_y).double().mean().item(),
            }
        )
    return model, epochs


def flat(model: nn.Module) -> Tensor:
    """The weights and all that the memories hold, end to end."""
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


BY_HAND = [
    ("A", "streaming", 1, 12, 4),
    ("A", "streaming", 3, 4, 0),
    ("A", "BA6-S", 3, 4, 0),
    ("A", "batch", 6, 2, 0),
    ("A", "layer", 3, 4, 0),
    ("A", "none", 12, 1, 0),
    ("B", "streaming", 1, 12, 0),
    ("B", "batch", 2, 6, 0),
]


@pytest.mark.parametrize(("architecture", "arm", "m", "n", "warmup"), BY_HAND)
def test_a_run_is_a_plain_loop_over_mini_batches(architecture: str, arm: str, m: int, n: int, warmup: int) -> None:
    data = toy(place=4 if architecture == "A" else 8)
    changes = {"architecture": architecture, "arm": arm, "samples_per_batch": m, "batches_per_update": n}
    run = small(**changes, weight_decay=1e-3, learning_rate=0.02, warmup=warmup, seed=2)
    exact, epochs = by_hand(run, data, torch.float64, warmup)
    single, _ = by_hand(run, data, torch.float32, warmup)
    # How far rounding to float32 carries this run is what the plain loop itself loses to it. Another order of the same
    # sums rounds differently but not more; 30 times as far, because one run is a single draw of these roundings.
    lost = (flat(single) - flat(exact)).abs().max().item()
    assert lost < 1e-5, "so sensitive a run says nothing"
    trainer = to_the_end(Trainer(run, data))
    assert trainer.failed is None
    assert (flat(trainer.model) - flat(exact)).abs().max() <= 30 * lost
    wide = Trainer(run, dataclasses.replace(data, train_x=data.train_x.double(), test_x=data.test_x.double()))
    wide.model.double()
    to_the_end(wide)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert (flat(wide.model) - flat(exact)).abs().max() <= 30 * lost * finer
    for got, want in zip(wide.metrics, epochs, strict=True):
        assert got.pop("seconds") > 0
        assert list(got) == list(want)
        assert got == pytest.approx(want, rel=1e-9)  # 2e-16, 8 updates and all sums along; no count differs by one


def test_metrics_have_their_fields_and_units() -> None:
    trainer = Trainer(small(arm="layer", learning_rate=0.0, momentum=0.0), toy())
    to_the_end(trainer)
    first, second = trainer.metrics
    names = ["epoch", "updates", "samples", "train_loss", "train_error", "test_loss", "test_error", "seconds"]
    assert list(first) == list(second) == names
    assert (first["epoch"], first["updates"], first["samples"]) == (1, 4, 48)
    assert (second["epoch"], second["updates"], second["samples"]) == (2, 8, 96)
    # At rate 0 the weights stay, and so the losses can be had from the model in one call: mean nats, fractions.
    for epoch, line in enumerate(trainer.metrics):
        index = order(0, epoch, 52)[:48]
        with torch.no_grad():
            output = trainer.model(trainer.data.train_x[index])
        y = trainer.data.train_y[index]
        # 1e-5: float32 has 6e-8, sums of 48 terms of about 1 in two orders.
        assert line["train_loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-5)
        assert line["train_error"] == (output.argmax(1) != y).sum().item() / 48
    assert first["test_loss"] == second["test_loss"]
    assert 0 < first["seconds"] < 60


def test_a_run_learns() -> None:
    metrics = train(small(epochs=6), toy())["metrics"]
    assert metrics[-1]["train_loss"] < 0.5 * metrics[0]["train_loss"]
    assert metrics[-1]["test_error"] < 1 / 3, "guessing one of three errs in two thirds"


# --- evaluate


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


# --- Warm-up


@pytest.mark.parametrize(
    ("changes", "cycles"),
    [
        ({"samples_per_batch": 1, "batches_per_update": 12}, 4),
        ({"samples_per_batch": 1, "batches_per_update": 12, "warmup": 0}, 0),
        ({"samples_per_batch": 1, "batches_per_update": 12, "warmup": 2}, 2),
        ({"warmup": 7}, 7),  # more than an epoch has
        ({"samples_per_batch": 1, "batches_per_update": 12, "architecture": "B"}, 0),
    ],
)
def test_a_run_warms_up_for_so_many_cycles_before_its_first_update(changes: dict[str, Any], cycles: int) -> None:
    trainer = Trainer(small(**changes), toy(place=8))
    start = [p.detach().clone() for p in trainer.model.parameters()]
    calls = seen_by(trainer)
    weights: list[bool] = []

    def compare(*_: Any) -> None:
        now = trainer.model.parameters()
        weights.append(all(torch.equal(a, b) for a, b in zip(start, now, strict=True)))

    trainer.optimizer.register_step_pre_hook(compare)
    steps(trainer, 1)
    assert weights == [True], "one update, and nothing moved the weights before it"
    assert sum(len(x) for x in calls) == 12 * (cycles + 1)
    for layer in trainer.dau.link.layers:
        assert layer.H1.updates == cycles + 1
        assert layer.H2.updates == 1
    steps(trainer, 1)
    assert sum(len(x) for x in calls) == 12 * (cycles + 2)


# --- What cannot go on


def test_batch_normalization_of_one_sample_ends_as_failed_with_the_reason() -> None:
    record = train(small(arm="batch", samples_per_batch=1, batches_per_update=12), toy())
    assert record["metrics"] == []
    assert "Setting A" in record["failed"]
    assert "sigma = 0" in record["failed"]
    json.dumps(record, allow_nan=False)


def test_a_failed_run_takes_no_step_more() -> None:
    trainer = steps(Trainer(small(arm="batch", samples_per_batch=1, batches_per_update=12), toy()), 1)
    assert trainer.finished
    assert trainer.done == 0


def test_divergence_is_recorded_as_failed_with_the_update() -> None:
    record = train(small(arm="none", learning_rate=1e20), toy())
    assert record["failed"].startswith("diverged: the loss became ")
    assert "at update " in record["failed"]
    json.dumps(record, allow_nan=False)


def test_divergence_at_the_last_update_of_an_epoch_is_recorded_as_failed() -> None:
    run = small(arm="none", learning_rate=1e20, samples_per_batch=13, batches_per_update=4, epochs=1)
    trainer = to_the_end(Trainer(run, toy(52)))
    assert trainer.failed is not None
    assert trainer.failed.startswith("diverged: the test loss became ")
    assert "after update 1" in trainer.failed
    json.dumps(trainer.record(), allow_nan=False)


def test_more_samples_an_update_than_there_are_is_refused_with_all_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 S/B x 20 B/U = 60 samples, toy has 52 to train on"):
        train(small(samples_per_batch=3, batches_per_update=20), toy(52))
    assert Trainer(small(samples_per_batch=13, batches_per_update=4), toy(52)).per_epoch == 1


# --- Records


def test_the_record_says_what_was_run_on_what_with_what() -> None:
    run = small(seed=9)
    record = json.loads(json.dumps(train(run, toy()), allow_nan=False))
    assert Run.from_json(record["run"]) == run
    assert (record["arm"], record["label"], record["seed"]) == (run.arm, run.label, 9)
    assert (record["data"], record["source"]) == ("toy", "made by tests/toy.py")
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "streamnorm"} <= set(record["versions"])
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["cpu"]
    assert record["failed"] is None
    assert len(record["metrics"]) == run.epochs


def test_training_calls_progress_at_every_update() -> None:
    calls: list[tuple[int, int]] = []
    train(small(), toy(), progress=lambda done, of: calls.append((done, of)))
    assert calls == [(k, 8) for k in range(1, 9)]


def test_training_without_a_folder_writes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small(), toy())
    assert list(tmp_path.iterdir()) == []
