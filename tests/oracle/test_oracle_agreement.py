"""Every layer against the oracle: outputs, gradients and all state, over several update cycles."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from close import assert_close
from states import compare_state

from streamnorm.nn.norm import Norm
from streamnorm.ops.backends import BACKENDS, Backend, choose, using

CYCLES = (2, 1, 3)
"""Mini-batches in each update cycle: the first fold, a cycle of one, and an uneven one after it."""


def layers(case: Case) -> dict[str, Norm]:
    """One layer for each backend that serves the case; the first may be compiled in one call, statistics and all."""
    chosen: dict[Backend, str] = {}
    for name in BACKENDS:
        with using(name):
            chosen.setdefault(choose(case.layer().definition, case.input(0)), name)
    return {name: case.layer() for name in chosen.values()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_equals_the_oracle(case: Case) -> None:
    """The oracle's loops run once, and the layers follow them side by side."""
    oracle, step = case.oracle(), 0
    backends = layers(case)
    for batches in CYCLES:
        for _ in range(batches):
            x, dy = case.input(step).requires_grad_(), case.input(100 + step)
            want_y, want_dx = oracle.forward(x.detach()), oracle.backward(dy)
            for backend, layer in backends.items():
                name = f"{case} {backend} step {step}"
                with using(backend):
                    y = layer(x)
                    (dx,) = torch.autograd.grad(y, x, dy)
                assert_close(f"{name} y", y.detach(), want_y, 64)
                assert_close(f"{name} dx", dx, want_dx, 64)
                compare_state(name, layer, oracle)
            step += 1
        oracle.update()
        for backend, layer in backends.items():
            layer.fold()
            compare_state(f"{case} {backend} fold", layer, oracle)
    x = case.input(step)
    want = oracle.evaluate(x)
    for backend, layer in backends.items():
        with using(backend):
            assert_close(f"{case} {backend} test", layer.eval()(x), want, 64)
