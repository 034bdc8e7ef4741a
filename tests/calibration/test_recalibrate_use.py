"""Recalibration: running averages and single passes, batches of every kind, replicas, progress, and the gap."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from chains import NORMS, X, assert_same, deep, picture, stored
from close import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from streamnorm import (
    SP1,
    BatchNorm,
    DegenerateReferenceError,
    NormRNN,
    StreamingNorm,
    recalibrate,
)
from streamnorm.calibration import gap

# --- the pass that the text proposes, and the usual one ---


@pytest.mark.parametrize("name", ["BatchNorm", "torch"])
@pytest.mark.parametrize("estimator", ["moving", "corrected"])
def test_moving_averages(name: str, estimator: Any) -> None:
    layer, x = NORMS[name](3), 4 + 2 * torch.randn(50 * 7, 3)
    before = stored(layer)
    assert recalibrate(layer, x.split(7), estimator=estimator) == 1
    mean, std = torch.zeros(3).double(), torch.ones(3).double()
    if estimator == "corrected":
        std = std * 0
    for part in x.double().split(7):
        mean = 0.9 * mean + 0.1 * part.mean(0)
        std = 0.9 * std + 0.1 * (part.var(0, correction=int(name == "torch")) + 1e-5).sqrt()
    if estimator == "corrected":
        mean, std = mean / (1 - 0.9**50), std / (1 - 0.9**50)
    found = stored(layer)[0]
    assert_close("mean", found[0], mean, dtype=torch.float32, terms=4)
    assert_close("sigma", found[1], std, dtype=torch.float32, terms=4)
    assert not before or not before[0].equal(found)


def test_layers_normalize_each_mini_batch_with_its_own_statistics_in_a_single_pass() -> None:
    model, x = deep(nn.BatchNorm1d, depth=2), torch.randn(90, 6)
    recalibrate(model, x.split(30), passes=1)
    other = copy.deepcopy(model)
    other[1].train()
    with torch.no_grad():
        second = torch.cat([other[:4](part) for part in x.split(30)]).double()
    assert_close("mean", model[4].running_mean, second.mean(0), dtype=torch.float32, terms=8)
    assert_close("variance", model[4].running_var, second.var(0), dtype=torch.float32, terms=8)


@pytest.mark.parametrize("name", NORMS)
def test_a_ragged_batch_of_one_is_normalized_with_the_statistics_before_it(name: str) -> None:
    model, x = deep(NORMS[name], depth=2), torch.randn(17, 6)
    recalibrate(model, [x[:16], x[16:]], passes=1)
    first = model[0](x).detach()
    mean, var = first[:16].mean(0), first[:16].var(0, correction=0)
    second = model[3](torch.relu((first - mean) / (var + 1e-5).sqrt() * model[1].weight + model[1].bias)).detach()
    assert_close("mean", stored(model)[1][0], second.double().mean(0), dtype=torch.float32, terms=32)


def test_layers_without_statistics_begin_with_mean_0_and_sigma_1_where_a_batch_has_none() -> None:
    model, x = deep(BatchNorm, depth=2), torch.randn(9, 6)
    recalibrate(model, x.split(1), passes=1)
    second = model[3](torch.relu(model[0](x) * model[1].weight + model[1].bias)).detach()
    assert_close("mean", stored(model)[1][0], second.double().mean(0), dtype=torch.float32, terms=32)


@pytest.mark.parametrize(("batches", "share"), [(22, 0.098), (43, 0.011), (44, None)])
def test_too_few_batches_for_a_moving_average_are_told(batches: int, share: float | None) -> None:
    data = torch.randn(batches * 4, 3).split(4)
    if share is None:
        recalibrate(nn.BatchNorm1d(3), data, estimator="moving")  # a warning would be an error
        return
    with pytest.warns(UserWarning, match=rf"after {batches} mini-batches .* still weigh {share} .*at least 44"):
        recalibrate(nn.BatchNorm1d(3), data, estimator="moving")
    recalibrate(nn.BatchNorm1d(3), data, estimator="corrected")


@pytest.mark.parametrize("name", ["BatchNorm", "torch"])
def test_a_batch_of_one_has_no_sigma_of_its_own(name: str) -> None:
    layer = NORMS[name](3)
    before = picture(layer)
    for estimator in ("moving", "corrected"):
        with pytest.raises(DegenerateReferenceError, match="single activation"):
            recalibrate(layer, torch.randn(50, 3).split(1), estimator=estimator)  # type: ignore[arg-type]
    with pytest.raises(DegenerateReferenceError, match="single activation"):
        recalibrate(layer, [torch.randn(1, 3)])
    assert_same(picture(layer), before)
    assert recalibrate(layer, torch.randn(2, 3).split(1)) == 1


# --- what is given: batches, replicas, progress ---


def test_batches_of_every_kind() -> None:
    wanted = nn.BatchNorm1d(6)
    recalibrate(wanted, X.split(4))
    parts = X.split(4)
    given = [
        [(x, 1) for x in parts],
        [[x, "label"] for x in parts],
        [{"input": x} for x in parts],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X), 5),
        torch.utils.data.DataLoader(Endless(X), 5),
    ]
    for data in given:
        layer = nn.BatchNorm1d(6)
        recalibrate(layer, data)
        assert_close("mean", layer.running_mean, wanted.running_mean)
        assert_close("variance", layer.running_var, wanted.running_var)
    layer = nn.BatchNorm1d(6)
    recalibrate(layer, (part for part in parts), passes=1)
    assert_close("of an iterator", layer.running_var, wanted.running_var)


class Endless(torch.utils.data.IterableDataset):
    """A data set that does not know its length."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


def test_packed_sequences_are_a_batch_and_no_tuple() -> None:
    net, sequences = NormRNN(3, 4, norm=BatchNorm), [torch.randn(n, 3) for n in (5, 3, 3, 2)]
    recalibrate(net, [pack_sequence(sequences)])
    cell = net.cells["l0"]
    rows = (torch.cat(sequences) @ cell.weight_ih.T).detach().double()
    assert_close("mean", cell.norm_ih["h"].H1.estimate[0], rows.mean(0), dtype=torch.float32, terms=4)


class Replicas:
    """What a sum over replicas is, for threads."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=30)
        self.given: dict[int, Tensor] = {}

    def sum(self, rank: int, value: Tensor) -> Tensor:
        self.barrier.wait()
        self.given[rank] = value
        self.barrier.wait()
        return torch.stack([self.given[r] for r in sorted(self.given)]).sum(0)


@pytest.mark.parametrize(
    "norm", [BatchNorm, nn.BatchNorm1d, partial(StreamingNorm, p=1), partial(StreamingNorm, ref=SP1)]
)
@pytest.mark.parametrize("estimator", ["pooled", "corrected"])
def test_replicas_count_by_what_they_have_seen(norm: Callable[[int], nn.Module], estimator: Any) -> None:
    place = (3,) if isinstance(norm, partial) and norm.keywords.get("ref") is SP1 else ()
    x = torch.randn(40, 6, *place) + torch.arange(40).reshape(40, *[1] * (1 + len(place))) / 4
    models = [nn.Sequential(norm(6), nn.ReLU(), norm(6)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    replicas, parts = Replicas(2), (x[:8], x[8:])
    threads = [
        threading.Thread(
            target=recalibrate,
            args=(models[rank], parts[rank].split(8)),
            kwargs={"across": partial(replicas.sum, rank), "estimator": estimator},
        )
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other, whole = (torch.stack(stored(model)) for model in models[:2] + models[:1])
    assert_close("replicas agree", one, other, dtype=torch.float32)
    if estimator == "pooled":
        recalibrate(models[2], x.split(5))
        whole = torch.stack(stored(models[2]))
        assert_close("one process has the same", one, whole, dtype=torch.float32, terms=8)
        return
    shares = []
    for part in parts:
        single = nn.Sequential(norm(6), nn.ReLU(), norm(6))
        recalibrate(single, part.split(8), estimator=estimator)
        shares.append(stored(single)[0])
    assert_close("by the number of batches", one[0], shares[0] / 5 + shares[1] * 4 / 5, dtype=torch.float32, terms=8)


def test_replicas_agree_that_data_differ_where_one_of_them_draws_anew() -> None:
    models, replicas, x, said = [deep(BatchNorm) for _ in range(2)], Replicas(2), 3 + torch.randn(60, 6), []
    models[1].load_state_dict(models[0].state_dict())

    class Drawn:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(x[torch.randint(40, (40,))].split(8))

    def run(rank: int, data: Any) -> None:
        with pytest.raises(UserWarning, match="the data differ from pass to pass") as raised:  # warnings are errors
            recalibrate(models[rank], data, across=partial(replicas.sum, rank))
        said.append(raised)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate([Drawn(), x[40:].split(5)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 2
    one, other = (torch.stack(stored(model)) for model in models)
    assert_close("replicas agree", one, other, dtype=torch.float32)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    recalibrate(deep(BatchNorm, depth=2), X.split(16), progress=lambda *now: seen.append(now))
    assert seen == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
    assert capsys.readouterr() == ("", "")
    recalibrate(deep(BatchNorm, depth=1), X.split(16), progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("\rpass 1 [##############################] batch 2 of 2\n")
    recalibrate(BatchNorm(6), iter(X.split(16)), passes=1, progress=True)
    assert "batch 2" in capsys.readouterr().err


# --- the gap ---


def test_the_gap_is_told_in_sigmas_and_closed_by_recalibration() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), BatchNorm(2))
    x = torch.randn(60, 2)
    recalibrate(model, x.split(7))
    before = picture(model)
    assert gap(model, x.split(9)).largest < 1e-6
    x = torch.stack([x[:, 0], x[:, 1] * 4 + 3], 1)
    mean, sigma = x.mean(0), x.std(0)
    row = gap(model, x.split(9)).rows[0]
    off = ((model[0].running_mean - mean) / sigma).abs()
    ratio = model[0].running_var.sqrt() / sigma
    # torch's gap is told with the unbiased variance that it stores
    assert row.largest == pytest.approx(off.max().item(), rel=1e-3)
    assert row.mean == pytest.approx(off.square().mean().sqrt().item(), rel=1e-3)
    assert (row.lowest, row.highest) == pytest.approx((ratio.min().item(), ratio.max().item()), rel=1e-3)
    assert row.ratio == pytest.approx(ratio.prod().sqrt().item(), rel=1e-3)
    assert_same(picture(model), before)


def test_the_gap_is_printed_as_a_table() -> None:
    model = deep(BatchNorm)
    model(X)
    lines = str(gap(model, X.split(8))).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "4", "7"]
    assert len({len(line) for line in lines}) == 1, "columns line up"
