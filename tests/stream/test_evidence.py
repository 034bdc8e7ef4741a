"""Memories counted in samples: the laws of F (``Pooled``) and of G (``Residual``), alone and in a layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import draw
from close import assert_close
from torch import Tensor

import streamnorm as sn
from streamnorm.definition.stats import Center
from streamnorm.stream import CHUNK

FEEDBACK = sn.Lp(2, "estimate", eps=1e-20)
"""About mu_hat and all but without eps, the statistics of a call tell its mean square of y."""


class Samples(sn.Evidence):
    """``memory`` samples are remembered, however many a weight update holds."""

    @property
    def F(self) -> sn.Pooled:
        return sn.Pooled(self.memory, updates=0)


def layer(c: int = 3, memory: float = 11, ref: sn.NormRef = sn.BA1, moment: sn.Lp | None = None) -> sn.Norm:
    return sn.Norm(c, ref, moment or sn.Lp(2, "estimate"), Samples(memory)).double()


def call(norm: sn.Norm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def tables(g: int, seed: int, features: int = 3) -> Tensor:
    """Statistics ``(g, 2, features)``, sigma above 0."""
    s = draw((g, 2, features), seed)
    s[:, 1] = s[:, 1].abs() + 0.1
    return s


# Many arrivals at once


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("g", [1, 5, CHUNK + 3])
def test_statistics_at_once_equal_statistics_one_by_one(g: int, masked: bool) -> None:
    rule = sn.Pooled(memory=7, prior=2.5, samples=2)
    once = each = {k: v.double() if v.ndim else v for k, v in rule.empty((2, 3)).items()}
    for cycle in range(3):
        s = tables(g, cycle)
        ok = torch.rand(g, generator=torch.Generator().manual_seed(cycle)) < 0.7 if masked else None
        once, together = rule.observe(once, s, ok)
        each, apart = sn.Rule.observe(rule, each, s, ok)
        let_in = slice(None) if ok is None else ok
        assert_close("estimates", together[let_in], apart[let_in], g)
        compare(once, each, g)
        once, each = rule.fold(once), rule.fold(each)
        compare(once, each, g)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("g", [1, 5, CHUNK + 3])
def test_gradients_at_once_equal_gradients_one_by_one(g: int, masked: bool) -> None:
    rule = sn.Residual(memory=6.5, samples=2)
    once = each = {k: v.double() if v.ndim else v for k, v in rule.empty((2, 3)).items()}
    for cycle in range(2):
        arrivals = (draw((g, 2, 3), cycle), tables(g, cycle + 10), tables(g, cycle + 20))
        ok = torch.rand(g, generator=torch.Generator().manual_seed(cycle)) < 0.7 if masked else None
        once, together = rule.observe(once, *arrivals, ok)
        each, apart = sn.GradientRule.observe(rule, each, *arrivals, ok)
        if ok is not None:
            together, apart = together[ok], apart[ok]
        assert_close("estimates", together, apart, g)
        compare(once, each, g)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], terms: int) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(name, got[name].double(), value.double(), terms)


@pytest.mark.parametrize("rule", [sn.Pooled(7), sn.Residual(7)], ids=repr)
def test_what_is_not_finite_is_left_out(rule: sn.Pooled | sn.Residual) -> None:
    with_it, without = sn.Memory(rule, (2, 3)).double(), sn.Memory(rule, (2, 3)).double()
    for cycle in range(3):
        s, context = tables(5, cycle), (tables(5, cycle + 10), tables(5, cycle + 20))
        s[2, 1, 0] = math.inf
        ok = torch.tensor([True, True, False, True, True])
        estimates = with_it.take(s, ok, 2, context)
        want = without.take(s[ok], None, 2, (context[0][ok], context[1][ok]))
        assert_close("estimates", estimates[ok], want, 64)
        for memory in (with_it, without):
            memory.fold()
    compare(with_it.state(), without.state(), 64)
    assert int(with_it.skipped) == 3


def test_a_refused_first_arrival_leaves_no_prior() -> None:
    memory = sn.Memory(sn.Pooled(100), (2, 3)).double()
    s = tables(2, 0)
    s[0] = math.nan
    both = memory.observe(s)
    alone = sn.Memory(sn.Pooled(100), (2, 3)).double()
    assert_close("the first that is let in", both[1:], alone.observe(s[1:]), 1)


# F


@pytest.mark.parametrize("cycles", [(3, 1, 4, 2), (10,), (1,) * 10], ids=str)
def test_the_mean_of_everything_until_the_memory_is_full(cycles: tuple[int, ...]) -> None:
    memory = sn.Memory(sn.Pooled(memory=10), (2, 3)).double()
    s, seen = tables(sum(cycles), 0), 0
    for arrivals in cycles:
        for _ in range(arrivals):
            estimate = memory.observe(s[seen : seen + 1])[0]
            seen += 1
            assert_close("mean", estimate[0], s[:seen, 0].mean(0), 64)
            wide = (s[0, 0].var(correction=0) + s[0, 1].square().mean()).sqrt()
            if len(cycles) == 1:  # ten samples of prior: after the first weight update the memory would be full
                assert_close("sigma", estimate[1], (10 * wide + s[:seen, 1].sum(0)) / (10 + seen), 64)
        memory.fold()


def test_the_oldest_is_forgotten_once_the_memory_is_full() -> None:
    memory = sn.Memory(sn.Pooled(memory=3, prior=0, updates=0), (2, 1)).double()
    s = tables(40, 0, features=1)
    mean = s[0]
    for j, one in enumerate(s):
        M = min(j, 3)
        mean = (M * mean + one) / (M + 1)
        assert_close("estimate", memory.observe(one[None])[0], mean, 64)
        memory.fold()


def test_samples_are_the_weights() -> None:
    """An arrival of 4 samples, or their mean 4 times, or 4 arrivals of one sample."""
    s = tables(4, 0)
    at_once, repeated, apart = (sn.Memory(sn.Pooled(memory=9, prior=0), (2, 3)).double() for _ in range(3))
    for cycle in range(3):
        now = s + cycle
        at_once.take(now.mean(0, keepdim=True), None, 4)
        repeated.take(now.mean(0).expand(4, 2, 3), None, 1)
        apart.take(now, None, 1)
        for memory in (at_once, repeated, apart):
            memory.fold()
    compare(at_once.state(), repeated.state(), 64)
    compare(at_once.state(), apart.state(), 64)


@pytest.mark.parametrize(("remembered", "limit"), [(0, 5), (2, 16)])
@pytest.mark.parametrize("updates", [1, 2, 6])
def test_long_has_its_closed_form(updates: int, remembered: int, limit: int) -> None:
    """``memory`` samples, or as many weight updates, whichever holds more; whole at first."""
    N = 8
    memory = sn.Memory(sn.Pooled(memory=5, prior=0, updates=remembered), (2, 3)).double()
    want, M = torch.zeros(2, 3, dtype=torch.float64), 0
    for u in range(updates):
        s = tables(4, u)
        memory.take(s, None, 2)
        want = (M * want + N * s.mean(0)) / (M + N)
        M = min(M + N, limit)
        memory.fold()
    assert_close("long", memory.long, want, 64)
    assert (int(memory.count), int(memory.held)) == (0, M)


def test_an_update_without_arrivals_changes_nothing() -> None:
    memory = sn.Memory(sn.Pooled(9), (2, 3))
    memory.fold()
    memory.observe(tables(2, 0).float())
    memory.fold()
    before = copy.deepcopy(memory.state_dict())
    memory.fold()
    assert all(torch.equal(before[k], v) for k, v in memory.state_dict().items())


def test_a_layer_of_one_sample_a_call_divides_by_more_than_the_floor() -> None:
    """In Setting B the first sigma of one sample is sqrt(eps): with the prior, the first outputs are of size 1."""
    norm = layer(64, 100)
    for step in range(5):
        y = norm(torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        norm.fold()
        assert y.abs().max() < 10


# Replicas


@pytest.mark.parametrize("folded", [0, 1, 3])
def test_merged_replicas_have_seen_what_one_process_sees(folded: int) -> None:
    whole = sn.Memory(sn.Pooled(9), (2, 3)).double()
    for cycle in range(folded):
        whole.take(tables(2, cycle), None, 3)
        whole.fold()
    whole.take(tables(1, 7), None, 3)
    left, right = copy.deepcopy(whole), copy.deepcopy(whole)
    if folded == 0:
        right = sn.Memory(sn.Pooled(9), (2, 3)).double()
    else:  # of what both have seen since the weight update, one of them counts
        right.short.zero_()
        right.count.zero_()
    s = tables(5, 8)
    whole.take(s, None, 3)
    left.take(s[:2], None, 3)
    right.take(s[2:], None, 3)
    left.merge([right])
    compare(left.state(), whole.state(), 64)


def test_a_replica_that_has_seen_nothing_leaves_the_prior_of_the_others() -> None:
    nothing, something = (sn.Memory(sn.Pooled(9), (2, 3)).double() for _ in range(2))
    something.observe(tables(2, 0))
    nothing.merge([something])
    compare(nothing.state(), something.state(), 1)


def test_regressions_merge_by_samples() -> None:
    rule = sn.Residual(9)
    theta = torch.tensor([[1.0], [2.0]])
    states = [{"theta": theta * k, "held": torch.tensor(held)} for k, held in ((1, 6), (4, 2))]
    merged = rule.merge(states)
    assert torch.equal(merged["theta"], theta * (6 + 8) / 8)
    assert merged["held"] == 6
    empty = rule.empty((2, 1))
    assert torch.equal(rule.merge([empty, empty])["theta"], empty["theta"])


# G


def batch_norm_gradient(x: Tensor, dy: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy)[0]


@pytest.mark.parametrize("center", ["batch", "estimate"])
def test_without_a_memory_this_is_batch_normalization(center: Center) -> None:
    norm = layer(memory=1e-9, moment=sn.Lp(2, center))
    for step in range(3):
        x, dy = draw((64, 3, 2), step), draw((64, 3, 2), 10 + step)
        y, dx = call(norm, x, dy)
        want = batch_norm_gradient(x, dy)
        # s_hat and theta are those of the mini-batch to a share of 1e-9 / 64.
        assert (y - F.batch_norm(x, None, None, training=True)).abs().max() <= 1e-8
        assert (dx - want).norm() <= 1e-6 * want.norm()
        norm.fold()


def test_batch_normalization_is_the_limit_of_many_samples() -> None:
    errors = []
    for n in (1_000, 100_000):
        norm = layer(memory=100)
        for step in range(2):
            x, dy = draw((n, 3), step), draw((n, 3), 10 + step)
            dx, want = call(norm, x, dy)[1], batch_norm_gradient(x, dy)
            norm.fold()
        errors.append(((dx - want).norm() / want.norm()).item())
    # All that is not this mini-batch's has a weight of 100 / n.
    assert errors[1] < errors[0] / 10
    assert errors[1] < 100 / 100_000


def drive(
    norm: sn.Norm, steps: int, sample: Callable[[int], Tensor], gradient: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample a call: y, dy, and what is handed on times sigma_hat, ``(steps, c)``."""
    rows = []
    for step in range(steps):
        x = sample(step)
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        dy = gradient(y.detach())
        (dx,) = torch.autograd.grad(y, leaf, dy)
        rows.append((y.detach(), dy, dx * norm.H1.estimate[1]))
        norm.fold()
    y, dy, on = (torch.cat(column) for column in zip(*rows, strict=True))
    return y, dy, on


def test_what_is_handed_on_sums_to_the_change_of_the_coefficients() -> None:
    """``M (theta_T - theta_0)``: however long the stream, the mean and the correlation with y add up to no more."""
    generator = torch.Generator().manual_seed(0)
    norm = layer(memory=50, moment=FEEDBACK)
    M = norm.H2.rule.memory

    def sample(_: int) -> Tensor:
        return torch.randn(1, 3, dtype=torch.float64, generator=generator) * 2 + 1

    def gradient(y: Tensor) -> Tensor:
        return 3 + 2 * y + torch.randn(y.shape, dtype=torch.float64, generator=generator)

    drive(norm, 20, sample, gradient)
    start = norm.H2.theta.clone()
    assert norm.H2.held >= M
    T = 400
    y, dy, on = drive(norm, T, sample, gradient)
    change = M * (norm.H2.theta - start)
    assert_close("sum", on.sum(0), change[0], T)
    assert_close("sum with y", (on * y).sum(0), change[1], T)
    assert on.mean(0).abs().max() <= M * (norm.H2.theta - start).abs().max() / T + 1e-10
    assert dy.mean(0).min() > 2, "what arrives does have a mean"
    assert on.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)], ids=str)
def test_of_many_activations_their_sum_is_the_change(shape: tuple[int, ...]) -> None:
    """``M (theta_T - theta_{T-1}) = m sum of what is handed on``, and likewise with y."""
    norm = layer(memory=10, moment=FEEDBACK)
    for step in range(4):
        start = norm.H2.theta.clone()
        y, dx = call(norm, draw(shape, step), draw(shape, 10 + step))
        on = dx * norm.H1.estimate[1].reshape(3, *[1] * (len(shape) - 2))
        M, m = (1, 2)[step > 0], shape[0]
        for j, sums in enumerate((on, on * y)):
            total = sums.sum([0, *range(2, len(shape))])
            assert_close("change", M * (norm.H2.theta - start)[j], m * total, 64)
        norm.fold()


def feed_back(rule: sn.Residual, state: dict[str, Tensor], y: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One sample with mu_hat = 0 and sigma_hat = 1: the new state, and what is handed on."""
    s_hat = torch.stack([torch.zeros_like(y), torch.ones_like(y)])
    state, g_hat = rule.step(state, -torch.stack([dy, dy * y]), torch.stack([y, y.abs()]), s_hat)
    return state, dy + g_hat[0] + g_hat[1] * y.sign()


@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("memory", [1.0, 20.0])
def test_no_size_of_y_makes_the_feedback_unstable(size: float, memory: float) -> None:
    """``M |theta_T|^2 + sum of what is handed on^2 <= M |theta_0|^2 + sum dy^2``, whatever y is."""
    rule, generator = sn.Residual(memory), torch.Generator().manual_seed(1)
    state = {"theta": torch.ones(2, 3, dtype=torch.float64), "held": torch.tensor(100)}
    come, gone = memory * state["theta"].square().sum(0), 0.0
    for step in range(300):
        y = torch.randn(3, dtype=torch.float64, generator=generator) * (size if step % 7 == 0 else 1)
        dy = torch.sign(y) * (y.abs() % 3 + 1)
        state, on = feed_back(rule, state, y, dy)
        come, gone = come + dy.square(), gone + on.square()
        assert (memory * state["theta"].square().sum(0) + gone <= come * (1 + 1e-9)).all()


def test_outliers_in_float32_stay_finite() -> None:
    rule = sn.Residual(20)
    state = rule.empty((2, 1))
    for step in range(200):
        y, dy = torch.tensor([1e6 if step % 3 == 0 else 0.5 * (-1) ** step]), torch.tensor([1.0 + step % 2])
        state, on = feed_back(rule, state, y, dy)
        # 1e6 times the last digit of the coefficients is below 1.
        assert on.abs() <= 4
        assert state["theta"].abs().max() <= 4


# Cycles


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("center", ["estimate", "zero"])
def test_a_cycle_in_one_call_equals_the_loop(center: Center, m: int) -> None:
    n, (at_once, loop) = 4, (layer(moment=sn.Lp(2, center)) for _ in range(2))
    for cycle in range(3):
        x, dy = draw((n * m, 3, 2), cycle), draw((n * m, 3, 2), 10 + cycle)
        with sn.vectorized(at_once, n):
            got = call(at_once, x, dy)
        parts = [call(loop, a, b) for a, b in zip(x.split(m), dy.split(m), strict=True)]
        for a, b in zip(got, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert_close("cycle", a, b, 64)
        for norm in (at_once, loop):
            norm.fold()
        for which in ("H1", "H2"):
            compare(getattr(at_once, which).state(), getattr(loop, which).state(), 64)


def test_going_back_through_time_the_last_step_arrives_first() -> None:
    T, (at_once, loop) = 5, (layer() for _ in range(2))
    for cycle in range(2):
        x, dy = draw((T * 3, 3), cycle), draw((T * 3, 3), 10 + cycle)
        with sn.vectorized(at_once, T):
            at_once.reverse = True
            got = call(at_once, x, dy)
            at_once.reverse = False
        leaf = x.clone().requires_grad_()
        y = torch.cat([loop(part) for part in leaf.split(3)])
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert_close("y", got[0], y.detach(), 64)
        assert_close("dx", got[1], dx, 64)
        for norm in (at_once, loop):
            norm.fold()
        compare(at_once.H2.state(), loop.H2.state(), 64)


# Checkpoints


def test_resumed_in_the_middle_of_a_cycle_bit_for_bit() -> None:
    norm = layer()
    for step in range(4):
        call(norm, draw((3, 3), step), draw((3, 3), 10 + step))
        if step == 1:
            norm.fold()
    loaded = layer()
    loaded.load_state_dict(copy.deepcopy(norm.state_dict()))
    twin = copy.deepcopy(norm)
    for step in range(4, 7):
        want = call(norm, draw((3, 3), step), draw((3, 3), 10 + step))
        for other in (loaded, twin):
            assert all(map(torch.equal, call(other, draw((3, 3), step), draw((3, 3), 10 + step)), want))
        for each in (norm, loaded, twin):
            each.fold()
    for other in (loaded, twin):
        assert all(map(torch.equal, other.state_dict().values(), norm.state_dict().values()))


@pytest.mark.parametrize("ref", [sn.BA1, sn.BA6], ids=repr)
def test_a_checkpoint_of_the_long_and_short_rule_goes_on(ref: sn.NormRef) -> None:
    old = sn.StreamingNorm(3, ref, alpha=(0.7, 0.3), affine=False).double()
    for step in range(3):
        call(old, draw((4, 3, 2), step), draw((4, 3, 2), 10 + step))
        old.fold()
    saved = old.state_dict()
    new = layer(ref=ref)
    new.load_state_dict(saved, strict=True)
    assert "H1.counter_count_updates_seen_skipped" in saved, "what was saved is left as it was"
    x = draw((4, 3, 2), 5)
    assert torch.equal(new.eval()(x), old.eval()(x))
    assert torch.equal(new.H1.long, old.H1.long)
    assert new.H1.held == new.H1.rule.memory
    assert not new.H2.theta.any()
    y, dx = call(new.train(), x, draw((4, 3, 2), 6))
    assert y.isfinite().all()
    assert dx.isfinite().all()


def test_a_checkpoint_of_the_long_and_short_rule_in_its_first_cycle() -> None:
    old, new = sn.StreamingNorm(3, alpha=(0.7, 0.3), affine=False).double(), layer()
    call(old, draw((4, 3), 0), draw((4, 3), 1))
    new.load_state_dict(old.state_dict(), strict=True)
    assert new.H1.held == 0
    assert torch.equal(new.eval()(draw((4, 3), 2)), old.eval()(draw((4, 3), 2)))
    y = new.train()(draw((4, 3), 2))
    assert y.isfinite().all()
    assert y.abs().max() < 10


# Rules of one's own


class Started(sn.Rule):
    """An F whose first state is mean 0, deviation 1, and not the first arrival."""

    def empty(self, shape):
        average = torch.zeros(*shape)
        average[1] = 1.0
        return {"average": average}

    def step(self, state, s):
        average = 0.9 * state["average"] + 0.1 * s
        return {"average": average}, average


class Units(sn.GradientRule):
    """A G that remembers gradients in units of y and sees how far s is from s_hat."""

    def empty(self, shape):
        return {"average": torch.zeros(*shape), "far": torch.zeros(*shape)}

    def step(self, state, g, s, s_hat):
        average = 0.5 * state["average"] + 0.5 * g * s_hat[1]
        return {"average": average, "far": (s - s_hat) / s_hat[1]}, average / s_hat[1]


class Own(sn.Policy):
    F, G, uses_estimate = Started(), Units(), True


def test_rules_of_ones_own_that_begin_elsewhere_and_see_the_call() -> None:
    norm = sn.Norm(3, sn.BA1, sn.Lp(2, "estimate"), Own()).double()
    average, remembered = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64), torch.zeros(2, 3).double()
    for step in range(3):
        x, dy = draw((4, 3), step), draw((4, 3), 10 + step)
        y, dx = call(norm, x, dy)
        mu_hat = 0.9 * average[0] + 0.1 * x.mean(0)
        sigma = ((x - mu_hat).square().mean(0) + 1e-5).sqrt()
        average = torch.stack([mu_hat, 0.9 * average[1] + 0.1 * sigma])
        assert_close("y", y, (x - mu_hat) / average[1], 64)
        remembered = 0.5 * remembered - 0.5 * torch.stack([dy.sum(0), (dy * y).sum(0)])
        v, u = remembered / average[1]
        assert_close("dx", dx, dy / average[1] + v / 4 + u * (x - mu_hat) / sigma / 4, 64)
        assert_close("far", norm.H2.far[1], (sigma - average[1]) / average[1], 64)
        norm.fold()


def test_a_g_asked_without_its_call_says_what_it_needs() -> None:
    memory = sn.Memory(sn.Residual(5), (2, 3))
    with pytest.raises(TypeError, match="it has to see the statistics of the call"):
        memory.observe(torch.zeros(1, 2, 3))
