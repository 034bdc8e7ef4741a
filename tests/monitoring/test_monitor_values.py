"""What a monitor records is what was there."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import net, sgd, train, watch_one

from streamnorm import StreamingNorm, vectorized
from streamnorm.lab.runs.classifier.models import Convolutional
from streamnorm.monitoring.monitor import monitor
from streamnorm.monitoring.sites import CALLS, SATURATED, _positions, _spread

# --- Pre-activations


def percentile(values: list[float], share: float) -> float:
    """By hand: linear between the two nearest of the ordered values."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def test_the_figures_of_a_small_tensor_are_those_of_all_its_values() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    x[:, 1] = -x[:, 1].abs()
    x[:, 2] = 3 + x[:, 2].abs()
    x[:, 3] = -3 - x[:, 3].abs()
    values = x.flatten().tolist()
    seen = watch_one(nn.Sigmoid(), x[:7], x[7:])
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    expected = {f"p{p}": percentile(values, p / 100) for p in (15, 50, 85)} | {"mean": mean, "std": std}
    expected |= {"dead": 2 / 6, "saturated": 2 / 6, "finite": 1, "calls": 2}
    assert list(seen) == list(expected)
    # Six digits are written, half of the last of which is 5e-6 of a value at most.
    assert seen == pytest.approx(expected, rel=5e-6)


def test_saturated_is_where_a_sigmoid_is_in_its_outer_twentieth() -> None:
    assert torch.sigmoid(torch.tensor(SATURATED)).item() == pytest.approx(0.95)
    near = torch.tensor([0.99, 1.01, -0.99, -1.01]).mul(SATURATED).expand(20, 4)
    assert watch_one(nn.Sigmoid(), near)["saturated"] == 0.5


def test_a_nonlinearity_is_watched_where_it_is_entered_and_another_module_where_it_is_left() -> None:
    x = torch.linspace(-3, 5, 33).reshape(33, 1)
    seen = [watch_one(module, x.clone())["p50"] for module in (nn.ReLU(), nn.ReLU(inplace=True), nn.Hardshrink(2))]
    assert seen == pytest.approx([1, 1, 0])
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(2)
        linear.bias.fill_(1)  # type: ignore[union-attr]
    assert watch_one(linear, x)["p50"] == pytest.approx(3)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.f(input=x)

    model = Named()
    with monitor(model, every=1) as watching:
        model(x)
        watching.step()
    assert watching.records[0]["preactivations"]["f"]["p50"] == pytest.approx(1)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, math.inf, -math.inf, math.nan, 1e300, -1e300], dtype=torch.float64)
    seen = watch_one(nn.Sigmoid(), x.reshape(-1, 1))
    assert seen["finite"] == 5 / 8
    assert seen["p50"] == 2
    assert seen["std"] is None, "its square is beyond float64"
    nothing = watch_one(nn.Sigmoid(), torch.full((20, 2), math.nan))
    assert nothing["finite"] == nothing["dead"] == nothing["saturated"] == 0
    assert nothing["p50"] is nothing["mean"] is nothing["std"] is None
    json.dumps([seen, nothing], allow_nan=False)


def test_a_unit_is_not_called_dead_after_a_few_values() -> None:
    few, enough = -torch.ones(15, 3), -torch.ones(16, 3)
    assert watch_one(nn.ReLU(), few)["dead"] is None
    assert watch_one(nn.ReLU(), enough)["dead"] == 1
    assert watch_one(nn.ReLU(), *few.split(1), -torch.ones(1, 3))["dead"] == 1, "over several calls"


@pytest.mark.parametrize(
    ("shape", "axis"), [((3,), 1), ((), 1), ((40, 3), 1), ((2, 3, 30), 1), ((2, 30, 3), -1), ((2, 3, 5, 4, 2), 1)]
)
def test_units_are_found_in_inputs_of_every_rank(shape: tuple[int, ...], axis: int) -> None:
    features = axis if len(shape) > 2 else -1
    x = torch.ones(shape)
    if shape:
        x.select(features, 1).fill_(-1)
    seen = watch_one(nn.ReLU(), *[x] * CALLS, axis=axis)
    assert seen["dead"] == pytest.approx(1 / 3 if shape else 0, abs=1e-6)
    assert seen["calls"] == CALLS


def test_of_a_large_tensor_a_few_thousand_values_stand_for_all() -> None:
    shape, values = (64, 96, 32, 32), 4096
    index = _positions(shape, 1, values, torch.device("cpu"))
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[index] = True
    assert 0.95 * values < chosen.sum() <= values
    units = chosen.any(0).any(-1).any(-1)
    assert 60 <= units.sum() <= 64
    for d in (0, 2, 3):  # every eighth of each axis has its share: no corner, no row is preferred
        eighths = chosen.sum([e for e in range(4) if e != d]).reshape(8, -1).sum(1) / chosen.sum()
        assert eighths.min() > 1 / 32
        assert eighths.max() < 1 / 4
    x = torch.randn(shape).add_(torch.linspace(-1, 1, 32))
    seen = watch_one(nn.ReLU(), x)
    # A percentile of N values strays by sqrt(p (1 - p) / N) of the distribution, 0.008 at the median; five times that.
    for p in (15, 50, 85):
        assert (x <= seen[f"p{p}"]).double().mean().item() == pytest.approx(p / 100, abs=0.04)


def test_positions_are_spread_without_repetition() -> None:
    for count, total in ((5, 3), (3, 3), (64, 65), (64, 100_000)):
        chosen = _spread(count, total)
        assert chosen.unique().numel() == len(chosen) <= min(count, total)
        assert 0 <= chosen.min() <= chosen.max() < total
        gaps = chosen.diff()
        assert gaps.max() <= 3 * total / min(count, total), "the golden section leaves no larger gap"


def test_a_layer_called_at_many_time_steps_is_seen_at_all_of_them() -> None:
    steps = 1000
    module = nn.Tanh()
    with monitor(nn.Sequential(module), every=1) as watching:
        for t in range(steps):
            module(torch.full((4, 2), float(t)))
            assert len(watching._sites[0].seen) <= CALLS
        watching.step()
    seen = watching.records[0]["preactivations"]["0"]
    assert seen["calls"] == steps
    # Every 64th step is left, so that a percentile is off by 64 steps at most.
    assert [seen[f"p{p}"] for p in (15, 50, 85)] == pytest.approx([150, 500, 850], abs=64)


def test_looped_blocks_are_counted_with_their_loops() -> None:
    model = Convolutional(3, 4, StreamingNorm, 4, loops=(2, 3))
    with monitor(model, every=1) as watching:
        model(torch.randn(2, 3, 8, 8))
        watching.step()
    calls = {name: seen["calls"] for name, seen in watching.records[0]["preactivations"].items()}
    assert calls == {"0.2": 1, "1.branch.1": 2, "1.branch.4": 2, "2.2": 1, "3.branch.1": 3, "3.branch.4": 3, "4.1": 1}


def test_only_passes_of_training_are_recorded() -> None:
    model = net()
    with monitor(model, every=1) as watching:
        model(torch.randn(16, 5))
        model.eval()
        model(torch.full((16, 5), 1e4))
        model.train()
        loss = checkpoint(model, torch.randn(16, 5), use_reentrant=False).sum()
        loss.backward()
        watching.step()
    assert watching.records[0]["preactivations"]["5"]["calls"] == 2


def test_a_vectorized_cycle_is_seen_as_its_mini_batches_are() -> None:
    x = torch.randn(24, 5)
    records = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        model = net().double()
        del model[3]  # dropout, which would draw other masks
        with monitor(model, every=1, watch=nn.Sigmoid) as watching:
            if vectorize:
                with vectorized(model, 12):
                    model(x.double())
            else:
                for batch in x.double().split(2):
                    model(batch)
            watching.step()
        records.append(watching.records[0])
    a, b = (record["preactivations"]["2"] for record in records)
    assert (a.pop("calls"), b.pop("calls")) == (1, 12)
    assert a == pytest.approx(b, rel=1e-5)
    assert records[0]["norms"]["1"]["H1"]["count"] == records[1]["norms"]["1"]["H1"]["count"] == 12 * 2


# --- Normalization layers


@pytest.mark.parametrize(
    ("norm", "tables", "counted"),
    [
        (partial(StreamingNorm, alpha=(0.7, 0.3)), ("long", "short"), {"count": 1, "updates": 1}),
        (StreamingNorm, ("theta",), {"count": 16, "held": 32}),
    ],
    ids=["paper", "evidence"],
)
def test_a_layer_of_ours_is_recorded_with_all_it_remembers(norm: Any, tables: Any, counted: dict[str, int]) -> None:
    model = net(norm)
    optimizer = sgd(model)
    layer = model[1]
    assert isinstance(layer, StreamingNorm)
    with monitor(model, optimizer, every=1) as watching:
        train(model, optimizer, 1)
        x = torch.randn(16, 5)
        x[3] = math.nan
        model(x)
        model(torch.randn(16, 5)).sum().backward()
        H1, H2 = deepcopy(layer.H1), deepcopy(layer.H2)
        optimizer.step()
    first, second = (record["norms"]["1"] for record in watching.records)
    assert list(watching.records[0]["norms"]) == ["1"]
    assert ("long" in first["H1"]) == (norm is StreamingNorm), "there is none before the first update, but a prior"
    for kept, memory, members in ((second["H1"], H1, ("long", "short")), (second["H2"], H2, tables)):
        for table in (*members, "estimate"):
            for row, name in enumerate(("mu", "sigma")):
                values = getattr(memory, table)[row].tolist()
                assert kept[table][name] == pytest.approx([percentile(values, p / 100) for p in (15, 50, 85)], rel=1e-5)
    counters = {name: second["H1"][name] for name in (*counted, "seen", "skipped")}
    assert counters == {**counted, "seen": 3, "skipped": 1}


def test_a_batch_normalization_of_torch_is_recorded_with_what_testing_uses() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5, eps=0.1), nn.InstanceNorm1d(5), nn.ReLU())
    with monitor(model, every=1) as watching:
        model(3 * torch.randn(16, 5, 4))
        watching.step()
    assert list(watching.records[0]["norms"]) == ["0"], "an instance normalization remembers nothing"
    kept = watching.records[0]["norms"]["0"]
    assert kept["batches"] == 1
    sigma = (model[0].running_var + 0.1).sqrt().tolist()  # type: ignore[operator]
    assert kept["running"]["sigma"] == pytest.approx([percentile(sigma, p / 100) for p in (15, 50, 85)], rel=1e-5)
