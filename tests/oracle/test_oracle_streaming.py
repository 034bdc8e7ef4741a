"""The oracle's streams, Algorithms 5 and 6, against autograd with another account of the memories, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from masks import CENTERS, REFS, SHAPE, Masks, close, rand, ref
from torch import Tensor

from streamnorm.oracle import Oracle


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


# --- One rule at a time


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


# --- What is not finite


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
