"""Online Normalization and Batch Renormalization against their definitions, in loops and by plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import draw
from close import assert_close
from torch import Tensor

import streamnorm as sn
from streamnorm.stream import CHUNK, Controlled, Lagging, Renorm, RenormGradient
from streamnorm.stream.policy import BatchRenormalization, OnlineNormalization

TINY = 1e-30
"""eps is no part of the definition of Online Normalization here; it only keeps sigma above 0."""


def call(norm: sn.Norm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


class Chiley:
    """Online Normalization of one feature map, sample by sample, in floats (the paper's equations 8 to 11)."""

    def __init__(self, forward: float, backward: float, eps: float = 0.0) -> None:
        self.forward_decay, self.rate, self.eps = forward, 1 - backward, eps
        self.mu, self.var, self.e_1, self.e_y = 0.0, 1.0, 0.0, 0.0

    def forward(self, x: list[float]) -> tuple[list[float], float]:
        a, deviation = self.forward_decay, (self.var + self.eps) ** 0.5
        y = [(value - self.mu) / deviation for value in x]
        mean = sum(x) / len(x)
        var = sum((value - mean) ** 2 for value in x) / len(x)
        self.var = a * self.var + (1 - a) * var + a * (1 - a) * (mean - self.mu) ** 2
        self.mu = a * self.mu + (1 - a) * mean
        return y, deviation

    def backward(self, dy: list[float], y: list[float], deviation: float) -> list[float]:
        inner = [d - self.rate * self.e_y * value for d, value in zip(dy, y, strict=True)]
        self.e_y += sum(d * value for d, value in zip(inner, y, strict=True)) / len(y)
        dx = [d / deviation - self.rate * self.e_1 for d in inner]
        self.e_1 += sum(dx) / len(dx)
        return dx


def chiley(maps: list[Chiley], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """A mini-batch ``(n, c, *place)`` by the definition."""
    y, dx = torch.empty_like(x), torch.empty_like(x)
    for j, one in enumerate(maps):
        went = [one.forward(sample[j].flatten().tolist()) for sample in x]
        for i, (values, deviation) in enumerate(went):
            y[i, j] = torch.tensor(values, dtype=x.dtype).reshape(x[i, j].shape)
            back = one.backward(dy[i, j].flatten().tolist(), values, deviation)
            dx[i, j] = torch.tensor(back, dtype=x.dtype).reshape(x[i, j].shape)
    return y, dx


@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (3, 3, 2, 4)], ids=str)
def test_online_normalization_is_its_definition(shape: tuple[int, ...]) -> None:
    norm = sn.OnlineNorm(3, sn.BA1, 0.95, 0.9, bound="none", eps=TINY, affine=False).double()
    maps = [Chiley(0.95, 0.9) for _ in range(3)]
    for step in range(6):
        x, dy = draw(shape, step), draw(shape, 10 + step)
        for name, got, want in zip(("y", "dx"), call(norm, x, dy), chiley(maps, x, dy), strict=True):
            assert_close(f"{name} {step}", got, want, 64)
        norm.fold()
        wanted = torch.tensor([[one.mu for one in maps], [one.var for one in maps]], dtype=torch.float64)
        assert_close("moments", norm.H1.moments, wanted, 64)
        places = x[0, 0].numel()
        wanted = torch.tensor([[one.e_1 for one in maps], [one.e_y for one in maps]], dtype=torch.float64)
        assert_close("errors", norm.H2.errors / places, wanted, 64)
    x = draw(shape, 20)
    mu, var = norm.H1.moments.reshape(2, 1, 3, *[1] * (x.ndim - 2))
    assert_close("testing", norm.eval()(x), (x - mu) / var.sqrt(), 64)


def test_eps_in_the_variance_is_hardly_felt() -> None:
    norm = sn.OnlineNorm(3, bound="none", affine=False).double()
    maps = [Chiley(0.999, 0.99, 1e-5) for _ in range(3)]
    for step in range(20):
        x, dy = draw((4, 3), step), draw((4, 3), 30 + step)
        for got, want in zip(call(norm, x, dy), chiley(maps, x, dy), strict=True):
            # A variance that begins with eps more in it, 1e-5 of it at most.
            assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("g", [1, 5, CHUNK + 3])
@pytest.mark.parametrize("masked", [False, True])
def test_arrivals_at_once_equal_arrivals_one_by_one(g: int, masked: bool) -> None:
    s, s_hat, dy = (draw((g, 2, 3), seed) for seed in range(3))
    s[:, 1], s_hat[:, 1] = s[:, 1].abs() + 20, s_hat[:, 1].abs() + 10  # no mean is farther off than its sigma
    ok = torch.rand(g, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    let_in = slice(None) if ok is None else ok
    F, G = Lagging(0.9), Controlled(0.9)
    start = {name: value.double() for name, value in F.empty((2, 3)).items()}
    once, each = F.observe(start, s, ok), sn.Rule.observe(F, start, s, ok)
    assert_close("F", once[1][let_in], each[1][let_in], g)
    assert_close("moments", once[0]["moments"], each[0]["moments"], g)
    start = {name: value.double() for name, value in G.empty((2, 3)).items()}
    once = G.observe(start, dy, s, s_hat, ok)
    each = sn.GradientRule.observe(G, start, dy, s, s_hat, ok)
    assert_close("G", once[1][let_in], each[1][let_in], g)
    assert_close("errors", once[0]["errors"], each[0]["errors"], g)


def test_a_mini_batch_is_one_arrival_of_the_policy() -> None:
    """``Norm`` with the policy normalizes a mini-batch with what was known before; one sample it does as the layer."""
    layer = sn.OnlineNorm(3, bound="none", affine=False).double()
    norm = sn.Norm(3, sn.BA1, sn.Lp(2, "estimate"), OnlineNormalization()).double()
    for step in range(3):
        x, dy = draw((1, 3, 4), step), draw((1, 3, 4), 10 + step)
        for got, want in zip(call(norm, x, dy), call(layer, x, dy), strict=True):
            assert torch.equal(got, want)
    x = draw((5, 3, 4), 9)
    mu, var = norm.H1.moments.clone()
    assert_close("y", norm(x).detach(), (x - mu[:, None]) / var.sqrt()[:, None], 64)


def test_outputs_are_bounded_in_training_and_testing() -> None:
    x = draw((6, 3, 4), 0) * 100
    clamped, scaled, plain = (sn.OnlineNorm(3, bound=bound).double() for bound in ("clamp", "scale", "none"))
    for _ in range(2):
        y = plain(x).detach()
        assert torch.equal(clamped(x).detach(), y.clamp(-5, 5))
        root = y.square().mean((1, 2), keepdim=True).add(1e-5).sqrt()
        assert_close("scaled", scaled(x).detach(), y / root, 64)
        for norm in (clamped, scaled, plain):
            norm.eval()


# Batch Renormalization


def ioffe(x: Tensor, running: tuple[Tensor, Tensor], r_max: float, d_max: float, eps: float = 1e-5) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    mu = x.mean(dims, keepdim=True)
    sigma = (x.var(dims, correction=0, keepdim=True) + eps).sqrt()
    shape = mu.shape
    r = (sigma.detach() / running[1].reshape(shape)).clamp(1 / r_max, r_max)
    d = ((mu.detach() - running[0].reshape(shape)) / running[1].reshape(shape)).clamp(-d_max, d_max)
    return (x - mu) / sigma * r + d


@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 5), (3, 3, 2, 4)], ids=str)
def test_batch_renormalization_is_its_definition(shape: tuple[int, ...]) -> None:
    schedule: dict[str, Any] = {"rate": 0.2, "r_max": 1.5, "d_max": 0.4, "begin": 1, "r_end": 5, "d_end": 3}
    norm = sn.BatchRenorm(3, **schedule, affine=False).double()
    running: list[Tensor] = []
    for step in range(8):
        x, dy = draw(shape, step).requires_grad_(), draw(shape, 10 + step)
        mu = x.detach().mean([0, *range(2, x.ndim)])
        sigma = (x.detach().var([0, *range(2, x.ndim)], correction=0) + 1e-5).sqrt()
        running = running or [mu, sigma]
        r_max, d_max = 1 + 0.5 * min(max((step - 1) / 4, 0), 1), 0.4 * min(max((step - 1) / 2, 0), 1)
        want = ioffe(x, (running[0], running[1]), r_max, d_max)
        (want_dx,) = torch.autograd.grad(want, x, dy)
        y, dx = call(norm, x.detach(), dy)
        assert (y - want).abs().max() <= 1e-10
        assert (dx - want_dx).abs().max() <= 1e-10
        running = [old + 0.2 * (new - old) for old, new in zip(running, (mu, sigma), strict=True)]
        assert_close("running", norm.H1.long, torch.stack(running), 64)
        norm.fold()
        norm.fold()  # without an arrival no update
        assert norm.H1.updates == step + 1
    x = draw(shape, 20)
    mean, deviation = (one.reshape(1, 3, *[1] * (x.ndim - 2)) for one in running)
    assert_close("testing", norm.eval()(x), (x - mean) / deviation, 64)


def test_before_it_begins_it_is_batch_normalization() -> None:
    ours, theirs = sn.BatchRenorm(3).double(), sn.BatchNorm(3).double()
    for step in range(3):
        x, dy = draw((5, 3, 2), step), draw((5, 3, 2), 10 + step)
        for got, want in zip(call(ours, x, dy), call(theirs, x, dy), strict=True):
            assert_close("begin", got, want, 64)
        ours.fold()


def test_one_sample_a_call_has_no_gradient_and_is_refused() -> None:
    x = draw((1, 3), 0).requires_grad_()
    y = ioffe(x, (torch.zeros(3).double(), torch.ones(3).double()), 3.0, 5.0)
    assert torch.equal(y.detach(), x.detach().clamp(-5, 5))
    (dx,) = torch.autograd.grad(y.sum() + (y**2).sum(), x)
    assert not dx.any()
    with pytest.raises(sn.DegenerateReferenceError, match="a single value"):
        sn.BatchRenorm(3)(torch.randn(1, 3))


def test_setting_b_is_refused() -> None:
    with pytest.raises(ValueError, match="Setting A"):
        sn.Norm(3, sn.BA1, sn.Lp(2, "estimate"), BatchRenormalization())(torch.randn(4, 3))


# Both


LAYERS = {
    "online": lambda: sn.OnlineNorm(3, alpha_forward=0.9, alpha_backward=0.8).double(),
    "renorm": lambda: sn.BatchRenorm(3, begin=0, r_end=2, d_end=2).double(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_cycle_in_one_call_equals_the_loop(name: str) -> None:
    n, m, (at_once, loop) = 4, 3, (LAYERS[name]() for _ in range(2))
    for cycle in range(3):
        x, dy = draw((n * m, 3, 2), cycle), draw((n * m, 3, 2), 10 + cycle)
        with sn.vectorized(at_once, n):
            got = call(at_once, x, dy)
        parts = [call(loop, a, b) for a, b in zip(x.split(m), dy.split(m), strict=True)]
        for a, b in zip(got, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert_close("cycle", a, b, 64)
        for norm in (at_once, loop):
            norm.fold()
        for key, value in at_once.state_dict().items():
            assert key.endswith("seen") or torch.allclose(value, loop.state_dict()[key], rtol=1e-12, atol=1e-12), key


@pytest.mark.parametrize("name", LAYERS)
def test_round_trips_and_what_is_not_finite(name: str) -> None:
    norm, loaded = LAYERS[name](), LAYERS[name]()
    for step in range(3):
        call(norm, draw((4, 3, 2), step), draw((4, 3, 2), 10 + step))
        norm.fold()
    before = copy.deepcopy(norm.state_dict())
    norm(torch.full((4, 3, 2), float("nan"), dtype=torch.float64))
    assert norm.H1.skipped > 0
    for key, value in norm.state_dict().items():
        was = before[key]
        assert torch.equal(value[:-1], was[:-1]) if "skipped" in key else torch.equal(value, was), key
    loaded.load_state_dict(norm.state_dict())
    twin = copy.deepcopy(norm)
    x, dy = draw((4, 3, 2), 5), draw((4, 3, 2), 6)
    want = call(norm, x, dy)
    for other in (loaded, twin):
        assert all(map(torch.equal, call(other, x, dy), want))
    names = {key: getattr(sn, key) for key in dir(sn)}
    assert repr(eval(repr(norm), names)) == repr(norm)


def test_replicas_merge() -> None:
    left, right = Renorm().empty((2, 1)), Renorm().empty((2, 1))
    one, three = torch.tensor([[1.0], [1.0]]), torch.tensor([[5.0], [3.0]])
    left, _ = Renorm(1.0).step(left, one)
    for _ in range(3):
        right, _ = Renorm(1.0).step(right, three)
    assert torch.equal(Renorm().merge([left, right])["long"], (one + 3 * three) / 4)
    assert RenormGradient().merge([{}, {}]) == {}
    for rule in (Lagging(), Controlled()):
        state = rule.empty((2, 1))
        assert all(torch.equal(rule.merge([state, state])[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.OnlineNorm(3, alpha_forward=1.0), "alpha is a decay"),
        (lambda: sn.OnlineNorm(3, bound="tanh"), "bound is one of"),  # type: ignore[arg-type]
        (lambda: sn.OnlineNorm(3, limit=0.0), "limit is a finite number > 0"),
        (lambda: sn.BatchRenorm(3, rate=2.0), "rate is at most 1"),
        (lambda: sn.BatchRenorm(3, r_max=0.5), "r_max at least 1"),
        (lambda: sn.BatchRenorm(3, begin=-1), "begin is a whole number"),
        (lambda: sn.BatchRenorm(3, d_max=-1.0), "d_max is a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
