"""Recurrent layers take, return and compute what torch's do; their parameters, options and words are torch's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close
from sequences import NETS, STEPS, flat, identity, initial, sequences
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import streamnorm as sn
from streamnorm.nn.norm import norms


def copy_weights(ours: Any, theirs: nn.Module) -> None:
    for key, cell in ours.cells.items():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if getattr(cell, name) is not None:
                getattr(cell, name).data.copy_(getattr(theirs, f"{name}_{key}"))


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
