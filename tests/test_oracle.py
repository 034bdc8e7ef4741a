"""The oracle against closed forms, torch in float64 and numbers worked out by hand.

The tensor expressions below share no idea with the oracle's loops: a reference is a matrix (statistics x activations),
built as a Kronecker product of a feature part and a place part, and gradients come from autograd.
"""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.oracle import Oracle

REFS = {
    "SP1": ("own", "all", "one"),
    "SP2": ("all", "all", "one"),
    "SP3": ("all", "local", "one"),
    "SP4": ("own", "local", "one"),
    "SP5": ("all", "here", "one"),
    "BA1": ("own", "all", "batch"),
    "BA2": ("all", "all", "batch"),
    "BA3": ("all", "local", "batch"),
    "BA4": ("own", "local", "batch"),
    "BA5": ("all", "here", "batch"),
    "BA6": ("own", "here", "batch"),
}
CENTERS = ("batch", "estimate", "zero")
EPS = 1e-5
SHAPE = (3, 2, 3, 4)


def ref(name: str) -> dict:
    return dict(zip(("features", "place", "samples"), REFS[name], strict=True))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


def close(a: Tensor, b: Tensor) -> None:
    # Sums of under 10^3 numbers of order 1 in two different orders: a few hundred roundings of 1e-16.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Masks:
    """A reference: the matrix ``R`` (statistics, activations of a sample) and the statistic that ``serves`` each."""

    def __init__(self, features: str | int, place: str, samples: str, shape: tuple[int, ...], window: int) -> None:
        _, c, *lengths = shape
        groups = {"own": c, "all": 1}.get(features, features)
        feature = torch.eye(groups, dtype=torch.float64).repeat_interleave(c // groups, 1)
        where = torch.tensor(list(itertools.product(*map(range, lengths))), dtype=torch.float64)
        far = torch.zeros(max(1, len(where)), max(1, len(where)))
        if lengths:
            far = (where[:, None] - where[None]).abs().amax(2)
        within = {"all": torch.ones_like(far[:1]), "local": far <= window // 2, "here": far == 0}[place]
        served = torch.ones_like(far[:1]) if place == "all" else far == 0
        self.R = torch.kron(feature, within.double())
        self.serves = torch.kron(feature, served.double()).argmax(0)
        self.joint = samples == "batch"
        self.shape_of_s = (groups, *(() if place == "all" else lengths))
        self.shape = shape

    def blocks(self, x: Tensor) -> Tensor:
        """(blocks, samples of a block, activations of a sample)."""
        flat = x.reshape(self.shape[0], -1)
        return flat[None] if self.joint else flat[:, None]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (blocks, samples, statistics or 1, activations) over each reference."""
        return (values * self.R).sum((1, 3)) / (self.R.sum(1) * values.shape[1])

    def S(self, x: Tensor, p: float, center: str, mu_hat: Tensor | None = None, eps: float = EPS) -> Tensor:
        """s (blocks, 2, statistics)."""
        values = self.blocks(x)[:, :, None]
        mu = self.mean(values)
        c = {"batch": mu, "zero": torch.zeros_like(mu), "estimate": mu_hat}[center]
        assert c is not None
        d = values - c.expand_as(mu)[:, None, :, None]
        return torch.stack((mu, (self.mean(d.abs() ** p) + eps ** (p / 2)) ** (1 / p)), 1)

    def N(self, x: Tensor, s: Tensor, subtract_mean: bool = True) -> Tensor:
        mu, sigma = s[:, :, self.serves].unbind(1)
        return ((self.blocks(x) - mu[:, None] * subtract_mean) / sigma[:, None]).reshape(self.shape)


# The exact special cases: torch's own layers.


def grad_of(function, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (3, 2, 3, 4), (2, 2, 2, 3, 2)])
def test_streaming_reduces_to_batch_norm(shape):
    o = Oracle(**ref("BA1"), alpha=(0.0, 1.0), beta=(0.0, 0.0, 1.0))
    for seed in (1, 2, 3):
        x, dy = rand(*shape, seed=seed), rand(*shape, seed=seed + 10)
        y, dx = grad_of(lambda x: F.batch_norm(x, None, None, training=True, eps=EPS), x, dy)
        close(o.forward(x), y)
        close(o.backward(dy), dx)
        close(o.evaluate(x), y)
        o.update()


TORCH_LAYERS = {
    "layer_norm": (ref("SP2"), lambda x: F.layer_norm(x, x.shape[1:], eps=EPS)),
    "instance_norm": (ref("SP1"), lambda x: F.instance_norm(x, eps=EPS)),
    "group_norm": ({**ref("SP2"), "features": 2}, lambda x: F.group_norm(x, 2, eps=EPS)),
    "rms_norm": (
        {**ref("SP2"), "center": "zero", "subtract_mean": False},
        lambda x: F.rms_norm(x, x.shape[1:], eps=EPS),
    ),
}


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_sample_normalization_is_torchs(name):
    choice, layer = TORCH_LAYERS[name]
    x, dy = rand(*SHAPE, seed=1), rand(*SHAPE, seed=2)
    y, dx = grad_of(layer, x, dy)
    o = Oracle(**choice, policy="sample")
    close(o.forward(x), y)
    close(o.backward(dy), dx)
    close(o.evaluate(x), y)


# The exact policies: autograd of an independent expression.


@pytest.mark.parametrize(("p", "subtract_mean"), [(1, True), (1.5, True), (2, True), (3, True), (1.5, False)])
@pytest.mark.parametrize(
    ("name", "policy", "center"),
    [
        *((name, "sample", center) for name in REFS if name.startswith("SP") for center in ("batch", "zero")),
        *((name, "batch", center) for name in REFS if name.startswith("BA") for center in CENTERS),
        ("BA1", "sample", "batch"),
    ],
)
def test_exact_gradients(name, policy, center, p, subtract_mean):
    masks = Masks(*REFS[name], shape=SHAPE, window=3)
    o = Oracle(**ref(name), window=3, p=p, center=center, policy=policy, subtract_mean=subtract_mean)
    mu_hat = None
    for seed in (1, 2):
        x, dy = rand(*SHAPE, seed=seed), rand(*SHAPE, seed=seed + 10)
        if policy == "batch":
            now = masks.S(x, p, "zero")[0, 0]
            mu_hat = now if mu_hat is None else 0.9 * mu_hat + 0.1 * now
        expected, dx = grad_of(lambda x: masks.N(x, masks.S(x, p, center, mu_hat), subtract_mean), x, dy)  # noqa: B023
        close(o.forward(x), expected)
        close(o.backward(dy), dx)


# Streaming: the same expression and a separate account of the memories.


class Memory:
    """What has arrived, update cycle by update cycle."""

    def __init__(self, k_long: float, k_short: float) -> None:
        self.k, self.cycles, self.now = (k_long, k_short), [], []

    @property
    def short(self) -> Tensor:
        return torch.stack(self.now).mean(0)

    @property
    def long(self) -> Tensor:
        weights = [self.k[0] ** (len(self.cycles) - 1)]
        weights += [self.k[1] * self.k[0] ** (len(self.cycles) - 1 - i) for i in range(1, len(self.cycles))]
        means = [torch.stack(cycle).mean(0) for cycle in self.cycles]
        return torch.stack([w * mean for w, mean in zip(weights, means, strict=True)]).sum(0)

    def mix(self, a_long: float, a_short: float) -> Tensor:
        return a_long * (self.long if self.cycles else self.short) + a_short * self.short

    def fold(self) -> None:
        self.cycles, self.now = [*self.cycles, self.now], []


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("name", REFS)
def test_streaming_against_autograd(name, center, p):
    alpha, beta, kappa = (0.6, 0.3), (0.5, 0.2, 0.4), (0.8, 0.3, 0.4, 0.7)
    masks = Masks(*REFS[name], shape=SHAPE, window=3)
    o = Oracle(**ref(name), window=3, p=p, center=center, alpha=alpha, beta=beta, kappa=kappa)
    H1, H2 = Memory(*kappa[:2]), Memory(*kappa[2:])
    for seed, calls in enumerate((2, 1, 1)):
        for call in range(calls):
            x, dy = rand(*SHAPE, seed=10 * seed + call), rand(*SHAPE, seed=10 * seed + call + 5)
            mean_s = masks.S(x, p, "zero").mean(0)
            H1.now.append(mean_s)
            mu_hat = H1.mix(*alpha)[0]
            leaf = x.clone().requires_grad_()
            s = masks.S(leaf, p, center, mu_hat)
            H1.now[-1] = s.detach().mean(0)
            s_hat = H1.mix(*alpha).requires_grad_()
            y = masks.N(leaf, s_hat[None])
            direct, g = torch.autograd.grad(y, (leaf, s_hat), dy)
            H2.now.append(g)
            g_hat = H2.mix(*beta[:2]) + beta[2] * g
            (through_s,) = torch.autograd.grad(s.mean(0), leaf, g_hat)
            close(o.forward(x), y.detach())
            close(o.backward(dy), direct + through_s)
            close(o.estimate, s_hat.detach().reshape(2, *masks.shape_of_s))
            for memory, mine in ((H1, o.H1), (H2, o.H2)):
                close(mine.short, memory.short.reshape(2, *masks.shape_of_s))
                assert (mine.count, mine.updates) == (len(memory.now), len(memory.cycles))
                if memory.cycles:
                    close(mine.long, memory.long.reshape(2, *masks.shape_of_s))
        o.update()
        H1.fold()
        H2.fold()


def test_two_update_cycles_by_hand():
    """One feature, two samples a call, sigma = mean|x| (Setting C, p = 1, eps = 0): every number is worked out here."""
    coefficients = {"alpha": (0.5, 0.5), "beta": (0.5, 0.25, 0.25), "kappa": (0.75, 0.25, 0.5, 0.5)}
    o = Oracle(**ref("BA1"), p=1, center="zero", eps=0.0, **coefficients)

    def check(x, y, dy, dx, short1, short2, s_hat):
        close(o.forward(column(x)), column(y))
        close(o.backward(column(dy)), column(dx))
        close(o.H1.short, column(short1))
        close(o.H2.short, column(short2))
        close(o.estimate, column(s_hat))

    # s = (2, 2) is all there is: s_hat = s. g = (-1/2, -1 (-1/2) / 2) = (-1/2, 1/4) = g_hat.
    # dx = dy/2 + (g_mu + g_sigma)/2 = (1/2 - 1/8, -1/8).
    check((1, 3), (-0.5, 0.5), (1, 0), (0.375, -0.125), (2, 2), (-0.5, 0.25), (2, 2))
    # s = (4, 4), short = (3, 3), no long yet: s_hat = (3, 3). g = (-1, -3 * 1 / 3) = (-1, -1), short = (-3/4, -3/8),
    # g_hat = (1/2 + 1/4) short + 1/4 g = (-13/16, -17/32). dx = (0, 1) + (-13/16 - 17/32)/2.
    check((2, 6), (-1 / 3, 1), (0, 3), (-43 / 64, 21 / 64), (3, 3), (-0.75, -0.375), (3, 3))
    assert (o.H1.count, o.H1.updates, o.H2.count, o.H2.updates) == (2, 0, 2, 0)
    o.update()
    assert (o.H1.count, o.H1.updates, o.H2.count, o.H2.updates) == (0, 1, 0, 1)
    close(o.H1.long, column((3, 3)))
    close(o.H2.long, column((-0.75, -0.375)))
    close(o.H1.short, column((0, 0)))
    # s = (1, 3): s_hat = (3, 3)/2 + (1, 3)/2 = (2, 3). g = (-2, -(3 (-4/3) + 3 (2/3)) / 3) = (-2, 2/3),
    # g_hat = (-3/4, -3/8)/2 + (-2, 2/3)/2 = (-11/8, 7/48). dx = 1 + (-11/8 -+ 7/48)/2, the sign being that of x.
    check((-2, 4), (-4 / 3, 2 / 3), (3, 3), (23 / 96, 37 / 96), (1, 3), (-2, 2 / 3), (2, 3))
    o.update()
    close(o.H1.long, column((0.75 * 3 + 0.25 * 1, 3)))
    close(o.H2.long, column((-11 / 8, 7 / 48)))
    assert (o.H1.count, o.H1.updates, o.H2.count, o.H2.updates) == (0, 2, 0, 2)
    close(o.evaluate(column((2, 5))), column((0, 1)))


def column(numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


# Windows.


@pytest.mark.parametrize("policy", ["exact", "streaming"])
@pytest.mark.parametrize(
    ("local", "other", "window"),
    [
        *(("SP3", "SP5", 1), ("BA3", "BA5", 1), ("BA4", "BA6", 1)),
        *(("SP3", "SP2", 9), ("SP4", "SP1", 9), ("BA3", "BA2", 9), ("BA4", "BA1", 9)),
    ],
)
def test_windows_collapse(local, other, window, policy):
    if policy == "exact":
        policy = "sample" if local.startswith("SP") else "batch"
    a, b = (Oracle(**ref(name), window=window, p=3, policy=policy, beta=(0.0, 0.0, 1.0)) for name in (local, other))
    x, dy = rand(2, 2, 3, 5), rand(2, 2, 3, 5, seed=1)
    close(a.forward(x), b.forward(x))
    if policy == "streaming" and window > 1:
        # The local references hold a copy of the statistic at every place; the gradients of the copies add up, and
        # a g_hat that is linear in g (as here) comes out the same.
        spread = a.estimate.reshape(2, a.estimate.shape[1], -1)
        close(spread, b.estimate[:, :, None].expand_as(spread))
    close(a.backward(dy), b.backward(dy))


def test_windows_at_the_border():
    """Three places, window 3: the ends average two places, the middle all three."""
    o = Oracle(**ref("BA4"), window=3, p=1, eps=0.0, policy="batch")
    o.forward(torch.tensor([[[1.0, 2.0, 6.0]]]))
    close(o.estimate[0, 0], torch.tensor([1.5, 3.0, 4.0], dtype=torch.float64))
    close(o.estimate[1, 0], torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("same", [("SP2", "SP3", "SP5"), ("BA1", "BA4", "BA6"), ("BA2", "BA3", "BA5")])
def test_references_collapse_without_place(same):
    x, dy = rand(4, 3), rand(4, 3, seed=1)
    oracles = [Oracle(**ref(name), p=1.5, center="estimate") for name in same]
    for results in (*zip(*([o.forward(x), o.backward(dy), o.H1.short, o.H2.short] for o in oracles), strict=True),):
        for other in results[1:]:
            close(other, results[0])


# The rest of the interface.


def test_running_estimate_of_batch_policy():
    o = Oracle(**ref("BA1"), policy="batch", rate=0.25)
    s = []
    for seed in (1, 2, 3):
        x = rand(4, 2, seed=seed)
        o.forward(x)
        s.append(torch.stack((x.mean(0), (x.var(0, correction=0) + EPS).sqrt())))
        o.update()
    close(o.H1.long, 0.75 * (0.75 * s[0] + 0.25 * s[1]) + 0.25 * s[2])
    close(o.estimate, o.H1.long)
    close(o.evaluate(x), (x - o.H1.long[0]) / o.H1.long[1])
    assert (o.H1.count, o.H1.updates, o.H2.updates) == (0, 3, 0)


def test_mean_goes_to_the_stream_before_sigma():
    """Setting B: the second call's sigma is taken about mu_hat = (1 + 5) / 2 = 3, not about 1 nor about 5."""
    o = Oracle(**ref("BA1"), center="estimate", eps=0.0, alpha=(0.0, 1.0), p=1)
    o.forward(column((0, 2)))
    close(o.estimate, column((1, 1)))
    o.forward(column((4, 6)))
    close(o.estimate, column((3, (1 + 2) / 2)))


def test_samples_share_the_average_of_their_statistics():
    """SP2 streamed: the samples' means are 1 and 5, their sigmas about mu_hat = 3 are 2 and 3, so s_hat = (3, 2.5)."""
    o = Oracle(**ref("SP2"), center="estimate", eps=0.0, p=1)
    y = o.forward(torch.tensor([[0.0, 2.0], [2.0, 8.0]]))
    close(o.estimate, column((3, 2.5)))
    close(y, torch.tensor([[-1.2, -0.4], [-0.4, 2.0]], dtype=torch.float64))
    assert o.H1.count == 1


def test_beta_does_not_change_what_H2_holds():
    x, dy = rand(4, 3), rand(4, 3, seed=1)
    a, b = Oracle(beta=(0.0, 0.0, 0.0)), Oracle(beta=(0.5, 0.2, 0.3))
    for o in (a, b):
        o.forward(x)
        dx = o.backward(dy)
        o.update()
    close(a.H2.long, b.H2.long)
    assert a.H2.long.abs().min() > 0
    a.forward(x)
    close(a.backward(dy), dy / a.estimate[1])
    assert not torch.allclose(dx, dy / b.estimate[1])


def test_backward_goes_last_in_first_out_with_the_estimates_of_its_call():
    xs, dys = [rand(3, 2, seed=s) for s in (1, 2)], [rand(3, 2, seed=s) for s in (3, 4)]
    o = Oracle(beta=(0.0, 0.0, 0.0))
    sigmas = []
    for x in xs:
        o.forward(x)
        sigmas.append(o.estimate[1])
    for dy, sigma in zip(reversed(dys), reversed(sigmas), strict=True):
        close(o.backward(dy), dy / sigma)
    with pytest.raises(ValueError, match="no forward call waits"):
        o.backward(dys[0])


def test_evaluation_changes_nothing():
    o = Oracle(**ref("BA4"), window=3)
    with pytest.raises(RuntimeError, match="no estimate"):
        o.evaluate(rand(*SHAPE))
    o.forward(rand(*SHAPE))
    o.backward(rand(*SHAPE))
    before = (o.H1, o.H2, o.estimate, o.skipped)
    x = rand(*SHAPE, seed=2)
    y = o.evaluate(x)
    close(o.evaluate(x[1:2]), y[1:2])
    assert all(a is b for a, b in zip(before, (o.H1, o.H2, o.estimate, o.skipped), strict=True))
    o.update()
    close(o.evaluate(x), y)


def test_kappa_is_alpha_unless_given():
    o = Oracle(alpha=(0.6, 0.3))
    shorts = []
    for seed in (1, 2):
        o.forward(rand(3, 2, seed=seed))
        o.backward(rand(3, 2, seed=seed + 2))
        shorts.append((o.H1.short, o.H2.short))
        o.update()
    close(o.H1.long, 0.6 * shorts[0][0] + 0.3 * shorts[1][0])
    close(o.H2.long, 0.6 * shorts[0][1] + 0.3 * shorts[1][1])


def test_an_update_without_arrivals_does_nothing():
    o = Oracle()
    o.update()
    o.forward(rand(3, 2))
    o.update()
    before = o.H1
    o.update()
    assert o.H1 is before
    assert (o.H2.updates, o.H2.count) == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("center", CENTERS)
def test_what_is_not_finite_is_not_remembered(bad, center):
    o = Oracle(center=center)
    x, dy = rand(3, 2), rand(3, 2, seed=1)
    poison = x.clone()
    poison[0, 0] = bad
    o.forward(poison)
    o.backward(dy)
    assert (o.skipped, o.H1.count, o.H2.count, o.estimate) == (1, 0, 0, None)
    o.forward(x)
    o.backward(dy)
    kept = (o.H1, o.H2, o.estimate)
    y = o.forward(poison)
    o.backward(dy)
    close(y[:, 1], ((x - o.estimate[0]) / o.estimate[1])[:, 1])
    assert o.skipped == 2
    o.forward(x)
    o.backward(dy * bad)
    assert o.skipped == 2
    assert o.H2 is kept[1]
    assert o.H1.count == 2
    o.update()
    o.forward(poison)
    close(o.evaluate(x), (x - o.estimate[0]) / o.estimate[1])
    assert o.H1.long.isfinite().all()
    assert o.H2.long.isfinite().all()


def test_a_skipped_call_uses_what_is_known():
    """Right after a fold short is empty: s_hat is long, not a part of it."""
    o = Oracle(alpha=(0.7, 0.3))
    x = rand(4, 2)
    y = o.forward(x)
    o.update()
    poison = x.clone()
    poison[0, 0] = math.nan
    close(o.forward(poison)[:, 1], y[:, 1])


def test_a_sum_out_of_range_is_not_remembered_either():
    """Here every activation, sigma and g is finite and only the mean is not: H2 must skip what H1 skipped."""
    o = Oracle(center="zero")
    o.forward(rand(3, 1))
    o.backward(rand(3, 1))
    o.forward(torch.full((3, 1), 1e308, dtype=torch.float64))
    dx = o.backward(torch.full((3, 1), 1e-300, dtype=torch.float64))
    assert dx.isfinite().all()
    assert (o.skipped, o.H1.count, o.H2.count) == (1, 1, 1)


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_the_slope_at_the_center_is_zero(p):
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-3.0, 4.0]], dtype=torch.float64)
    dy = rand(3, 2)
    masks = Masks(*REFS["BA1"], shape=(3, 2), window=1)
    y, dx = grad_of(lambda x: masks.N(x, masks.S(x, p, "zero")), x, dy)
    o = Oracle(p=p, center="zero", policy="batch")
    close(o.forward(x), y)
    close(o.backward(dy), dx)


def test_constants():
    """Without any spread sigma is the floor sqrt(eps), and it has no gradient."""
    for p, center in itertools.product((1, 1.5, 2, 7), CENTERS):
        o = Oracle(p=p, center=center, beta=(0.0, 0.0, 1.0))
        o.forward(torch.zeros(3, 2))
        close(o.estimate[1], torch.full((2,), EPS**0.5, dtype=torch.float64))
        dy = rand(3, 2)
        close(o.backward(dy) * EPS**0.5, dy - dy.mean(0))


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_high_powers_neither_overflow_nor_vanish(scale):
    small, large = (Oracle(p=7, eps=0.0, policy="batch") for _ in range(2))
    x, dy = rand(4, 2), rand(4, 2, seed=1)
    close(large.forward(x * scale), small.forward(x))
    close(large.backward(dy) * scale, small.backward(dy))


@pytest.mark.parametrize(
    "choice",
    [
        {"place": "somewhere"},
        {"samples": "two"},
        {"window": 4},
        {"center": "median"},
        {"p": 0.5},
        {"policy": "both"},
        {"policy": "sample", "center": "estimate"},
        {"policy": "batch", "samples": "one"},
    ],
)
def test_refuses(choice):
    with pytest.raises(ValueError, match=r"no reference|no statistics|does not go with|policy is"):
        Oracle(**choice)


def test_refuses_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="do not divide"):
        Oracle(features=3).forward(rand(2, 4))
    o = Oracle(**ref("BA6"))
    o.forward(rand(2, 3, 4))
    with pytest.raises(ValueError, match="does not fit"):
        o.forward(rand(2, 3, 1))


def test_imports_nothing_of_ours():
    source = Path(__file__).parents[1] / "streamnorm" / "oracle.py"
    imported = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert imported <= {"__future__", "math", "collections.abc", "dataclasses", "itertools", "typing", "torch"}
