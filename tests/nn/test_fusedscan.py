"""The compiled passes over time against the loop: output, every gradient and all state, in the order of arrival."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import rounding
from passes import compare, fold
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.nn.recurrent import fused
from streamnorm.ops import library
from streamnorm.ops.backends import using

if library.library() is None:
    pytest.skip("there are no compiled kernels", allow_module_level=True)

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "mixed": lambda c: sn.StreamingNorm(c, alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1)),
    "onepass": lambda c: sn.StreamingNorm(c, alpha=(1, 0), beta=(1, 0, 0), kappa=(0.9, 0.1, 0.9, 0.1)),
    "l1": lambda c: sn.StreamingNorm(c, p=1, center="zero", alpha=(0.7, 0.3)),
    "without gain": lambda c: sn.StreamingNorm(c, affine=False, alpha=(0.7, 0.3)),
    "batch": sn.BatchNorm,
    "evidence": lambda c: sn.StreamingNorm(c, memory=11),
    "evidence l1": lambda c: sn.StreamingNorm(c, p=1, center="zero"),
    "evidence without gain": lambda c: sn.StreamingNorm(c, affine=False),
}


def pools(norm: str) -> bool:
    """Whether the first call takes all features together and is left to the loop."""
    return norm.startswith("evidence")


def train(model: nn.Module, x: Tensor, h0: Tensor, dy: Tensor, dh: Tensor) -> dict[str, Tensor]:
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    output, h = model(x, h0)
    torch.autograd.backward([output, h], [dy, dh])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "output": output.detach(),
        "h": h.detach(),
        "dx": x.grad,
        "dh0": h0.grad,
        **grads,
        **dict(model.named_buffers()),
    }


def follow(net: Any, norm: str, dtype: torch.dtype, H: int = 19, nonlinearity: str = "tanh") -> None:
    """Three weight updates of a net and of the loop in float64."""
    torch.manual_seed(1)
    n = 6
    fast = net(5, H, num_layers=2, bidirectional=True, nonlinearity=nonlinearity, norm=NORMS[norm]).to(dtype)
    slow = copy.deepcopy(fast).double()
    for update, T in enumerate((4, 1, 7)):
        x, h0 = torch.randn(T, n, 5, dtype=dtype), torch.randn(4, n, H, dtype=dtype)
        dy, dh = torch.randn(T, n, 2 * H, dtype=dtype), torch.randn(4, n, H, dtype=dtype)
        got = train(fast, x, h0, dy, dh)
        with using("eager"):
            want = train(slow, x.double(), h0.double(), dy.double(), dh.double())
        assert got.keys() == want.keys()
        for name, value in got.items():
            scale = max(want[name].abs().max().item(), 1.0)
            # Two layers, T steps and 6 sequences, each of a few dozen operations whose errors go on through time.
            bound = rounding(dtype, 64 * T, scale)
            worst = (value.double() - want[name]).abs().max().item()
            assert worst <= bound, f"update {update} {name}: off by {worst:.1e}, rounding allows {bound:.1e}"
        fold(fast, slow)


KINDS = itertools.product((sn.NormRNN, sn.NormGRU), ("tanh", "relu"), NORMS)


@pytest.mark.parametrize(
    ("net", "nonlinearity", "norm", "dtype"),
    [(*kind, (torch.float64, torch.float32)[(i + i // 8 + i // 16) % 2]) for i, kind in enumerate(KINDS)],
)
def test_equals_the_loop(net: Any, norm: str, nonlinearity: str, dtype: torch.dtype, taken: list[bool]) -> None:
    follow(net, norm, dtype, nonlinearity=nonlinearity)
    assert taken == [not pools(norm)] * 4 + [False] * 4 + ([True] * 4 + [False] * 4) * 2


@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_instruction_set(isa: str, net: Any, dtype: torch.dtype, taken: list[bool]) -> None:
    """In widths that are no multiple of a vector's."""
    for H in (1, 7, 37):
        follow(net, "mixed", dtype, H)
    assert taken == ([True] * 4 + [False] * 4) * 9


@pytest.mark.parametrize(
    ("norm", "H", "n", "threads"),
    [
        *(("mixed", *size) for size in ((130, 70, 1), (130, 70, 2), (130, 70, 3), (15, 4700, 7), (30, 1200, 5))),
        ("evidence", 130, 70, 3),
        ("evidence", 30, 1200, 5),
    ],
)
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_units_shared_out_to_threads(net: Any, norm: str, H: int, n: int, threads: int) -> None:
    """Products so large that threads take a range of the units each, or some of them none; in one call the gradient is
    not finite."""
    torch.manual_seed(3)
    T = 5 if n < 100 else 2
    fast = net(7, H, norm=NORMS[norm]).double()
    slow = copy.deepcopy(fast)
    before = torch.get_num_threads()
    for call in range(3):
        x, h0 = torch.randn(T, n, 7).double(), torch.randn(1, n, H).double()
        dy, dh = torch.randn(T, n, H).double(), torch.randn(1, n, H).double()
        if call == 1:
            dy[-2, 0, H - 1] = float("inf")
        try:
            torch.set_num_threads(threads)
            got = train(fast, x, h0, dy, dh)
        finally:
            torch.set_num_threads(before)
        with using("eager"):
            want = train(slow, x, h0, dy, dh)
        for name, value in got.items():
            finite = want[name].isfinite()
            assert torch.equal(finite, value.isfinite()), f"call {call} {name}: not finite elsewhere than in the loop"
            scale = max(want[name][finite].abs().max().item(), 1.0) if finite.any() else 1.0
            bound = rounding(torch.float64, n * H, scale)
            assert (value - want[name])[finite].abs().max() <= bound if finite.any() else True, f"call {call} {name}"


@pytest.mark.parametrize("norm", ["mixed", "evidence"])
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_blocks_are_not_threads(net: Any, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may have several blocks of the units or none, and another number of threads may go back."""
    monkeypatch.setattr(fused, "BLOCK", 20)
    monkeypatch.setattr(fused, "MANY", 1)
    torch.manual_seed(6)
    fast = net(5, 70, norm=NORMS[norm]).double()
    slow = copy.deepcopy(fast)
    before = torch.get_num_threads()
    for there, back in ((1, 1), (1, 3), (3, 1), (2, 7)):
        x = torch.randn(9, 3, 5).double()
        try:
            torch.set_num_threads(there)
            y = fast(x)[0]
            torch.set_num_threads(back)
            y.backward(x.sum(2, keepdim=True).expand_as(y))
        finally:
            torch.set_num_threads(before)
        with using("eager"):
            slow(x)[0].backward(x.sum(2, keepdim=True).expand_as(y))
    for (name, a), b in zip(fast.state_dict().items(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


INPUTS: dict[str, dict[str, Any]] = {
    "none": {"norm": None},
    "per sample": {"norm": sn.SampleNorm},
    "of its own rules": {"norm": sn.BatchNorm},
    "watched": {},
    "shared by the gates": {},
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("norm", ["mixed", "evidence"])
@pytest.mark.parametrize("learns", [True, False])
def test_what_normalizes_the_input(which: str, norm: str, learns: bool, taken: list[bool]) -> None:
    """Inside the pass or before it, and H2 sees a gradient only where something is to be learned from it."""
    torch.manual_seed(7)
    fast, calls = sn.NormGRU(5, 7, **{"norm": NORMS[norm], "norm_h": NORMS[norm], **INPUTS[which]}).double(), []
    cell = fast.cells["l0"]
    if which == "shared by the gates":
        cell.norm_ih["z"] = cell.norm_ih["r"]
    if which == "watched":
        cell.norm_ih["z"].register_forward_hook(lambda *_: calls.append(1))
    cell.weight_ih.requires_grad_(learns)
    if cell.bias_ih is not None:
        cell.bias_ih.requires_grad_(learns)
    slow = copy.deepcopy(fast)
    for _ in range(3):
        compare(fast, slow, torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double())
    assert taken == [not pools(norm), False] + [True, False] * 2
    assert len(calls) == (6 if which == "watched" else 0)


@pytest.mark.parametrize(
    ("net", "norm", "bad"),
    [
        (net, norm, bad)
        for k, net in enumerate((sn.NormRNN, sn.NormGRU))
        for i, norm in enumerate(("mixed", "l1", "batch", "evidence"))
        for bad in (None, (0, 3)[(i // 2 + i + k) % 2])
    ],
)
def test_sequences_of_many_lengths(net: Any, norm: str, bad: int | None, taken: list[bool]) -> None:
    """A compiled pass for all time steps of one size, and the loop for those where something is not finite."""
    torch.manual_seed(13)
    fast = net(5, 7, bidirectional=True, norm=NORMS[norm]).double()
    slow = copy.deepcopy(fast)
    lengths = [9, 9, 5, 4, 4, 2]
    for update in range(3):
        x, h0 = torch.randn(9, 6, 5).double(), torch.randn(2, 6, 7).double()
        if bad is not None and update == 1:
            x[bad, 0, 0] = float("nan")
        dy, dh = torch.randn(9, 6, 14).double(), torch.randn(2, 6, 7).double()
        made = []
        for model, backend in ((fast, "cpu"), (slow, "eager")):
            start, given = h0.clone().requires_grad_(), x.clone().requires_grad_()
            with using(backend):
                y, h = model(nn.utils.rnn.pack_padded_sequence(given, lengths), start)
                y, _ = nn.utils.rnn.pad_packed_sequence(y)
                torch.autograd.backward([y, h], [dy, dh])
            made.append([y.detach(), h.detach(), given.grad, start.grad])
        fold(fast, slow)
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name, equal_nan=True)
    runs = 4  # of 6, 5, 3 and 2 sequences
    assert len(taken) == 3 * 2 * 2 * runs
    first = taken[: 2 * runs]
    assert first[0] == first[runs] == (not pools(norm))
    assert all(first[1:runs] + first[runs + 1 :])
    assert [norm.follows.unfolded for norm in fast.modules() if isinstance(norm, sn.Norm)] == [0] * (
        4 * len(fast.cells["l0"].gates)
    )


def test_a_sequence_is_one_call_whatever_its_lengths() -> None:
    """For the question whether a layer was forgotten."""
    x = nn.utils.rnn.pack_sequence([torch.randn(k, 5) for k in (9, 5, 2)])
    for backend in ("cpu", "eager"):
        for hidden, alone in itertools.product((NORMS["mixed"], sn.StreamingNorm), (False, True)):
            net = sn.NormGRU(5, 7, norm=sn.SampleNorm if alone else hidden, norm_h=hidden)
            with using(backend):
                net(x)
                net(x)
            unfolded = {norm.follows.unfolded for norm in net.modules() if isinstance(norm, sn.Norm) and norm.H1}
            assert unfolded == {2}


@pytest.mark.parametrize("H", [100, 130])
@pytest.mark.parametrize("norm", ["mixed", "evidence"])
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_a_pass_does_not_depend_on_the_number_of_threads(
    net: Any, norm: str, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit's sums have one order, whoever takes them, in however many blocks."""
    torch.manual_seed(3)
    layer, x = net(7, H, norm=NORMS[norm]), torch.randn(6, 70, 7)
    if pools(norm):  # a pass before it, which is left to the loop
        layer(x)[0].sum().backward()
    before, made = torch.get_num_threads(), []
    monkeypatch.setattr(fused, "BLOCK", 33)
    for threads in (1, 2, 3):
        copied = copy.deepcopy(layer)
        torch.set_num_threads(threads)
        try:
            y, _ = copied(x)
            y.backward(torch.ones_like(y))
        finally:
            torch.set_num_threads(before)
        made.append([y, *copied.buffers(), *(parameter.grad for parameter in copied.parameters())])
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))
