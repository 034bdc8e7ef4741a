"""Decoupled accumulation and update: what a cycle computes, in one call or a loop, and what layers hear of updates."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.dau import AUTO_WARMUP
from streamnorm.layers import Norm

MIXED = sn.Streaming(alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1))
CLASSES = 3
FEATURES = 6

MakeNorm = Callable[[int], nn.Module]


def streaming(c: int) -> Norm:
    return sn.StreamingNorm(c)


def connected(norm: MakeNorm) -> nn.Module:
    """Two normalized layers on inputs (n, 5)."""
    return nn.Sequential(
        nn.Linear(5, FEATURES, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, FEATURES, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, CLASSES),
    )


def convolutional(norm: MakeNorm) -> nn.Module:
    """Two normalized layers on inputs (n, 2, 4, 4)."""
    return nn.Sequential(
        nn.Conv2d(2, FEATURES, 3, padding=1, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Conv2d(FEATURES, FEATURES, 3, stride=2, padding=1, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * FEATURES, CLASSES),
    )


NETS: dict[str, tuple[Callable[[MakeNorm], nn.Module], tuple[int, ...]]] = {
    "FC": (connected, (5,)),
    "conv": (convolutional, (2, 4, 4)),
}


def net(kind: str, norm: MakeNorm = streaming, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[kind][0](norm).double()


def batch(kind: str, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + torch.randn(samples, *NETS[kind][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def sgd(model: nn.Module, **changes: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **changes})


def dau(model: nn.Module, m: int, n: int, **changes: Any) -> sn.DAU:
    optimizer = changes.pop("optimizer", None) or sgd(model)
    loss = nn.functional.cross_entropy
    return sn.DAU(model, optimizer, loss, samples_per_batch=m, batches_per_update=n, **{"warmup": 0, **changes})


def everything(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and all that memories hold."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved(before: list[Tensor], model: nn.Module) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def memories(model: nn.Module) -> list[Norm]:
    return [m for m in model.modules() if isinstance(m, Norm) and m.policy.uses_estimate]


# --- One mini-batch a cycle


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("norm", [streaming, sn.BatchNorm, sn.SampleNorm, nn.BatchNorm1d], ids=lambda f: f.__name__)
def test_one_batch_an_update_is_conventional_training_to_the_bit(norm: MakeNorm, vectorize: bool) -> None:
    ours, plain = net("FC", norm), net("FC", norm)
    cycle = dau(ours, 4, 1, vectorize=vectorize)
    optimizer = sgd(plain)
    for step in range(5):
        x, y = batch("FC", 4, step)
        loss, output = cycle.update(x, y)
        want = plain(x)
        want_loss = F.cross_entropy(want, y)
        want_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in memories(plain):
            layer.fold()
        assert torch.equal(loss, want_loss.detach())
        assert torch.equal(output, want.detach())
        assert_equal(everything(ours), everything(plain))


def test_an_update_uses_the_mean_of_the_mini_batch_gradients_and_clears_them() -> None:
    model = net("FC", sn.SampleNorm)
    x, y = batch("FC", 6, 0)
    start = weights(model)
    dau(model, 2, 3, optimizer=sgd(model, lr=1.0, momentum=0, weight_decay=0)).update(x, y)
    assert all(p.grad is None for p in model.parameters())
    twin = net("FC", sn.SampleNorm)
    F.cross_entropy(twin(x), y).backward()
    for before, after, want in zip(start, model.parameters(), twin.parameters(), strict=True):
        assert want.grad is not None
        # The mean of 3 mean gradients is the mean over all: 6 terms of about 1, 2e-16 each.
        torch.testing.assert_close(before - after, want.grad, rtol=0, atol=1e-13)


# --- A cycle in one call and in a loop


def arms() -> list[tuple[str, str, float, sn.NormRef, sn.Policy]]:
    found = []
    for p in (1, 2):
        for center in ("batch", "estimate", "zero"):
            found.append(("streaming", center, p, sn.BA1, MIXED))
            found.append(("batch", center, p, sn.BA1, sn.Batch()))
            if center != "estimate":  # a sample alone keeps no estimate
                found.append(("sample", center, p, sn.SP2, sn.Sample()))
    return found


def cases() -> list[Any]:
    found = []
    for kind in NETS:
        for name, center, p, ref, policy in arms():
            for m in (1, 2, 3):
                if (kind, center, ref, m) == ("FC", "batch", sn.BA1, 1):
                    continue  # one activation: refused
                for n in (1, 2, 5):
                    setting = {"batch": "A", "estimate": "B", "zero": "C"}[center]
                    moment = sn.Lp(p, center)
                    label = f"{kind}-{name}-{setting}{p}-{m}x{n}"
                    found.append(pytest.param(kind, ref, moment, policy, m, n, id=label))
    return found


def assert_cycles_agree(
    kind: str, norm: MakeNorm, m: int, n: int, cycles: int = 3, warmup: int = 0, bound: float = 1e-11
) -> None:
    """``bound``: rounding is 2e-16, sums have some 100 terms, and where a sigma stands at its floor sqrt(eps) = 3e-3 a
    division makes that 300 times as large: 7e-12."""
    one_call, one_by_one = net(kind, norm), net(kind, norm)
    fast = dau(one_call, m, n, warmup=warmup)
    slow = dau(one_by_one, m, n, warmup=warmup, vectorize=False)
    for step in range(cycles):
        x, y = batch(kind, m * n, step)
        loss, output = fast.update(x, y)
        slow_loss, slow_output = slow.update(x, y)
        torch.testing.assert_close(loss, slow_loss, rtol=bound, atol=bound)
        torch.testing.assert_close(output, slow_output, rtol=bound, atol=bound)
        want = everything(one_by_one)
        for name, value in everything(one_call).items():
            assert value.isfinite().all(), name
            size = max(1.0, want[name].abs().max().item())
            torch.testing.assert_close(value, want[name], rtol=0, atol=bound * size, msg=lambda s, k=name: f"{k}: {s}")


@pytest.mark.parametrize(("kind", "ref", "moment", "policy", "m", "n"), cases())
def test_a_cycle_in_one_call_equals_the_loop(
    kind: str, ref: sn.NormRef, moment: sn.Lp, policy: sn.Policy, m: int, n: int
) -> None:
    warmup = 1 if m == 1 and kind == "FC" else 0  # no first sigma from one activation alone
    assert_cycles_agree(kind, lambda c: Norm(c, ref, moment, policy, affine=True), m, n, 3 + warmup, warmup)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("ref", [sn.BA4.with_window(3), sn.BA6, sn.SP1, sn.NormRef(2, "all", "one")], ids=repr)
def test_a_cycle_in_one_call_equals_the_loop_for_other_references(kind: str, ref: sn.NormRef) -> None:
    assert_cycles_agree(kind, lambda c: Norm(c, ref, sn.Lp(2, "estimate"), MIXED), 3, 4)


def test_a_cycle_longer_than_a_chunk_of_the_rules_equals_the_loop() -> None:
    from streamnorm.stream import CHUNK

    assert_cycles_agree("FC", streaming, 2, CHUNK + 3, cycles=1)


@pytest.mark.parametrize(("m", "n"), [(1, 5), (3, 2), (2, 1)])
@pytest.mark.parametrize("norm", [streaming, sn.BatchNorm, sn.SampleNorm], ids=lambda f: f.__name__)
def test_mini_batches_as_they_arrive_equal_the_loop_to_the_bit(norm: MakeNorm, m: int, n: int) -> None:
    at_once, arriving = net("conv", norm), net("conv", norm)
    loop, stream = dau(at_once, m, n, vectorize=False), dau(arriving, m, n)
    for step in range(3):
        x, y = batch("conv", m * n, step)
        loss, output = loop.update(x, y)
        results = [stream.accumulate(a, b) for a, b in zip(x.split(m), y.split(m), strict=True)]
        assert torch.equal(torch.stack([part for part, _ in results]).mean(), loss)
        assert torch.equal(torch.cat([part for _, part in results]), output)
        assert not output.requires_grad
        assert_equal(everything(arriving), everything(at_once))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_warm_up_cycle_moves_h1_alone(vectorize: bool) -> None:
    model = net("FC")
    cycle = dau(model, 2, 3, vectorize=vectorize)
    before = weights(model)
    cycle.warm_up(batch("FC", 6, 0)[0])
    assert not moved(before, model)
    assert all(p.grad is None for p in model.parameters())
    for layer in memories(model):
        assert (layer.H1.seen, layer.H1.updates, layer.H1.count) == (3, 1, 0)
        assert (layer.H2.seen, layer.H2.updates, layer.H2.count) == (0, 0, 0)


def test_a_warm_up_in_one_call_equals_the_loop() -> None:
    models = net("FC"), net("FC")
    for model, vectorize in zip(models, (True, False), strict=True):
        for step in range(3):
            dau(model, 1, 5, vectorize=vectorize).warm_up(batch("FC", 5, step)[0])
    for name, want in everything(models[1]).items():
        # the bound of assert_cycles_agree
        torch.testing.assert_close(everything(models[0])[name], want, rtol=1e-11, atol=1e-11)


# --- What a cycle is not: n batches of m are not one of m n


def gradient(norm: MakeNorm, m: int, n: int) -> Tensor:
    """The weight update of one cycle at rate 1, end to end."""
    model = net("FC", norm)
    before = weights(model)
    dau(model, m, n, optimizer=sgd(model, lr=1.0, momentum=0, weight_decay=0)).update(*batch("FC", 12, 0))
    return torch.cat([(a - b.detach()).flatten() for a, b in zip(before, model.parameters(), strict=True)])


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("m", "n"), [(2, 6), (4, 3), (6, 2)])
def test_batch_normalization_sees_the_mini_batches_and_not_the_cycle(m: int, n: int) -> None:
    assert apart(gradient(sn.BatchNorm, m, n), gradient(sn.BatchNorm, 12, 1)) > 1e-4


@pytest.mark.parametrize(("m", "n"), [(1, 12), (2, 6), (6, 2)])
def test_layer_normalization_does_not_care_how_a_cycle_is_cut(m: int, n: int) -> None:
    assert apart(gradient(sn.SampleNorm, m, n), gradient(sn.SampleNorm, 12, 1)) <= 1e-10


# --- vectorized


@pytest.mark.parametrize("kind", ["BatchNorm1d", "SyncBatchNorm"])
def test_batch_normalization_of_torch_is_refused_in_one_call_by_name(kind: str) -> None:
    model = net("FC", getattr(nn, kind))
    with pytest.raises(ValueError, match=f"{kind} '1' would normalize 3 mini-batches as one") as refusal:
        dau(model, 2, 3).update(*batch("FC", 6, 0))
    assert "streamnorm.BatchNorm" in str(refusal.value)
    assert "vectorize=False" in str(refusal.value)


def test_batch_normalization_of_torch_is_served_by_the_loop_and_in_eval_mode() -> None:
    model = net("FC", nn.BatchNorm1d)
    dau(model, 2, 3, vectorize=False).update(*batch("FC", 6, 0))
    assert model[1].num_batches_tracked == 3
    for layer in (model[1], model[4]):
        layer.eval()
    with sn.vectorized(model, 3):
        model(batch("FC", 6, 0)[0])
    assert model[1].num_batches_tracked == 3


def test_layers_are_as_before_after_an_exception_inside_vectorized() -> None:
    model = net("FC")
    memories(model)[1].steps = 2  # whatever stood there

    def fail_inside() -> None:
        with sn.vectorized(model, 3):
            assert [layer.steps for layer in memories(model)] == [3, 3]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_inside()
    assert [layer.steps for layer in memories(model)] == [1, 2]


def test_layers_are_as_before_after_an_update_that_raises() -> None:
    model = net("FC")
    cycle = dau(model, 2, 3)
    with pytest.raises(RuntimeError):
        cycle.update(torch.zeros(6, 7, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))
    assert [layer.steps for layer in memories(model)] == [1, 1]
    cycle.update(*batch("FC", 6, 0))


def test_vectorized_can_be_nested() -> None:
    model = net("FC")
    with sn.vectorized(model, 6):
        with sn.vectorized(model, 2):
            model(batch("FC", 6, 0)[0])
        assert [layer.steps for layer in memories(model)] == [6, 6]
        model(batch("FC", 6, 1)[0])
    assert [layer.steps for layer in memories(model)] == [1, 1]
    assert memories(model)[0].H1.seen == 8


@pytest.mark.parametrize("batches", [0, -1])
def test_vectorized_refuses_fewer_than_one_mini_batch(batches: int) -> None:
    with pytest.raises(ValueError, match=f">= 1, got {batches}"), sn.vectorized(net("FC"), batches):
        pass


def test_samples_that_do_not_divide_are_refused_and_change_nothing() -> None:
    model = net("FC")
    before = everything(model)
    with pytest.raises(ValueError, match="7 samples do not divide into 3"), sn.vectorized(model, 3):
        model(batch("FC", 7, 0)[0])
    assert_equal(everything(model), before)


# --- DAU: arguments and cycles


@pytest.mark.parametrize("name", ["samples_per_batch", "batches_per_update"])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_dau_refuses_what_is_no_number_of_samples_or_batches(name: str, value: Any) -> None:
    model = net("FC")
    with pytest.raises(ValueError, match=f"{name} is a whole number >= 1, got {value}"):
        sn.DAU(model, sgd(model), F.cross_entropy, **{name: value})


@pytest.mark.parametrize(("inputs", "targets"), [(5, 5), (7, 7), (6, 5), (0, 0)])
def test_an_update_refuses_another_number_of_samples_and_changes_nothing(inputs: int, targets: int) -> None:
    model = net("FC")
    before = everything(model)
    x, y = batch("FC", 7, 0)
    with pytest.raises(ValueError, match=f"3 mini-batches of 2 samples, 6 in all; got {inputs} .* {targets} targets"):
        dau(model, 2, 3).update(x[:inputs], y[:targets])
    assert_equal(everything(model), before)


def test_an_update_in_the_middle_of_a_cycle_is_refused() -> None:
    cycle = dau(net("FC"), 2, 3)
    x, y = batch("FC", 6, 0)
    cycle.accumulate(x[:2], y[:2])
    with pytest.raises(ValueError, match="1 of 3 mini-batches are accumulated"):
        cycle.update(x, y)


def test_weights_move_at_the_last_mini_batch_of_a_cycle_alone() -> None:
    model = net("FC")
    cycle = dau(model, 2, 3)
    for step in range(7):
        before = weights(model)
        cycle.accumulate(*batch("FC", 2, step))
        assert moved(before, model) == (step % 3 == 2)


class Saved:
    """What autograd keeps of one tensor; counts those alive, and their most."""

    alive = most = 0

    def __init__(self, value: Tensor) -> None:
        self.value, self.size = value, value.numel()
        Saved.alive += self.size
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.size


def most_saved(n: int, vectorize: bool) -> int:
    """The largest number of values that autograd holds at once in a cycle of n mini-batches."""
    cycle = dau(net("conv"), 2, n, vectorize=vectorize)
    gc.collect()
    Saved.alive = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        cycle.update(*batch("conv", 2 * n, 0))
    assert Saved.alive == 0, "graphs outlive their update"
    return Saved.most


def test_the_loop_needs_the_memory_of_one_mini_batch_whatever_the_cycle() -> None:
    assert most_saved(2, vectorize=False) == most_saved(24, vectorize=False) > 0


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_warm_up_cycle_keeps_no_graph(vectorize: bool) -> None:
    cycle = dau(net("conv"), 2, 3, vectorize=vectorize)
    gc.collect()
    Saved.alive = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        cycle.warm_up(batch("conv", 6, 0)[0])
    assert Saved.most == 0


def test_one_call_needs_the_memory_of_all_mini_batches() -> None:
    assert most_saved(24, vectorize=True) > 8 * most_saved(2, vectorize=True)


# --- attach: folds


def test_attached_layers_fold_once_at_every_step() -> None:
    model = net("FC")
    optimizer = sgd(model)
    link = sn.attach(model, optimizer, warmup=0)
    for update in range(1, 4):
        for step in range(update):  # uneven cycles
            x, y = batch("FC", 2, 10 * update + step)
            F.cross_entropy(model(x), y).backward()
            for layer in memories(model):
                assert (layer.H1.count, layer.H1.updates) == (step + 1, update - 1)
                assert (layer.H2.count, layer.H2.updates) == (step + 1, update - 1)
        optimizer.step()
        optimizer.zero_grad()
        assert link.updates == update
        for layer in memories(model):
            assert (layer.H1.count, layer.H1.updates) == (0, update)
            assert (layer.H2.count, layer.H2.updates) == (0, update)


def test_attached_layers_end_as_if_folded_by_hand() -> None:
    attached, by_hand = net("FC"), net("FC")
    optimizers = sgd(attached), sgd(by_hand)
    sn.attach(attached, optimizers[0], warmup=0)
    for step in range(5):
        x, y = batch("FC", 2, step)
        for model, optimizer in zip((attached, by_hand), optimizers, strict=True):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        for layer in memories(by_hand):
            layer.fold()
        assert_equal(everything(attached), everything(by_hand))


class Remembers(sn.Policy):
    """A user's policy: batch normalization whose statistics and gradients are remembered by rules that fold."""

    F = sn.LongShort((0.5, 0.5, 0.0), (0.5, 0.5))
    G = sn.LongShort((0.5, 0.5, 0.0), (0.5, 0.5))


def test_every_memory_of_an_attached_model_folds_whatever_training_normalizes_with() -> None:
    model = net("FC", lambda c: Norm(c, sn.BA1, sn.Lp(2, "batch"), Remembers(), affine=True))
    optimizer = sgd(model)
    sn.attach(model, optimizer, warmup=0)
    x, y = batch("FC", 4, 0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert (model[1].H1.updates, model[1].H1.count) == (1, 0)
    assert (model[1].H2.updates, model[1].H2.count) == (1, 0)


def test_a_layer_that_stands_twice_in_a_model_folds_once() -> None:
    model = net("FC")
    model[4] = model[1]
    assert len(sn.attach(model, sgd(model)).layers) == 1


def test_two_links_to_one_optimizer_fold_like_one() -> None:
    models = net("FC"), net("FC")
    for count, model in enumerate(models, 1):
        optimizer = sgd(model)
        for _ in range(count):
            sn.attach(model, optimizer, warmup=0)
        for step in range(3):
            x, y = batch("FC", 2, step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(everything(models[1]), everything(models[0]))


@pytest.mark.parametrize("fused", [False, True], ids=["scaler skips step()", "the kernel skips"])
def test_a_step_that_a_gradient_scaler_skips_folds_nothing(fused: bool) -> None:
    torch.manual_seed(0)
    model = connected(streaming)
    optimizer = sgd(model, fused=fused)
    sn.attach(model, optimizer, warmup=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    counts = []
    for step in range(4):
        x, y = batch("FC", 2, step)
        loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        if step in (1, 2):  # an overflow in the read-out alone: the layers before it have arrivals like any other
            model[-1].bias.grad.mul_(torch.inf)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert moved(before, model) == (step not in (1, 2))
        layer = memories(model)[1]
        counts.append((layer.H1.count.item(), layer.H1.updates.item(), layer.H2.count.item(), layer.H2.updates.item()))
    assert counts == [(0, 1, 0, 1), (1, 1, 1, 1), (2, 1, 2, 1), (0, 2, 0, 2)]


@pytest.mark.parametrize(
    "fused",
    [pytest.param(False, id="scaler skips step()"), pytest.param(True, id="the kernel skips")],
)
def test_a_step_that_a_gradient_scaler_skips_is_no_weight_update_seen(fused: bool) -> None:
    torch.manual_seed(0)
    model = connected(streaming)
    optimizer = sgd(model, fused=fused)
    link = sn.attach(model, optimizer, warmup=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        x, y = batch("FC", 2, step)
        scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
        if step == 1:
            model[-1].bias.grad.mul_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert link.updates == 2


# --- attach: warm-up


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum and decay": lambda model: sgd(model, lr=0.1, weight_decay=0.1, nesterov=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    "fused": lambda model: sgd(model, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_warm_up_folds_statistics_and_leaves_weights_and_gradient_memory_alone(steps: int, make: Any) -> None:
    model = net("FC")
    optimizer = make(model)
    link = sn.attach(model, optimizer, warmup=steps)
    before = weights(model)
    for step in range(steps + 2):
        assert link.warming_up == (step < steps)
        for part in range(2):
            x, y = batch("FC", 1, 2 * step + part)
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < steps:
            assert not moved(before, model)
            assert not optimizer.state, "a step that did nothing left a trace in the optimizer"
        for layer in memories(model):
            assert (layer.H1.count, layer.H1.updates, layer.H1.seen) == (0, step + 1, 2 * (step + 1))
            assert layer.H2.updates == max(0, step + 1 - steps)
            assert layer.H2.count == 0
            if step < steps:
                assert layer.H2.seen == 0
                assert not layer.H2.long.any()
                assert not layer.H2.estimate.any()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_warm_up_leaves_the_weights_alone_when_step_is_given_a_closure() -> None:
    model = net("FC")
    optimizer = sgd(model)
    sn.attach(model, optimizer, warmup=2)
    before = weights(model)
    x, y = batch("FC", 1, 0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert not moved(before, model)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, m: int, steps: range) -> None:
    for step in steps:
        x, y = batch(kind, m, step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def deep_convolutional() -> nn.Module:
    """A normalized layer with a map of 8x8."""
    torch.manual_seed(0)
    norm = sn.StreamingNorm(FEATURES)
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2, FEATURES, 3, padding=1, bias=False),
        norm,
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64 * FEATURES, CLASSES),
    ).double()


def test_auto_warms_up_for_one_sample_a_batch_of_a_connected_layer() -> None:
    model = net("FC")
    optimizer = sgd(model)
    sn.attach(model, optimizer)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(AUTO_WARMUP))
    assert not moved(before, model)
    take_steps(model, optimizer, "FC", 1, range(1))
    assert moved(before, model)


def test_auto_does_not_warm_up_for_one_sample_a_batch_of_a_convolutional_layer() -> None:
    model = deep_convolutional()
    optimizer = sgd(model)
    sn.attach(model, optimizer)
    before = weights(model)
    take_steps(model, optimizer, "conv", 1, range(1))
    assert moved(before, model)


def test_auto_does_not_warm_up_where_nothing_streams() -> None:
    model = net("FC", sn.SampleNorm)
    optimizer = sgd(model)
    sn.attach(model, optimizer)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(1))
    assert moved(before, model)


def test_dau_warms_up_by_itself_in_one_call_and_in_the_loop() -> None:
    for vectorize in (True, False):
        model = net("FC")
        cycle = dau(model, 1, 3, warmup="auto", vectorize=vectorize)
        before = weights(model)
        for step in range(AUTO_WARMUP):
            cycle.update(*batch("FC", 3, step))
        assert not moved(before, model)
        cycle.update(*batch("FC", 3, AUTO_WARMUP))
        assert moved(before, model)


@pytest.mark.parametrize("warmup", [-1, 1.5, True, "always", None])
def test_a_warmup_that_is_no_number_of_steps_is_refused(warmup: Any) -> None:
    model = net("FC")
    with pytest.raises(ValueError, match=f'>= 0 or "auto", got {warmup!r}'):
        sn.attach(model, sgd(model), warmup)


@pytest.mark.parametrize("warmup", [3, "auto"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_goes_on_in_the_middle_of_a_warm_up(stop: int, warmup: Any) -> None:
    through = net("FC")
    optimizer = sgd(through)
    sn.attach(through, optimizer, warmup)
    take_steps(through, optimizer, "FC", 1, range(7))

    stopped = net("FC")
    optimizer = sgd(stopped)
    link = sn.attach(stopped, optimizer, warmup)
    take_steps(stopped, optimizer, "FC", 1, range(stop))
    kept = pickle.dumps((stopped.state_dict(), optimizer.state_dict(), link.state_dict()))

    resumed = net("FC", seed=1)
    optimizer = sgd(resumed)
    link = sn.attach(resumed, optimizer, warmup)
    states = pickle.loads(kept)
    for part, state in zip((resumed, optimizer, link), states, strict=True):
        part.load_state_dict(state)
    take_steps(resumed, optimizer, "FC", 1, range(stop, 7))
    assert_equal(everything(resumed), everything(through))


# --- attach: the link


def test_a_removed_link_folds_nothing_and_drops_no_gradient() -> None:
    model = net("FC")
    optimizer = sgd(model)
    link = sn.attach(model, optimizer, warmup=5)
    before = weights(model)
    take_steps(model, optimizer, "FC", 1, range(2))
    assert not moved(before, model)
    link.remove()
    take_steps(model, optimizer, "FC", 1, range(2, 4))
    assert moved(before, model)
    assert link.updates == 2
    for layer in memories(model):
        assert (layer.H1.updates, layer.H1.count) == (2, 2)


def test_a_link_can_be_a_context_and_is_removed_even_by_an_exception() -> None:
    model = net("FC")
    optimizer = sgd(model)
    link = sn.attach(model, optimizer, warmup=0)

    def fail_inside() -> None:
        with link as same:
            assert same is link
            take_steps(model, optimizer, "FC", 1, range(2))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_inside()
    take_steps(model, optimizer, "FC", 1, range(2, 4))
    assert link.updates == 2
    assert memories(model)[0].H1.updates == 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_an_attached_model_goes_on_by_itself(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = net("FC")
    optimizer = sgd(model, momentum=0)
    sn.attach(model, optimizer, warmup=1)
    take_steps(model, optimizer, "FC", 2, range(3))
    x, y = batch("FC", 2, 3)
    F.cross_entropy(model(x), y).backward()  # in the middle of a cycle
    optimizer.zero_grad()
    twin = duplicate(model)
    state = everything(model)
    assert_equal(everything(twin), state)
    assert [layer.steps for layer in memories(twin)] == [1, 1]
    take_steps(model, optimizer, "FC", 2, range(4, 6))
    assert_equal(everything(twin), state)
    own = sgd(twin, momentum=0)
    sn.attach(twin, own, warmup=0)
    take_steps(twin, own, "FC", 2, range(4, 6))
    assert_equal(everything(twin), everything(model))
    assert torch.equal(twin.eval()(x), model.eval()(x))


# --- Anybody's loop


@pytest.mark.parametrize("cycle", [1, 16])
def test_a_plain_loop_over_single_samples_learns_digits(cycle: int) -> None:
    from streamnorm.training.data import load

    digits = load("digits", train_limit=450)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 48, bias=False),
        sn.StreamingNorm(48),
        nn.ReLU(),
        nn.Linear(48, 48, bias=False),
        sn.StreamingNorm(48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if cycle > 1 else 0.01)
    losses = []
    with sn.attach(model, optimizer):
        for step, (x, y) in enumerate(zip(digits.train_x.split(1), digits.train_y.split(1), strict=True), 1):
            loss = F.cross_entropy(model(x), y)
            (loss / cycle).backward()
            losses.append(loss.item())
            if step % cycle == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert all(v.isfinite().all() for v in everything(model).values())
    assert torch.tensor(losses).isfinite().all()
    start, end = sum(losses[:100]) / 100, sum(losses[-100:]) / 100
    assert end < 0.7 * start
    with torch.no_grad():
        wrong = (model.eval()(digits.test_x).argmax(1) != digits.test_y).float().mean()
    assert wrong < 0.5, "guessing errs in 0.9"
