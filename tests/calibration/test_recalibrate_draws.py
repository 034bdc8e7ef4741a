"""Recalibration from data that are drawn anew in each pass: no worse than each layer by hand, once, in order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from chains import X, assert_same, deep, picture, stored
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, TensorDataset

from streamnorm import BA6, BatchNorm, Norm, StreamingNorm, recalibrate
from streamnorm.calibration import gap

NOTICED = "the data differ from pass to pass"
EPS = 1e-5
ROUNDING = 1e-9
"""Float64 rounds by 1e-16; sums of a hundred rows and twelve layers, each of which may double an error, make 4e-11."""


class Net(nn.Module):
    """Affine maps, each with a normalization and a ReLU behind it.

    Args:
        which: the number of the normalization behind each map; several maps may share one.
        skips: whether a map has a way around it.
        p: where the model drops units at any time, testing included; 0: nowhere.
    """

    def __init__(
        self, which: list[int], norm: Callable[[int], nn.Module], skips: list[bool], p: float = 0.0, width: int = 6
    ) -> None:
        super().__init__()
        self.which, self.skips, self.p = which, skips, p
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in which)
        self.norms = nn.ModuleList(norm(width) for _ in range(max(which) + 1))
        self.off = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor, normalize: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        for linear, number, skip in zip(self.maps, self.which, self.skips, strict=True):
            h = linear(x)
            h = self.norms[number](h) if normalize is None else normalize(number, h)
            h = dropout(torch.relu(self.off(h)), self.p, training=True) if self.p else torch.relu(self.off(h))
            x = x + h if skip else h
        return x


class Drawn:
    """A loader that draws other samples in each pass, the same ones in pass k of any two; or in each the same.

    Args:
        same: only what the model draws differs between passes.
    """

    def __init__(self, x: Tensor, batches: int = 4, size: int = 16, same: bool = False, p: float = 0.0) -> None:
        self.x, self.batches, self.size, self.same, self.p = x, batches, size, same, p
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return self.number(self.passes)

    def number(self, k: int) -> Iterator[Tensor]:
        """Pass k."""
        chosen = torch.Generator().manual_seed(0 if self.same else k)
        torch.manual_seed(k)
        for _ in range(self.batches):
            yield dropout(self.x[torch.randint(len(self.x), (self.size,), generator=chosen)], self.p, training=True)


def by_hand(net: Net, data: Drawn, passes: Mapping[int, list[int]], p: int = 2) -> list[Tensor]:
    """Each normalization once, in their order, of these passes; those behind it use a mini-batch's own statistics.

    Args:
        passes: of each normalization, that which tells its table; for p = 1 one that tells its center before.
    """
    tables: dict[int, Tensor] = {}

    def table(h: Tensor, center: Tensor | None = None) -> Tensor:
        mean = h.mean(0)
        away = (h - (mean if center is None else center)).abs()
        return torch.stack([mean, ((away**p).mean(0) + EPS ** (p / 2)) ** (1 / p)])

    def normalize(number: int, h: Tensor, wanted: int, given: list[Tensor]) -> Tensor:
        if number == wanted:
            given.append(h)
        norm: Any = net.norms[number]
        mean, sigma = tables.get(number, table(h))
        return (h - mean) / sigma * norm.weight + norm.bias

    with torch.no_grad():
        for number in dict.fromkeys(net.which):
            center = None
            for k in passes[number]:
                given: list[Tensor] = []
                for x in data.number(k):
                    net.eval()(x, partial(normalize, wanted=number, given=given))
                found = table(torch.cat(given), center)
                center = found[0]
            tables[number] = found
    return [tables[number] for number in sorted(tables)]


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest distance of tables, in sigmas."""
    return max(((a - b).abs() / b[1]).max().item() for a, b in zip(found, wanted, strict=True))


def data(seed: int, rows: int = 400) -> Tensor:
    return 3 + torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net_of(depth: int, seed: int, norm: Callable[[int], nn.Module] = BatchNorm, p: float = 0.0) -> Net:
    torch.manual_seed(seed)
    return Net(list(range(depth)), norm, [bool(b) for b in torch.randint(2, (depth,))], p)


# --- no worse than by hand: the same, of the same passes ---


@pytest.mark.parametrize("depth", range(1, 13))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_each_layer_is_taken_once_in_order(depth: int, p: float) -> None:
    """Of pass 1, then (pass 2 shows that data differ, and pass 3 that it is they) of 3, 4, ...: also the first layer's
    table is that of pass 1, so nothing that is exact was stored again."""
    net, loader = net_of(depth, depth), Drawn(data(depth), p=p)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert recalibrate(net, loader) == depth + (depth > 1)
    assert [NOTICED in str(one.message) for one in said] == [True] * (depth > 1)
    wanted = by_hand(net, loader, {k: [k + 1 + (k > 0)] for k in range(depth)})
    assert off(stored(net), wanted) < ROUNDING


@pytest.mark.parametrize("depth", [3, 7, 12])
def test_a_model_that_draws_by_itself(depth: int) -> None:
    """The first layer, before which nothing is drawn, does not move; pass 3 shows that the second does."""
    net, loader = net_of(depth, depth, p=0.3), Drawn(data(depth), same=True)
    with pytest.warns(UserWarning, match=rf"{NOTICED} \(statistics at 'norms.1' moved by 0\.\d+ of a sigma\)"):
        recalibrate(net, loader)
    wanted = by_hand(net, loader, {k: [k + 1 + (k > 1)] for k in range(depth)})
    assert off(stored(net), wanted) < ROUNDING


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_where_sigma_waits_for_the_mean_each_layer_is_taken_of_two_passes(depth: int) -> None:
    net, loader = net_of(depth, depth, partial(StreamingNorm, p=1)), Drawn(data(depth))
    with pytest.warns(UserWarning, match=NOTICED):
        recalibrate(net, loader)
    passes = [1, *range(3, 2 * depth + 2)]
    wanted = by_hand(net, loader, {k: passes[2 * k : 2 * k + 2] for k in range(depth)}, p=1)
    assert off(stored(net), wanted) < ROUNDING


def test_after_fewer_passes_the_layers_behind_use_each_mini_batch() -> None:
    net, loader = net_of(8, 0), Drawn(data(0))
    with pytest.warns(UserWarning, match=NOTICED):
        assert recalibrate(net, loader, passes=4) == 4
    wanted = by_hand(net, loader, {k: [min(k + 1 + (k > 0), 4)] for k in range(3)} | {k: [4] for k in range(3, 8)})
    assert off(stored(net)[:3], wanted[:3]) < ROUNDING
    assert off(stored(net)[3:4], wanted[3:4]) > 1e-3, "behind layers that use each mini-batch, which by hand do not"
    assert gap(net, [loader.x]).largest < 1


SHARED = {"a loop": [0] * 6, "pairs": [0, 0, 1, 1, 2, 2], "far apart": [0, 1, 2, 3, 1, 4, 5], "nested": [0, 1, 0, 2, 1]}


@pytest.mark.parametrize("which", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_layers_that_are_shared_go_on_from_there(which: list[int], p: float) -> None:
    """The same tables agree best with later passes: each noisy, by 1 / sqrt(n) of a sigma for a mean of n samples, of
    which the largest of a hundred figures may be four. By hand adds what mini-batches' own statistics do."""
    torch.manual_seed(len(which))
    net, loader = Net(which, BatchNorm, [False] * len(which), p), Drawn(data(1), batches=6)
    hand = copy.deepcopy(net)
    for norm, table in zip(hand.norms, by_hand(net, loader, {k: [1] for k in which}), strict=True):
        hand(loader.x)
        norm.H1.estimate = table
    with pytest.warns(UserWarning, match=NOTICED):
        recalibrate(net, loader)
    for memory in (norm.H1 for norm in net.norms):
        again = copy.deepcopy(memory)
        again.restart(again.estimate)
        for name, value in again.state().items():
            assert memory.state()[name].equal(value), "training goes on from what is stored"
    everything = [loader.x] * (20 if p else 1)
    assert gap(net, everything).largest < gap(hand, everything).largest + 4 / (6 * 16) ** 0.5


def test_a_layer_that_a_pass_leaves_out_keeps_what_another_told() -> None:
    net = Routed(BatchNorm)

    class Leaving(Drawn):
        """Through B in the first pass only."""

        def number(self, k: int) -> Iterator[Tensor]:
            for x in super().number(k):
                x[0, 0] = 1 if k == 1 else -1
                yield x

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recalibrate(net, Leaving(data(7)))
    assert [NOTICED in str(one.message) for one in said] == [True], "B was called, so nobody says that it was not"
    assert len(stored(net)) == 3


# --- the same data in each pass: exact, as ever, and not a word ---


class Routed(nn.Module):
    """A batch goes through A and C, or through A, B and C: of C nobody knows in the first batch that B comes before."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(6, 6), norm(6)) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h)) if x[0, 0] > 0 else h)


def standardized(norm: Any, h: Tensor, rows: Tensor) -> Tensor:
    """By the mean and the deviation of rows."""
    correction = 0 if isinstance(norm, Norm) else 1
    return (h - rows.mean(0)) / (rows.var(0, correction=correction) + EPS).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm1d])
def test_layers_on_branches_wait_for_all_that_may_come_before(norm: Callable[[int], nn.Module]) -> None:
    net, parts = Routed(norm), [part.clone() for part in data(2, 64).split(8)]
    for k, part in enumerate(parts):
        part[0, 0] = k % 2 - 0.5
    assert recalibrate(net, parts) == 3
    with torch.no_grad():
        rows = net.a[0](torch.cat(parts))
        short, long = (torch.relu(standardized(net.a[1], net.a[0](torch.cat(parts[way::2])), rows)) for way in range(2))
        rows = net.b[0](long)
        inputs = net.c[0](torch.cat([short, torch.relu(standardized(net.b[1], rows, rows))]))
        found = stored(net)[2]
    assert ((found[0] - inputs.mean(0)) / inputs.std(0)).abs().max() < ROUNDING
    correction = 0 if isinstance(net.c[1], Norm) else 1
    assert (found[1] / (inputs.var(0, correction=correction) + EPS).sqrt() - 1).abs().max() < ROUNDING


def test_a_layer_for_two_inputs_has_the_statistics_of_both() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) - self.norm(2 * x + 1)

    net, x = Twins(), data(3)
    net(x)
    recalibrate(net.double(), x.split(32))
    rows = torch.cat([x, 2 * x + 1])
    assert off(stored(net), [torch.stack([rows.mean(0), (rows.var(0, correction=0) + EPS).sqrt()])]) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loader_that_shuffles_gives_the_same_data(dtype: torch.dtype) -> None:
    net, x = net_of(12, 5).to(dtype), data(5, 100).to(dtype)
    loader = DataLoader(TensorDataset(x), 32, shuffle=True)
    assert recalibrate(net, loader) <= 13, "a warning would be an error"
    assert gap(net, [x]).largest < (ROUNDING if dtype == torch.float64 else 1e-4)
    with pytest.warns(UserWarning, match=NOTICED):
        recalibrate(net, DataLoader(TensorDataset(x), 32, shuffle=True, drop_last=True))


def test_a_state_that_is_carried_from_batch_to_batch_is_no_change_of_data() -> None:
    """Each layer is called once a batch, and acts on itself in the next."""
    net, parts = net_of(2, 6), data(6).split(40)

    def call(net: nn.Module, x: Tensor) -> None:
        nonlocal carried
        carried = net(x + 0.1 * carried if len(x) == len(parts[0]) and x is not parts[0] else x)

    carried: Any = 0
    recalibrate(net, parts, call=call, passes=60)
    assert gap(net, parts, call=call).largest < 1e-4, "ten times where passes end"


# --- what is given: no end, once only, nothing ---


def endless(x: Tensor) -> Iterator[Tensor]:
    while True:
        yield from x.split(4)


def test_so_many_batches_of_data_without_an_end() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            return endless(X)

    wanted, net = deep(BatchNorm), deep(BatchNorm)
    net.load_state_dict(wanted.state_dict())
    shown: list[Any] = []
    recalibrate(wanted, X.split(4)[:5])
    assert recalibrate(net, Endless(), batches=5, progress=lambda *now: shown.append(now)) == 3
    assert shown[4:6] == [(1, 5, 5), (2, 1, 5)]
    assert torch.stack(stored(net)).equal(torch.stack(stored(wanted)))
    assert gap(net, Endless(), batches=5).largest < 1e-5
    given = endless(X)
    recalibrate(net, given, batches=8), "an iterator goes on: here through the same data"
    assert next(given).equal(X[:4]), "no batch more than was asked for"


@pytest.mark.parametrize(
    ("given", "batches", "message"),
    [
        (lambda: X.split(4), 9, "batches=9, and 8 came from the data"),
        (lambda: iter(X.split(4)), 5, "batches=5, and 3 came from the data"),
        (lambda: [], 1, "batches=1, and 0 came from the data"),
        (lambda: X.split(4), 0, "batches is a number of batches >= 1, or None, got 0"),
        (lambda: X.split(4), 2.0, "batches is a number of batches >= 1, or None, got 2.0"),
    ],
)
def test_too_few_batches_are_refused(given: Callable[[], Any], batches: Any, message: str) -> None:
    net = deep(BatchNorm)
    before = picture(net)
    with pytest.raises(ValueError, match=message):
        recalibrate(net, given(), batches=batches)
    assert_same(picture(net), before)
    if not isinstance(given(), Iterator):
        net(X)
        with pytest.raises(ValueError, match=message):
            gap(net, given(), batches=batches)


def test_data_that_are_used_up_by_the_first_pass_are_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.parts = iter(X.split(4))

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.parts

    net = deep(BatchNorm)
    before = picture(net)
    with pytest.raises(ValueError, match="used before is empty: give a list") as raised:
        recalibrate(net, Once())
    assert "in pass 2 of" in raised.value.__notes__[0]
    assert_same(picture(net), before)
    recalibrate(net, Once(), passes=1)


NORMS = {"BatchNorm": BatchNorm, "places": partial(BatchNorm, ref=BA6), "torch": nn.BatchNorm1d, "p": StreamingNorm}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_an_empty_batch_may_come_first(norm: Callable[[int], nn.Module]) -> None:
    wanted, net = deep(norm), deep(norm)
    net.load_state_dict(wanted.state_dict())
    assert recalibrate(net, [X[:0], *X.split(8), X[:0]]) == recalibrate(wanted, X.split(8))
    assert torch.stack(stored(net)).equal(torch.stack(stored(wanted)))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_only_empty_batches_are_told(norm: Callable[[int], nn.Module]) -> None:
    net = deep(norm)
    net(X)
    before = picture(net)
    for function in (recalibrate, gap):
        with pytest.raises(ValueError, match="the data yield only empty batches, 2 of them"):
            function(net, [X[:0], X[:0]])
    assert_same(picture(net), before)
    with pytest.warns(UserWarning, match="before it has seen any training data"):
        BatchNorm(6).eval()(X)
