"""One stream through time: a layer is a loop over its cell, forward, backward and in the state it leaves."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from close import assert_close
from sequences import NETS, NORMS, STEPS, flat, initial, same_state, sequences, state_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

import streamnorm as sn
from streamnorm.nn.norm import norms

EVERY = {"evidence": sn.StreamingNorm, **NORMS}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["evidence", "streaming"])
def test_one_state_for_all_time_steps(name: str, norm: str) -> None:
    net = NETS[name](4, 3, 2, bidirectional=True, norm=EVERY[norm])
    output, _ = net(torch.randn(7, 5, 4))
    output.sum().backward()
    for one in norms(net):
        assert one.H1.seen == one.H2.seen == 7
        if norm == "evidence":  # it counts the 5 samples of each
            assert one.H1.count == one.H2.held == 7 * 5
        else:
            assert one.H1.count == one.H2.count == 7
    net.eval()
    before = state_of(net)
    assert net(torch.randn(40, 5, 4))[0].isfinite().all()  # a length that training has not seen
    assert same_state(net, before)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", EVERY)
@pytest.mark.parametrize("lengths", [(6,) * 5, (6, 6, 3, 2)], ids=["equal", "packed"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_layer_is_a_loop_over_its_cell(name: str, norm: str, lengths: tuple[int, ...], backwards: bool) -> None:
    """The projection of all time steps at once with its norm changes nothing, neither going back nor in the state.
    Backwards, each sequence is read from its own end."""
    net = NETS[name](4, 3, norm=EVERY[norm], bidirectional=backwards).double()
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
        state, outputs = start, [[] for _ in lengths]
        for k in range(6):
            n = sum(k < T for T in lengths)
            x = torch.stack([part[T - 1 - k if backwards else k] for part, T in zip(copies[:n], lengths, strict=False)])
            now = tuple(part[:n] for part in state)
            new = flat(theirs(x, now if len(now) > 1 else now[0], k))
            state = tuple(torch.cat([a, b[n:]]) for a, b in zip(new, state, strict=True))
            for one, h in zip(outputs, new[0], strict=False):
                one.insert(0 if backwards else k, h)
        outputs = pad_sequence([torch.stack(one) for one in outputs])
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


@pytest.mark.parametrize("norm", ["batch", "streaming", "evidence", "time-specific"])
def test_testing_looks_at_each_sequence_by_itself(norm: str) -> None:
    net = sn.NormGRU(4, 3, norm=EVERY[norm]).double()
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
