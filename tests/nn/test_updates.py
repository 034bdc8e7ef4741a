"""Layers hear of weight updates by themselves: once an update, of the right optimizer, or they say what is missing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import streamnorm as sn
from streamnorm.nn.norm import norms
from streamnorm.nn.updates import CHECK, _updates


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No warning but those that a test asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*weight update")
        yield


def paper(c: int, **options: Any) -> sn.StreamingNorm:
    """The paper's rule, whose memories count weight updates."""
    return sn.StreamingNorm(c, alpha=(0.7, 0.3), **options)


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3, bias=False), paper(3, **options), nn.ReLU(), nn.Linear(3, 2))


def train(model: nn.Module, optimizer: Any, updates: int = 3, calls: int = 2) -> None:
    for _ in range(updates):
        for _ in range(calls):
            model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def folds(model: nn.Module) -> list[tuple[int, int]]:
    """How many weight updates H1 and H2 of each layer have counted."""
    return [(int(n.H1.updates), int(n.H2.updates)) for n in norms(model) if n.H1 is not None and n.H2 is not None]


# --- Once an update


def test_a_plain_loop_needs_nothing() -> None:
    model = net()
    train(model, SGD(model.parameters(), lr=0.1))
    assert folds(model) == [(3, 3)]
    assert model[1].H1.count == model[1].H2.count == 0


def saved(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)), saved], ids=["copy", "pickle", "file"]
)
def test_a_copy_of_model_and_optimizer_goes_on_by_itself(duplicate: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    model(torch.randn(5, 4)).sum().backward()  # in the middle of a cycle
    twin, other = duplicate((model, optimizer))
    train(twin, other)
    assert (folds(twin), folds(model)) == ([(4, 4)], [(1, 1)])
    train(model, optimizer, 1)
    assert (folds(twin), folds(model)) == ([(4, 4)], [(2, 2)])


def test_another_optimizer_takes_over() -> None:
    model = net()
    train(model, SGD(model.parameters(), lr=0.1))
    train(model, torch.optim.AdamW(model.parameters()))
    assert folds(model) == [(6, 6)]


def test_a_layer_put_in_later_is_found() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    model[1] = paper(3)
    optimizer.add_param_group({"params": model[1].parameters()})
    train(model, optimizer)
    assert folds(model) == [(3, 3)]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "fused": lambda model: SGD(model.parameters(), lr=0.1, fused=True),
    "foreach": lambda model: torch.optim.Adam(model.parameters(), foreach=True),
    "weight decay for matrices alone": lambda model: SGD(
        [{"params": [p for p in model.parameters() if (p.ndim > 1) == d], "weight_decay": d * 0.1} for d in (1, 0)],
        lr=0.1,
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_kind_of_step_is_heard_of(make: Callable[[nn.Module], Optimizer]) -> None:
    model = net()
    train(model, make(model))
    assert folds(model) == [(3, 3)]


def test_two_optimizers_for_one_model_fold_once() -> None:
    """As one for matrices beside one for the rest."""
    model = net()
    both = [SGD([p for p in model.parameters() if (p.ndim > 1) == wide], lr=0.1) for wide in (True, False)]
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert folds(model) == [(3, 3)]


def test_models_with_optimizers_of_their_own_fold_at_their_own_steps() -> None:
    """As a generator whose loss passes through a discriminator."""
    generator, discriminator = net(), nn.Sequential(nn.Linear(2, 4), net())
    of_g, of_d = (SGD(model.parameters(), lr=0.1) for model in (generator, discriminator))
    for _ in range(3):
        discriminator(generator(torch.randn(5, 4))).sum().backward()
        of_g.step()
    assert (folds(generator), folds(discriminator)) == ([(3, 3)], [(0, 0)])
    of_d.step()
    assert (folds(generator), folds(discriminator)) == ([(3, 3)], [(1, 1)])


class Sharpness(Optimizer):
    """Sharpness-aware minimization: climb, look again, step back and update."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_step(self) -> None:
        self.climbed = [(p, p.grad * self.defaults["rho"]) for g in self.param_groups for p in g["params"]]
        for p, by in self.climbed:
            p += by
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, by in self.climbed:
            p -= by
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("in_two", [True, False])
def test_an_optimizer_that_wraps_another_folds_once(in_two: bool) -> None:
    model = net()
    optimizer = Sharpness(model.parameters())

    def closure() -> None:
        model(torch.randn(5, 4)).sum().backward()

    for _ in range(3):
        closure()
        if in_two:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
    assert folds(model) == [(3, 3)]


def test_a_closure_that_is_called_many_times_is_one_update() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 20).reshape(5, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert folds(model) == [(2, 2)]


def test_an_optimizer_for_each_parameter_in_the_backward_pass() -> None:
    model = net()
    each = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def update(p: nn.Parameter) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        assert model[1].H2.count == 0
    assert folds(model) == [(3, 3)]


@pytest.mark.parametrize("fused", [False, True], ids=["scaler skips step()", "the kernel skips"])
def test_a_step_that_a_gradient_scaler_skips_folds_nothing(fused: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    counted = []
    for step in range(4):
        scaler.scale(model(torch.randn(5, 4)).sum()).backward()
        if step in (1, 2):
            model[-1].bias.grad.mul_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted.append((int(model[1].H1.updates), int(model[1].H1.count)))
    assert counted == [(1, 0), (1, 1), (1, 2), (2, 0)]


def test_folding_by_hand_as_well_changes_nothing() -> None:
    torch.manual_seed(0)
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        torch.manual_seed(1)
        optimizer = SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            train(one, optimizer, 1)
            if one is other:
                one[1].fold()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_compiled_model_hears_of_updates_too() -> None:
    torch._dynamo.reset()
    model = net()
    train(torch.compile(model, backend="aot_eager", fullgraph=True), SGD(model.parameters(), lr=0.1))
    assert folds(model) == [(3, 3)]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_of_the_optimizer_folds() -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        step()
        optimizer.zero_grad()
    assert folds(model) == [(3, 3)]


def test_layers_are_heard_of_as_long_as_they_live() -> None:
    gc.collect()
    before = len(_updates.layers)
    models = [net() for _ in range(5)]
    assert len(_updates.layers) == before + 5
    copies = copy.deepcopy(models)
    assert len(_updates.layers) == before + 10
    del models, copies
    gc.collect()
    assert len(_updates.layers) == before
    sn.BatchNorm(3), sn.SampleNorm(3)  # weight updates do not change them
    assert len(_updates.layers) == before


# --- Layers without parameters


def test_a_layer_without_parameters_follows_those_before_its_input() -> None:
    generator, discriminator = net(affine=False), nn.Sequential(nn.Linear(2, 4), net(affine=False))
    of_g, of_d = (SGD(model.parameters(), lr=0.1) for model in (generator, discriminator))
    for _ in range(3):
        discriminator(generator(torch.randn(5, 4))).sum().backward()
        of_g.step()
    assert (folds(generator), folds(discriminator)) == ([(3, 3)], [(0, 0)])
    of_d.step()
    assert folds(discriminator) == [(1, 1)]
    twin, other = copy.deepcopy((generator, of_g))
    train(twin, other)
    assert folds(twin) == [(6, 6)]


def test_a_recurrent_layer_without_gains_follows_its_weights() -> None:
    torch.manual_seed(0)
    model = sn.NormRNN(4, 3, norm=lambda c: paper(c, affine=False))
    optimizer, stranger = SGD(model.parameters(), lr=0.1), SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(6, 5, 4))[0].sum().backward()
        stranger.step()
        optimizer.step()
    assert {layer.H1.updates.item() for layer in norms(model)} == {3}


def standardizing() -> nn.Sequential:
    return nn.Sequential(paper(4, affine=False), nn.Linear(4, 2))


def test_a_layer_that_normalizes_the_data_follows_the_only_optimizer() -> None:
    model = standardizing()
    train(model, SGD(model.parameters(), lr=0.1))
    assert model[0].H1.updates == 3
    train(model, SGD(model.parameters(), lr=0.1))  # the first is gone
    assert model[0].H1.updates == 6


def test_a_layer_that_normalizes_the_data_says_that_there_are_several_optimizers() -> None:
    model = standardizing()
    optimizer, stranger = SGD(model.parameters(), lr=0.1), SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    train(model, optimizer, 1)
    model(torch.randn(5, 4))
    with pytest.warns(UserWarning, match=r"there are several: name one by streamnorm\.attach"):
        stranger.step()
    link = sn.attach(model, optimizer)
    before = int(model[0].H1.updates)
    for _ in range(2):
        model(torch.randn(5, 4))
        stranger.step()
        assert model[0].H1.updates == before
    optimizer.step()
    assert model[0].H1.updates == before + 1
    assert link.updates == 1


# --- What is missing is said


def test_a_teacher_says_that_nothing_links_it_and_attach_does() -> None:
    student = net()
    teacher, optimizer = copy.deepcopy(student), SGD(student.parameters(), lr=0.1)

    def lesson(times: int) -> None:
        for _ in range(times):
            with torch.no_grad():
                target = teacher(torch.randn(5, 4))
            (student(torch.randn(5, 4)) - target).square().mean().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"no parameter of it is held .* 1\d steps since.*attach\(model, optimizer\)"):
        lesson(CHECK)
    sn.attach(teacher, optimizer)
    lesson(3)
    assert (folds(teacher), folds(student)) == ([(3, 0)], [(CHECK + 3,) * 2])


def test_updates_by_hand_are_noticed() -> None:
    model = net()

    def update() -> None:
        model(torch.randn(5, 4)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
                p.grad = None

    for _ in range(CHECK - 1):
        update()
    with pytest.warns(UserWarning, match=rf"{CHECK} training calls and no weight update: its gain was changed"):
        update()
    for _ in range(2 * CHECK):
        update()  # said once


def test_a_long_cycle_is_no_reason_to_warn() -> None:
    model = net()
    train(model, SGD(model.parameters(), lr=0.1), updates=2, calls=70)
    assert folds(model) == [(2, 2)]


def test_training_in_eval_mode_is_noticed() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    model.eval()
    with pytest.warns(UserWarning, match=rf"was in eval mode for {CHECK} weight updates"):
        train(model, optimizer, CHECK, calls=1)


def test_a_frozen_layer_is_no_reason_to_warn() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    sn.freeze(model)
    train(model.train(), optimizer, CHECK, calls=1)
    assert folds(model) == [(1, 1)]


def test_evaluation_between_updates_is_no_reason_to_warn() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2 * CHECK):
        train(model.train(), optimizer, 1)
        model.eval()(torch.randn(5, 4))


# --- attach


def test_attach_refuses_a_model_without_layers_that_are_updated() -> None:
    model = nn.Sequential(nn.Linear(2, 3), sn.BatchNorm(3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="no layer whose memory changes at a weight update"):
        sn.attach(model, SGD(model.parameters(), lr=0.1))
    for wrong in ((model, "SGD"), (SGD(model.parameters(), lr=0.1), model)):
        with pytest.raises(TypeError, match=r"takes a module and an optimizer"):
            sn.attach(*wrong)  # type: ignore[arg-type]


class Wrapper(Optimizer):
    """As Accelerate's: it has no hooks of its own, and steps the optimizer that it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_attach_reaches_the_optimizer_that_another_wraps() -> None:
    teacher, student = net(), net()
    link = sn.attach(teacher, Wrapper(Wrapper(inner := SGD(student.parameters(), lr=0.1))))
    assert link.optimizer is inner
    teacher(torch.randn(5, 4))
    train(student, Wrapper(inner), 1)
    assert (folds(teacher), folds(student)) == ([(1, 0)], [(1, 1)])


def test_attach_finds_the_layers_that_the_model_has_now() -> None:
    teacher, student = net(), net()
    optimizer = SGD(student.parameters(), lr=0.1)
    with sn.attach(teacher, optimizer) as link:
        teacher[1] = paper(3)
        teacher(torch.randn(5, 4))
        train(student, optimizer, 1)
        assert folds(teacher) == [(1, 0)]
        assert link.layers == [teacher[1]]
    teacher(torch.randn(5, 4))
    train(student, optimizer, 1)
    assert folds(teacher) == [(1, 0)], "removed"


def test_attach_and_the_layers_own_hearing_are_one_update() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sn.attach(model, optimizer)
    train(model, optimizer)
    assert folds(model) == [(3, 3)]
