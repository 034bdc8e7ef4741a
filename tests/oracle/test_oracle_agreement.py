"""Every layer against the oracle: outputs, gradients and all state, over several update cycles."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from close import assert_close
from states import compare_state

from streamnorm.nn.norm import Norm
from streamnorm.ops.backends import using

CYCLES = (2, 1, 3)
"""Mini-batches in each update cycle: the first fold, a cycle of one, and an uneven one after it."""


def follow(case: Case, layer: Norm) -> None:
    oracle, step = case.oracle(), 0
    for batches in CYCLES:
        for _ in range(batches):
            x = case.input(step).requires_grad_()
            dy = case.input(100 + step)
            y = layer(x)
            name = f"{case} step {step}"
            assert_close(f"{name} y", y.detach(), oracle.forward(x.detach()), 64)
            (dx,) = torch.autograd.grad(y, x, dy)
            assert_close(f"{name} dx", dx, oracle.backward(dy), 64)
            compare_state(name, layer, oracle)
            step += 1
        layer.fold()
        oracle.update()
        compare_state(f"{case} fold", layer, oracle)
    layer.eval()
    x = case.input(step)
    assert_close(f"{case} test", layer(x), oracle.evaluate(x), 64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    follow(case, case.layer())


@pytest.mark.parametrize("backend", ["eager", "generic"])
@pytest.mark.parametrize("case", [c for c in CASES if c.shape == "2d"], ids=str)
def test_slower_backends_equal_the_oracle(case: Case, backend: str) -> None:
    with using(backend):
        follow(case, case.layer())
