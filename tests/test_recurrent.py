"""Recurrent layers: torch's conventions, one stream through time, and what they do with odd and bad input."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm.layers import norms

NETS: dict[str, Any] = {"RNN": sn.NormRNN, "GRU": sn.NormGRU, "LSTM": sn.NormLSTM}
MIXED = functools.partial(sn.StreamingNorm, alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1))
NORMS: dict[str, Any] = {
    "streaming": MIXED,
    "batch": sn.BatchNorm,
    "sample": sn.SampleNorm,
    "time-specific": sn.TimeSpecific(sn.BatchNorm),
}
LENGTHS = (3, 6, 2, 6, 1)
STEPS = 64 * 16
"""Terms in what passes through a few time steps: sums of up to 64 values, enlarged by every step on the way."""


def identity(c: int) -> nn.Module:
    return nn.Identity()


def sequences(width: int = 4, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randn(T, width, dtype=torch.float64) for T in lengths]


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same_state(net: nn.Module, before: dict[str, Tensor]) -> bool:
    now = net.state_dict()
    return now.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in now.items())


def flat(final: Any) -> tuple[Tensor, ...]:
    return final if isinstance(final, tuple) else (final,)


def initial(net: Any, *shape: int) -> Any:
    state = tuple(torch.randn(*shape, net.hidden_size, dtype=torch.float64) for _ in net.cells["l0"].states)
    return state if len(state) > 1 else state[0]


def copy_weights(ours: Any, theirs: nn.Module) -> None:
    for key, cell in ours.cells.items():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if getattr(cell, name) is not None:
                getattr(cell, name).data.copy_(getattr(theirs, f"{name}_{key}"))


# --- torch's conventions


FORMS: dict[str, Callable[[bool], Any]] = {
    "batch": lambda batch_first: torch.randn(5, 7, 4, dtype=torch.float64).transpose(0, int(batch_first)),
    "single": lambda batch_first: torch.randn(7, 4, dtype=torch.float64),
    "packed": lambda batch_first: pack_sequence(sorted(sequences(), key=len, reverse=True)),
    "unsorted": lambda batch_first: pack_sequence(sequences(), enforce_sorted=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_shapes_are_torchs(name: str, form: str) -> None:
    for layers, both, first, given in itertools.product((1, 2), (False, True), (False, True), (False, True)):
        options = {"num_layers": layers, "bidirectional": both, "batch_first": first}
        ours = NETS[name](4, 3, norm=sn.SampleNorm, **options).double()
        theirs = getattr(nn, name)(4, 3, **options).double()
        x = FORMS[form](first)
        hx = None
        if given:
            _, hx = theirs(x)
        (y, final), (want, want_final) = ours(x, hx), theirs(x, hx)
        assert [part.shape for part in flat(final)] == [part.shape for part in flat(want_final)], options
        if isinstance(want, PackedSequence):
            assert isinstance(y, PackedSequence)
            assert y.data.shape == want.data.shape
            for a, b in zip(y[1:], want[1:], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
        else:
            assert y.shape == want.shape, options


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [("RNN", "tanh"), ("RNN", "relu"), ("LSTM", "")], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "identity"])
def test_without_a_norm_they_are_torchs(kind: tuple[str, str], form: str, bias: bool) -> None:
    name, f = kind
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, **({"nonlinearity": f} if f else {})}
    ours = NETS[name](4, 3, norm=None if bias else identity, **options).double()
    theirs = getattr(nn, name)(4, 3, bias=bias, **options).double()
    copy_weights(ours, theirs)
    x = FORMS[form](False)
    data = x.data if isinstance(x, PackedSequence) else x
    hx = initial(ours, 4, *(() if form == "single" else (7 if form == "batch" else 5,)))
    results = []
    for net in (ours, theirs):
        leaf = data.clone().requires_grad_()
        y, final = net(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf, hx)
        rows = y.data if isinstance(y, PackedSequence) else y
        (rows.square().sum() + sum(part.sum() for part in flat(final))).backward()
        results.append((rows, *flat(final), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_close("output, state or gradient", a.detach(), b.detach(), STEPS)
    for key, cell in ours.cells.items():
        for which in ("weight_ih", "weight_hh"):
            want = getattr(theirs, f"{which}_{key}").grad
            assert_close(f"{key} {which}", getattr(cell, which).grad, want, STEPS)


@pytest.mark.parametrize("f", ["tanh", "relu"])
def test_gru_is_equations_4_to_7(f: str) -> None:
    net = sn.NormGRU(4, 3, norm=identity, nonlinearity=f).double()
    W = dict(zip(("xr", "xz", "xh"), net.cells["l0"].weight_ih.detach().split(3), strict=True))
    W |= dict(zip(("hr", "hz", "hh"), net.cells["l0"].weight_hh.detach().split(3), strict=True))
    x, h = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    y, h_n = net(x, h)
    h = h[0]
    for t in range(6):
        g_r = torch.sigmoid(x[t] @ W["xr"].T + h @ W["hr"].T)
        g_z = torch.sigmoid(x[t] @ W["xz"].T + h @ W["hz"].T)
        h_new = getattr(torch, f)(x[t] @ W["xh"].T + (h * g_r) @ W["hh"].T)
        h = g_z * h_new + (1 - g_z) * h
        assert_close(f"h {t}", y[t].detach(), h, STEPS)
    assert torch.equal(h_n[0], y[-1])


@pytest.mark.parametrize("name", NETS)
def test_a_cell_takes_one_sequence_or_many(name: str) -> None:
    cell = NETS[name](4, 3, norm=sn.SampleNorm).cells["l0"]
    x, state = torch.randn(5, 4), flat(cell(torch.randn(5, 4)))
    many = flat(cell(x, state if len(state) > 1 else state[0]))
    one = tuple(part[2] for part in state)
    for a, b in zip(flat(cell(x[2], one if len(one) > 1 else one[0])), many, strict=True):
        assert a.shape == (3,)
        assert_close("state", a.detach(), b[2].detach(), STEPS)


def test_a_matrix_before_a_norm_has_no_bias_and_others_have() -> None:
    names = {name.rpartition(".")[2] for name, _ in sn.NormGRU(4, 3).cells["l0"].named_parameters(recurse=False)}
    assert names == {"weight_ih", "weight_hh"}
    vertical = sn.NormGRU(4, 3, norm_h=None).cells["l0"]
    assert vertical.bias_ih is None
    assert vertical.bias_hh.shape == (9,)
    assert vertical.norm_hh is None
    assert len(list(norms(vertical))) == 3
    assert len(list(norms(sn.NormGRU(4, 3)))) == 6
    assert len({id(norm) for norm in sn.NormGRU(4, 3).cells["l0"].norms()}) == 6
    other = sn.NormRNN(4, 3, norm=sn.BatchNorm, norm_h=sn.SampleNorm).cells["l0"]
    assert isinstance(other.norm_ih["h"], sn.BatchNorm)
    assert isinstance(other.norm_hh["h"], sn.SampleNorm)
    assert {"l0", "l0_reverse", "l1", "l1_reverse"} == set(sn.NormRNN(4, 3, 2, bidirectional=True).cells)


def test_the_norm_of_the_cell_state_stands_before_the_output() -> None:
    net = sn.NormLSTM(4, 3, norm_c=sn.SampleNorm).double()
    cell = net.cells["l0"]
    _, (h_n, c_n) = net(torch.randn(1, 5, 4, dtype=torch.float64))
    plain = copy.deepcopy(cell)
    plain.norm_c = None
    x = torch.randn(5, 4, dtype=torch.float64)
    (h, c), (h_plain, c_plain) = cell(x, (h_n[0], c_n[0])), plain(x, (h_n[0], c_n[0]))
    assert torch.equal(c, c_plain)
    assert_close("h", h.detach(), (h_plain / c.tanh() * cell.norm_c(c).tanh()).detach(), STEPS)


def test_dropout_acts_between_layers_in_training_alone() -> None:
    net = sn.NormGRU(4, 3, 2, dropout=0.5, norm=sn.SampleNorm)
    x = torch.randn(7, 5, 4)
    assert not torch.equal(net(x)[0], net(x)[0])
    assert torch.equal(net.eval()(x)[0], net(x)[0])
    with pytest.warns(UserWarning, match="acts between layers and there is one"):
        sn.NormGRU(4, 3, dropout=0.5)


def test_repr_shows_what_was_chosen() -> None:
    net = sn.NormGRU(4, 3, 2, nonlinearity="relu", bidirectional=True, batch_first=True, backward_stats="latest")
    shown = "4, 3, num_layers=2, nonlinearity='relu', batch_first=True, bidirectional=True, backward_stats='latest'"
    assert net.extra_repr() == shown
    assert "(r): StreamingNorm(3)" in repr(net)
    assert "NormGRUCell(\n" in repr(net)


# --- one stream through time


@pytest.mark.parametrize("name", NETS)
def test_one_state_for_all_time_steps(name: str) -> None:
    net = NETS[name](4, 3, 2, bidirectional=True)
    output, _ = net(torch.randn(7, 5, 4))
    output.sum().backward()
    for norm in norms(net):
        assert norm.H1.count == 7
        assert norm.H2.count == 7
    net.eval()
    before = state_of(net)
    assert net(torch.randn(40, 5, 4))[0].isfinite().all()  # a length that training has not seen
    assert same_state(net, before)


def test_time_specific_holds_as_many_as_there_are_steps() -> None:
    net = sn.NormGRU(4, 3, norm=sn.TimeSpecific(sn.BatchNorm))
    layers = list(net.cells["l0"].norms())
    for T, held in ((3, 3), (7, 7), (5, 7)):
        net(torch.randn(T, 5, 4))
        assert [layer.trained_steps for layer in layers] == [held] * 6
    assert [int(at.H1.seen) for at in layers[0].times] == [3, 3, 3, 2, 2, 1, 1]
    gains = [name for name, _ in layers[0].named_parameters()]
    assert gains == ["affine.weight", "affine.bias"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lengths", [(6,) * 5, (6, 6, 3, 2)], ids=["equal", "packed"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_layer_is_a_loop_over_its_cell(name: str, norm: str, lengths: tuple[int, ...], backwards: bool) -> None:
    """The projection of all time steps at once with its norm changes nothing, neither going back nor in the state."""
    net = NETS[name](4, 3, norm=NORMS[norm], bidirectional=backwards).double()
    ours = net.cells["l0_reverse" if backwards else "l0"]
    theirs = copy.deepcopy(ours)
    for step in range(4):
        parts = sequences(4, lengths)
        packed = pack_sequence([part.requires_grad_() for part in parts])
        hx = initial(net, 2 if backwards else 1, len(lengths))
        start = tuple(part[-1] for part in flat(hx))
        y, final = net(packed if len(set(lengths)) > 1 else torch.stack(parts, 1), hx)
        rows = y if isinstance(y, Tensor) else pad_packed_sequence(y)[0]
        rows = rows[..., -3:]
        weights = torch.randn(rows.shape, dtype=torch.float64)
        (rows * weights).sum().backward()
        grads = [part.grad for part in parts]

        copies = [part.detach().requires_grad_() for part in parts]
        state, outputs = start, torch.zeros_like(rows)
        for k in range(6):
            t = 5 - k if backwards else k
            n = sum(t < T for T in lengths)
            x = torch.stack([part[t] for part in copies[:n]])
            now = tuple(part[:n] for part in state)
            new = flat(theirs(x, now if len(now) > 1 else now[0], k))
            state = tuple(torch.cat([a, b[n:]]) for a, b in zip(new, state, strict=True))
            outputs = torch.cat([outputs[:t], torch.cat([new[0], outputs[t, n:]])[None], outputs[t + 1 :]])
        (outputs * weights).sum().backward()
        assert_close(f"{step} output", rows.detach(), outputs.detach(), STEPS)
        for a, b in zip(flat(final), state, strict=True):
            assert_close(f"{step} state", a[-1].detach(), b.detach(), STEPS)
        for a, b in zip(grads, copies, strict=True):
            assert_close(f"{step} dx", a, b.grad, STEPS)
        for (which, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_close(f"{step} {which}", a.grad, b.grad, STEPS)
        known = theirs.state_dict()
        assert known.keys() == ours.state_dict().keys()
        for which, value in ours.state_dict().items():
            assert_close(f"{step} {which}", value.double(), known[which].double(), STEPS)
        if step == 1:
            for one in (*norms(net), *norms(theirs)):
                one.fold()


@pytest.mark.parametrize("name", NETS)
def test_packed_sequences_are_single_ones_where_samples_stand_alone(name: str) -> None:
    net = NETS[name](4, 3, 2, bidirectional=True, norm=sn.SampleNorm).double()
    parts = [part.requires_grad_() for part in sequences()]
    hx = initial(net, 4, len(parts))
    y, final = net(pack_sequence(parts, enforce_sorted=False), hx)
    rows, lengths = pad_packed_sequence(y)
    rows.square().sum().backward()
    for i, part in enumerate(parts):
        alone = part.detach().requires_grad_()
        one = tuple(state[:, i] for state in flat(hx))
        want, last = net(alone, one if len(one) > 1 else one[0])
        want.square().sum().backward()
        assert lengths[i] == len(part)
        assert_close(f"{i} output", rows[: len(part), i].detach(), want.detach(), STEPS)
        assert_close(f"{i} dx", part.grad, alone.grad, STEPS)
        for a, b in zip(flat(final), flat(last), strict=True):
            assert_close(f"{i} state", a[:, i].detach(), b.detach(), STEPS)


@pytest.mark.parametrize("norm", ["batch", "streaming", "time-specific"])
def test_testing_looks_at_each_sequence_by_itself(norm: str) -> None:
    net = sn.NormGRU(4, 3, norm=NORMS[norm]).double()
    net(torch.randn(6, 5, 4, dtype=torch.float64))
    net.eval()
    parts = sequences()
    rows, _ = pad_packed_sequence(net(pack_sequence(parts, enforce_sorted=False))[0])
    for i, part in enumerate(parts):
        assert_close(f"{i}", rows[: len(part), i].detach(), net(part)[0].detach(), STEPS)


class FoldingAfterEachStep(nn.Module):
    """A module of a user's own: a weight update is announced after every call."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = sn.StreamingNorm(c, alpha=(0, 1), beta=(0, 0, 1), kappa=(0.5, 0.5, 0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.norm.fold()
        return y


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["batch", "sample", "time-specific", "corner"])
def test_gradcheck_through_time(name: str, norm: str) -> None:
    """Where the streamed gradient is the true one: each step normalized by its own mini-batch.

    With alpha=(0, 1) and beta=(0, 0, 1) that is so as long as short holds one arrival. Through T > 1 time steps it
    holds their mean, and Algorithm 6 is no gradient any more; so here the corner folds after every step.
    """
    net = NETS[name](2, 3, norm=FoldingAfterEachStep if norm == "corner" else NORMS[norm]).double()
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in net.cells["l0"].states)

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        return net(x, hx if len(hx) > 1 else hx[0])[0]

    assert torch.autograd.gradcheck(run, (x, *hx, *net.parameters()))


def test_at_a_single_step_the_corner_is_batch_normalization() -> None:
    corner = functools.partial(sn.StreamingNorm, alpha=(0, 1), beta=(0, 0, 1), kappa=(0.5,) * 4)
    net = sn.NormGRU(4, 3, norm=corner).double()
    other = sn.NormGRU(4, 3, norm=sn.BatchNorm).double()
    other.load_state_dict(dict(net.named_parameters()), strict=False)
    x, h = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    for one in (net, other):
        one(x, h)[0].square().sum().backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert_close("gradient", a.grad, b.grad, STEPS)


# --- training


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", NORMS)
def test_training_remembers_a_symbol(name: str, norm: str) -> None:
    """The first of eight symbols is to be told at the end."""
    net, readout = NETS[name](4, 16, norm=NORMS[norm]), nn.Linear(16, 4)
    model = nn.ModuleList([net, readout])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    with sn.attach(model, optimizer):
        for _ in range(60):
            symbols = torch.randint(4, (8, 32))
            output, _ = net(nn.functional.one_hot(symbols, 4).float())
            loss = nn.functional.cross_entropy(readout(output[-1]), symbols[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


@pytest.mark.parametrize("name", NETS)
def test_a_state_of_zeros_calls_for_a_warm_up(name: str) -> None:
    """W_h h_0 = 0 has no sigma: what H2 would learn of it, divided by sqrt(eps), can keep a net from learning."""

    def warms_up(*starts: Any) -> bool:
        net = NETS[name](4, 3).double()
        link = sn.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for start in starts:
            net(torch.randn(6, 5, 4, dtype=torch.float64), start)
        return link.warming_up

    given = initial(NETS[name](4, 3), 1, 5)
    zeros = tuple(torch.zeros_like(part) for part in flat(given))
    assert warms_up(None)
    assert warms_up(zeros if len(zeros) > 1 else zeros[0])
    assert warms_up(None, given)  # carried on inside one update cycle
    assert not warms_up(given)


class Last(nn.Module):
    """The output at the last step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0][:, -1]


def test_mini_batches_of_different_lengths_in_one_update_cycle() -> None:
    model = Last(sn.NormGRU(4, 3, batch_first=True)).double()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = sn.DAU(
        model, optimizer, nn.functional.mse_loss, samples_per_batch=5, batches_per_update=3, vectorize=False, warmup=0
    )
    arrived = 0
    for T in (4, 9, 6):
        assert all(layer.H1.count == layer.H2.count == arrived for layer in norms(model))
        x, y = torch.randn(5, T, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        cycle.accumulate(x, y)
        (nn.functional.mse_loss(by_hand(x), y) / 3).backward()
        arrived += T
    assert all(layer.H1.count == 0 and layer.H1.updates == 1 for layer in norms(model))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        # By hand, H2 was given a third of each gradient, and so gave back a third: beta makes it no other than that.
        assert_close("weight", a.detach(), (b - 0.1 * b.grad).detach(), STEPS)
    for a, b in zip(norms(model), norms(by_hand), strict=True):
        assert_close("H1", a.H1.long, b.H1.short, STEPS)
        assert_close("H2", a.H2.long, 3 * b.H2.short, STEPS)


def test_a_vectorized_cycle_is_refused() -> None:
    model = Last(sn.NormGRU(4, 3, batch_first=True))
    before = state_of(model)
    cycle = sn.DAU(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.functional.mse_loss,
        samples_per_batch=5,
        batches_per_update=3,
    )
    with pytest.raises(ValueError, match=r"NormGRU inside vectorized\(model, 3\).*vectorize=False"):
        cycle.update(torch.randn(15, 6, 4), torch.randn(15, 3))
    assert same_state(model, before)
    with sn.vectorized(model, 1):
        model(torch.randn(5, 6, 4))
    with sn.vectorized(model.eval(), 3):
        model(torch.randn(15, 6, 4))
    alone = Last(sn.NormGRU(4, 3, batch_first=True, norm=sn.SampleNorm))
    with sn.vectorized(alone, 3):  # where nothing is kept, no order can be wrong
        alone(torch.randn(15, 6, 4))


def test_a_long_sequence_is_one_call() -> None:
    net = sn.NormRNN(1, 1)
    net(torch.randn(1100, 2, 1))
    net(torch.randn(1100, 2, 1))
    assert [norm._calls.unfolded for norm in norms(net)] == [2, 2]
    for _ in range(997):
        net(torch.randn(3, 2, 1))
    with pytest.warns(UserWarning, match="1000 training calls and no weight update") as caught:
        net(torch.randn(3, 2, 1))
    assert len(caught) == 2


def test_autocast() -> None:
    net = sn.NormGRU(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = net(torch.randn(7, 5, 4))
    output.float().sum().backward()
    assert all(norm.H1.short.dtype == torch.float32 for norm in norms(net))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_checkpointing_repeats_a_sequence_or_says_that_it_cannot(norm: str) -> None:
    """A norm that is called at every step remembers its latest call alone; one per step, or none, can be repeated."""
    net = sn.NormGRU(4, 3, norm=NORMS[norm]).double()
    plain = copy.deepcopy(net)
    xs = [torch.randn(6, 5, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    output, _ = checkpoint(net, xs[0], use_reentrant=False)
    if norm in ("streaming", "batch"):
        with pytest.raises(RuntimeError, match="called once more since"):
            output.sum().backward()
        return
    output.sum().backward()
    plain(xs[1])[0].sum().backward()
    assert_close("dx", xs[0].grad, xs[1].grad, STEPS)
    assert all(int(layer.H1.seen) == 1 for layer in norms(net) if layer.H1 is not None)


# --- saving


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", NORMS)
def test_round_trips(name: str, norm: str) -> None:
    def step(net: nn.Module, seed: int) -> Tensor:
        x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(seed))
        y = net(x)[0]
        y.square().sum().backward()
        return y

    net = NETS[name](4, 3, 2, norm=NORMS[norm])
    step(net, 0)
    for one in norms(net):
        one.fold()
    step(net, 1)
    fresh = NETS[name](4, 3, 2, norm=NORMS[norm])
    fresh.load_state_dict(net.state_dict())
    copies = [fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    want = step(net, 2)
    for other in copies:
        assert torch.equal(step(other, 2), want)
        assert same_state(other, net.state_dict())
        x = torch.randn(9, 2, 4)
        assert torch.equal(other.eval()(x)[0], net.eval()(x)[0])
        net.train()
    assert "cells.l0.weight_ih" in net.state_dict()


def test_time_specific_loads_any_number_of_steps() -> None:
    nets = [sn.NormRNN(4, 3, norm=sn.TimeSpecific(sn.BatchNorm)) for _ in range(3)]
    nets[0](torch.randn(9, 5, 4)), nets[1](torch.randn(2, 5, 4))
    for source, target in ((0, 1), (0, 2)):
        nets[target].load_state_dict(nets[source].state_dict())
    short = sn.NormRNN(4, 3, norm=sn.TimeSpecific(sn.BatchNorm))
    short(torch.randn(4, 5, 4))
    nets[2].load_state_dict(short.state_dict())
    held = [net.cells["l0"].norm_hh["h"].trained_steps for net in (*nets, short)]
    assert held == [9, 9, 4, 4]
    x = torch.randn(12, 2, 4)
    assert torch.equal(nets[1].eval()(x)[0], nets[0].eval()(x)[0])


# --- time-specific statistics


def test_time_specific_tests_with_the_statistics_of_the_step() -> None:
    layer, plain = sn.TimeSpecific(sn.BatchNorm)(3), [sn.BatchNorm(3) for _ in range(4)]
    for _ in range(3):
        for t, norm in enumerate(plain):
            x = torch.randn(5, 3) * (t + 1) + t
            assert torch.equal(layer(x, t), norm(x))
    layer.eval()
    for norm in plain:
        norm.eval()
    x = torch.randn(5, 3)
    for t in range(8):
        assert torch.equal(layer(x, t), plain[min(t, 3)](x))
    assert layer.trained_steps == 4


def test_time_specific_without_reuse_shows_both_lengths() -> None:
    net = sn.NormGRU(4, 3, norm=sn.TimeSpecific(sn.BatchNorm, reuse_last=False))
    net(torch.randn(4, 5, 4))
    net.eval()
    before = state_of(net)
    assert net(torch.randn(4, 5, 4))[0].shape == (4, 5, 3)
    with pytest.raises(ValueError, match="statistics for 4 time steps and the sequence has 9"):
        net(torch.randn(9, 5, 4))
    assert same_state(net, before)
    assert "reuse_last=False" in repr(net)


def test_time_specific_begun_in_the_middle() -> None:
    layer = sn.TimeSpecific(sn.BatchNorm)(3)
    with pytest.raises(RuntimeError, match="before it has seen any training data"):
        layer.eval()(torch.randn(5, 3), 2)
    layer.train()(torch.randn(5, 3), 2)
    assert (len(layer.times), layer.trained_steps) == (3, 1)
    with pytest.raises(ValueError, match="expected 3 features"):
        layer(torch.randn(5, 4), 3)
    with pytest.raises(ValueError, match="time step >= 0, got -1"):
        layer(torch.randn(5, 3), -1)
    assert len(layer.times) == 3


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.SampleNorm, identity])
def test_time_specific_is_for_batch_normalization(norm: Any) -> None:
    with pytest.raises(TypeError, match="statistics per time step are for a batch normalization such as BatchNorm"):
        sn.NormRNN(4, 3, norm=sn.TimeSpecific(norm))


# --- bad input


def packed(sizes: list[int], rows: int, width: int = 4) -> PackedSequence:
    return PackedSequence(torch.randn(rows, width), torch.tensor(sizes, dtype=torch.int64), None, None)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no steps": (torch.randn(0, 5, 4), None, ValueError, r"5 sequences of 0 time steps in \(0, 5, 4\)"),
    "no sequences": (torch.randn(6, 0, 4), None, ValueError, r"0 sequences of 6 time steps"),
    "input size": (torch.randn(6, 5, 3), None, ValueError, r"input_size 4, got \(6, 5, 3\)"),
    "rank": (torch.randn(4), None, ValueError, r"\(T, n, input_size\) or \(T, input_size\).*got \(4,\)"),
    "no tensor": ([1.0], None, TypeError, "or a PackedSequence, got list"),
    "dtype": (torch.randn(6, 5, 4).double(), None, ValueError, "the input is torch.float64 on cpu"),
    "state": (torch.randn(6, 5, 4), torch.randn(1, 4, 3), ValueError, r"\(num_layers, n, hidden_size\) = \(1, 5, 3\)"),
    "state of one": (torch.randn(6, 4), torch.randn(1, 1, 3), ValueError, r"\(num_layers, hidden_size\) = \(1, 3\)"),
    "state dtype": (torch.randn(6, 5, 4), torch.randn(1, 5, 3).double(), ValueError, "the state h_0 is torch.float64"),
    "state pair": (torch.randn(6, 5, 4), (torch.randn(1, 5, 3),) * 2, TypeError, "a tensor h_0 or None, got tuple"),
    "packed rows": (packed([3, 2], 6), None, ValueError, r"6 rows with batch_sizes \(3, 2\), 5 in all"),
    "packed order": (packed([2, 3], 5), None, ValueError, "must never increase"),
    "packed empty": (packed([2, 0], 2), None, ValueError, "be at least 1"),
    "packed width": (packed([3, 2], 5, 3), None, ValueError, r"\(rows, input_size\) = \(5, 4\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bad_input_is_shown_and_changes_nothing(case: str, mode: str) -> None:
    x, hx, kind, message = BAD[case]
    net = sn.NormGRU(4, 3)
    net(torch.randn(6, 5, 4))
    net.train(mode == "train")
    before = state_of(net)
    with pytest.raises(kind, match=message):
        net(x, hx)
    assert same_state(net, before)


def test_a_step_with_too_few_sequences_for_a_norm_is_refused_before_the_first_step() -> None:
    net = sn.NormRNN(4, 3, norm=sn.BatchNorm)
    x = pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    before = state_of(net)
    with pytest.raises(sn.DegenerateReferenceError):
        net(x)
    assert same_state(net, before)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: sn.NormRNN(0, 3), ValueError, "input_size is a whole number >= 1, got 0"),
        (lambda: sn.NormRNN(4, 2.5), ValueError, "hidden_size is a whole number >= 1, got 2.5"),
        (lambda: sn.NormRNN(4, 3, 0), ValueError, "num_layers is a whole number >= 1, got 0"),
        (lambda: sn.NormRNN(4, 3, 2, dropout=1.5), ValueError, "dropout is a probability"),
        (lambda: sn.NormGRU(4, 3, nonlinearity="selu"), ValueError, "nonlinearity is .* got 'selu'"),
        (lambda: sn.NormGRU(4, 3, backward_stats="last"), ValueError, "backward_stats is .* got 'last'"),
        (lambda: sn.NormGRU(4, 3, norm=sn.StreamingNorm(3)), TypeError, "by what makes one of c features"),
        (lambda: sn.NormGRU(4, 3, norm=lambda c: None), TypeError, "by what makes one of c features"),
    ],
)
def test_wrong_settings_are_shown(make: Callable[[], nn.Module], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("hx", [torch.randn(5, 3), (torch.randn(5, 3),), (torch.randn(5, 3), None)])
def test_an_lstm_wants_a_pair(hx: Any) -> None:
    with pytest.raises(TypeError, match=r"a tuple \(h, c\) of tensors"):
        sn.NormLSTMCell(4, 3)(torch.randn(5, 4), hx)
    with pytest.raises(TypeError, match=r"a tuple \(h_0, c_0\) of tensors"):
        sn.NormLSTM(4, 3)(torch.randn(6, 5, 4), hx)
