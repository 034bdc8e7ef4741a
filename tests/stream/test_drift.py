"""What a memory says of a mean does not drift, however large the mean and however long the memory."""

from __future__ import annotations

import pytest
import torch
from close import assert_close

import streamnorm as sn
from streamnorm.ops import backends
from streamnorm.stream.controlled import Lagging

LONG_MEMORIES = {
    "evidence": sn.Evidence(1000.0),
    "batch": sn.Batch(0.001),
    "paper": sn.Streaming((0.7, 0.3), (0.7, 0.3, 0.0), (0.999, 0.001, 0.999, 0.001)),
    "a mix that leans": sn.Streaming((0.1, 0.9), (0.7, 0.3, 0.0), (0.37, 0.63, 0.999, 0.001)),
}


def estimates(policy: sn.Policy, x: torch.Tensor, backend: str) -> torch.Tensor:
    """The latest estimates of a layer after one update a row."""
    norm = sn.Norm(x.shape[1], sn.BA1, sn.Lp(2, "estimate"), policy, dtype=x.dtype)
    with torch.no_grad(), backends.using(backend):
        for row in x.split(1):
            norm(row)
            norm.fold()
    return norm.H1.estimate


@pytest.mark.parametrize("backend", ["cpu", "generic"])
@pytest.mark.parametrize("name", LONG_MEMORIES)
def test_of_equal_rows_the_mean_is_the_row_to_the_bit(name: str, backend: str) -> None:
    """Shares that add up to 1 + e would move it by e a row: by 2 % of a sigma after 1,000 rows at 1,000 sigmas."""
    row = torch.rand(24, generator=torch.Generator().manual_seed(0)) * 300 + 700
    mean = estimates(LONG_MEMORIES[name], row.expand(300, 24), backend)[0]
    assert torch.equal(mean, row)


@pytest.mark.parametrize("rule", [sn.Exponential(0.001), Lagging(0.999)], ids=repr)
def test_many_equal_arrivals_at_once(rule: sn.Rule) -> None:
    s = torch.tensor([[873.1, 411.7], [3.0, 5.0]])
    many, ok = s.expand(200, 2, 2), torch.arange(200) % 3 > 0
    state = {**rule.empty((2, 2))}
    if "moments" in state:
        state["moments"] = torch.stack([s[0], s[1].square()])
    for _ in range(5):
        state, found = rule.observe(state, many, ok)
    assert torch.equal(found[-1, 0], s[0])
    assert_close("sigma", found[-1, 1], s[1])


@pytest.mark.parametrize("backend", ["cpu", "generic"])
def test_far_from_zero_statistics_follow_those_of_float64(backend: str) -> None:
    """A float32 at 1,000 sigmas is rounded by 3e-5 at most: at random, and so the mean over 100 rows by 2e-4 in 400
    features, where rounding to one side would sum up to 3e-3."""
    x = torch.randn(1500 if backend == "cpu" else 400, 400, generator=torch.Generator().manual_seed(1)) + 1000
    found, want = estimates(sn.Evidence(), x, backend).double(), estimates(sn.Evidence(), x.double(), "cpu")
    assert (found[0] - want[0]).abs().max() < 1e-3
    assert (found[0] - want[0]).mean().abs() < 3e-5
    assert (found[1] / want[1] - 1).abs().max() < 1e-4
