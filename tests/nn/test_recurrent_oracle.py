"""Recurrent layers against loops in float64 with one oracle for each Norm of the equations: outputs, every gradient and
all state, over update cycles of mini-batches of different lengths."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import MIXED, SHORT
from close import assert_close
from recurrent_histories import Through
from states import compare_state
from torch import Tensor

import streamnorm as sn
from streamnorm.nn.timespecific import TimeSpecificNorm
from streamnorm.ops.backends import BACKENDS, using
from streamnorm.oracle import Oracle

CYCLES = ((3, 5), (4,), (2, 6, 3))
"""Lengths of the mini-batches in each update cycle."""
TERMS = 64 * 64
"""Sums of up to 64 values; a time step, a sigma below 1 and a gain each enlarge what was rounded before."""
POLICIES: dict[str, dict[str, Any]] = {
    "Sample": {"features": "all", "samples": "one", "policy": "sample", "center": "batch"},
    "Batch": {"policy": "batch", "center": "batch"},
    "TimeSpecific-Batch": {"policy": "batch", "center": "batch"},
    "Streaming": {"center": "estimate", "alpha": MIXED.alpha, "beta": MIXED.beta, "kappa": MIXED.kappa},
    "Evidence": {"center": "estimate", "policy": "evidence", "memory": SHORT.memory},
}
STREAMS = ("Streaming", "Evidence")


class Latest(Oracle):
    """The caveat of section 4.3: N goes back with the estimate of now."""

    def backward(self, dy: Tensor) -> Tensor:
        call = self._calls[-1]
        self._calls[-1] = replace(call, blocks=[replace(block, used=self.estimate) for block in call.blocks])
        return super().backward(dy)


class Loop:
    """Equation 3, or 4 to 7, written out, with parameters copied from a layer."""

    def __init__(self, net: Any, kind: str, p: float, latest: bool) -> None:
        self.net, self.kind, self.p = net, kind, p
        self.make = Latest if latest else Oracle
        self.parameters = {name: q.detach().clone().requires_grad_() for name, q in net.cells["l0"].named_parameters()}
        self.oracles: dict[tuple[str, str, int], Oracle] = {}

    def norm(self, path: str, gate: str, a: Tensor, t: int) -> Tensor:
        key = path, gate, t if self.kind.startswith("TimeSpecific") else 0
        if key not in self.oracles:
            self.oracles[key] = self.make(p=self.p, **POLICIES[self.kind])
        gain, bias = (self.parameters[f"norm_{path}.{gate}.affine.{name}"] for name in ("weight", "bias"))
        if self.kind == "Evidence":
            gain, bias = (
                trust * q + (1 - trust) * q.detach() for q, trust in ((q, SHORT.trust(len(a))) for q in (gain, bias))
            )
        return Through.apply(a, self.oracles[key]) * gain + bias

    def evaluated(self, path: str, gate: str, a: Tensor, t: int) -> Tensor:
        trained = max(key[2] for key in self.oracles)
        gain, bias = (self.parameters[f"norm_{path}.{gate}.affine.{name}"] for name in ("weight", "bias"))
        return self.oracles[path, gate, min(t, trained)].evaluate(a) * gain + bias

    def run(self, x: Tensor, h: Tensor, norm: Any) -> Tensor:
        gates, f = self.net.cells["l0"].gates, getattr(torch, self.net.nonlinearity)
        W_x = dict(zip(gates, self.parameters["weight_ih"].split(h.shape[1]), strict=True))
        W_h = dict(zip(gates, self.parameters["weight_hh"].split(h.shape[1]), strict=True))
        outputs = []
        for t, x_t in enumerate(x):

            def both(gate: str, h: Tensor, x_t: Tensor = x_t, t: int = t) -> Tensor:
                return norm("ih", gate, x_t @ W_x[gate].T, t) + norm("hh", gate, h @ W_h[gate].T, t)

            if gates == ("h",):
                h = f(both("h", h))
            else:
                g_r, g_z = torch.sigmoid(both("r", h)), torch.sigmoid(both("z", h))
                h_new = f(both("h", h * g_r))
                h = g_z * h_new + (1 - g_z) * h
            outputs.append(h)
        return torch.stack(outputs)

    def compare(self, net: Any, name: str) -> None:
        for (path, gate, t), oracle in self.oracles.items():
            norm = getattr(net.cells["l0"], f"norm_{path}")[gate]
            norm = norm.times[t] if isinstance(norm, TimeSpecificNorm) else norm
            compare_state(f"{name} {self.kind} {path} {gate} {t}", norm, oracle)


def factory(kind: str, p: float) -> Any:
    return {
        "Sample": lambda c: sn.SampleNorm(c, p=p),
        "Batch": lambda c: sn.BatchNorm(c, p=p),
        "TimeSpecific-Batch": sn.TimeSpecific(lambda c: sn.BatchNorm(c, p=p)),
        "Streaming": lambda c: sn.StreamingNorm(c, p=p, alpha=MIXED.alpha, beta=MIXED.beta, kappa=MIXED.kappa),
        "Evidence": lambda c: sn.StreamingNorm(c, p=p, memory=SHORT.memory),
    }[kind]


def follow(nets: dict[str, Any], loop: Loop) -> None:
    """Networks, by the backend that they run on, beside one loop."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    for cycle, lengths in enumerate(CYCLES):
        for T in lengths:
            data, start, dy, dh = random(T, 4, 2), random(1, 4, 3), random(T, 4, 3), random(1, 4, 3)
            u, v = data.clone().requires_grad_(), start.clone().requires_grad_()
            z = loop.run(u, v[0], loop.norm)
            ((z * dy).sum() + (z[-1:] * dh).sum()).backward()
            for backend, net in nets.items():
                name = f"{backend}, cycle {cycle}, length {T}:"
                x, h = data.clone().requires_grad_(), start.clone().requires_grad_()
                with using(backend):
                    y, h_n = net(x, h)
                    ((y * dy).sum() + (h_n * dh).sum()).backward()
                assert_close(f"{name} output", y.detach(), z.detach(), TERMS)
                assert_close(f"{name} state", h_n[0].detach(), z[-1].detach(), TERMS)
                assert_close(f"{name} dx", x.grad, u.grad, TERMS)
                assert_close(f"{name} dh", h.grad, v.grad, TERMS)
                for which, q in net.cells["l0"].named_parameters():
                    assert_close(f"{name} {which}", q.grad, loop.parameters[which].grad, TERMS)
                loop.compare(net, name)
        with torch.no_grad():
            for parameters in (loop.parameters, *(dict(net.cells["l0"].named_parameters()) for net in nets.values())):
                for q in parameters.values():
                    q.sub_(q.grad, alpha=0.1)
                    q.grad = None
        for oracle in loop.oracles.values():
            oracle.update()
        for backend, net in nets.items():
            for module in net.modules():
                if isinstance(module, sn.Norm):
                    module.fold()
            loop.compare(net, f"{backend}, fold {cycle}")
    x, h = random(8, 2, 2), random(1, 2, 3)  # longer than any sequence in training
    want = loop.run(x, h[0], loop.evaluated).detach()
    for backend, net in nets.items():
        with using(backend):
            assert_close(f"{backend}, testing", net.eval()(x, h)[0].detach(), want, TERMS)


RNN_AND_GRU = itertools.product((sn.NormRNN, sn.NormGRU), POLICIES, (1, 2))


@pytest.mark.parametrize(
    ("make", "kind", "p", "nonlinearity"),
    [(*case, ("tanh", "relu")[(i // 2 + i) % 2]) for i, case in enumerate(RNN_AND_GRU)],
)
def test_equals_a_loop_with_oracles(make: Any, kind: str, p: int, nonlinearity: str) -> None:
    net = make(2, 3, norm=factory(kind, p), nonlinearity=nonlinearity).double()
    nets = {backend: copy.deepcopy(net) for backend in BACKENDS}
    follow(nets, Loop(net, kind, p, latest=False))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("make", [sn.NormRNN, sn.NormGRU])
def test_going_back_with_the_latest_estimate(make: Any, kind: str, p: int) -> None:
    net = make(2, 3, norm=factory(kind, p), backward_stats="latest").double()
    follow({"cpu": net}, Loop(net, kind, p, latest=True))


@pytest.mark.parametrize("kind", STREAMS)
def test_saved_and_latest_differ_by_little_once_there_is_a_long_memory(kind: str) -> None:
    """The caveat's point: the estimates that a sequence ends with are near those of its steps, and not equal."""
    gradients = []
    for stats in ("saved", "latest"):
        torch.manual_seed(0)
        net = sn.NormRNN(4, 8, norm=factory(kind, 2), backward_stats=stats).double()
        start = torch.randn(1, 16, 8, dtype=torch.float64)
        for _ in range(20):
            net(torch.randn(10, 16, 4, dtype=torch.float64), start)[0].square().sum().backward()
            for norm in net.cells["l0"].norms():
                norm.fold()
        net.zero_grad()
        net(torch.randn(10, 16, 4, dtype=torch.float64), start)[0].square().sum().backward()
        gradients.append(net.cells["l0"].weight_hh.grad)
    saved, latest = gradients
    assert 0 < (saved - latest).norm() < 0.5 * saved.norm()
