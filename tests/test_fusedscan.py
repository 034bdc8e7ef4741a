"""The compiled passes over time against the loop: output, every gradient and all state, in the order of arrival."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import rounding
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import fusedscan
from streamnorm.kernels import library, using

if library.library() is None:
    pytest.skip("there are no compiled kernels", allow_module_level=True)

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "mixed": lambda c: sn.StreamingNorm(c, alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1)),
    "onepass": lambda c: sn.StreamingNorm(c, alpha=(1, 0), beta=(1, 0, 0), kappa=(0.9, 0.1, 0.9, 0.1)),
    "l1": lambda c: sn.StreamingNorm(c, p=1, center="zero"),
    "without gain": lambda c: sn.StreamingNorm(c, affine=False),
    "batch": sn.BatchNorm,
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of time steps was a compiled one."""
    seen: list[bool] = []
    run = fusedscan.run

    def watched(cell: Any, data: Tensor, steps: int, h0: Tensor, inputs: Any = None) -> Any:
        rows = run(cell, data, steps, h0, inputs)
        if rows is not None or inputs is not None:  # the last word
            seen.append(rows is not None)
        return rows

    monkeypatch.setattr(fusedscan, "run", watched)
    return seen


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


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_loop(net: Any, norm: str, nonlinearity: str, dtype: torch.dtype, taken: list[bool]) -> None:
    torch.manual_seed(1)
    H, n = 19, 6
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
        for model in (fast, slow):
            for layer in model.modules():
                if isinstance(layer, sn.Norm):
                    layer.fold()
    assert taken == ([True] * 4 + [False] * 4) * 3


@pytest.mark.parametrize("where", [0, 2])
def test_what_is_not_finite_is_left_to_the_loop(where: int, taken: list[bool]) -> None:
    torch.manual_seed(2)
    fast = sn.NormGRU(3, 4).double()
    slow = copy.deepcopy(fast)
    for step in range(3):
        x = torch.randn(5, 6, 3, dtype=torch.float64)
        if step == 1:
            x[where, 1, 2] = float("nan")
        fast(x)[0].sum().backward()
        with using("eager"):
            slow(x)[0].sum().backward()
    assert taken == [True, False, False, False, True, False]
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    ("H", "n", "threads"), [(130, 70, 1), (130, 70, 2), (130, 70, 3), (15, 4700, 7), (30, 1200, 5)]
)
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_units_shared_out_to_threads(net: Any, H: int, n: int, threads: int) -> None:
    """Products so large that threads take a range of the units each, or some of them none; in one call the gradient is
    not finite."""
    torch.manual_seed(3)
    T = 5 if n < 100 else 2
    fast = net(7, H, norm=NORMS["mixed"]).double()
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


@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_blocks_are_not_threads(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may have several blocks of the units or none, and another number of threads may go back."""
    monkeypatch.setattr(fusedscan, "BLOCK", 20)
    monkeypatch.setattr(fusedscan, "MANY", 1)
    torch.manual_seed(6)
    fast = net(5, 70).double()
    slow = copy.deepcopy(fast)
    before = torch.get_num_threads()
    for there, back in ((1, 3), (3, 1), (2, 7)):
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
    "none": {"norm": None, "norm_h": sn.StreamingNorm},
    "per sample": {"norm": sn.SampleNorm, "norm_h": sn.StreamingNorm},
    "of its own rules": {"norm": sn.BatchNorm, "norm_h": sn.StreamingNorm},
    "watched": {},
    "shared by the gates": {},
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("learns", [True, False])
def test_what_normalizes_the_input(which: str, learns: bool, taken: list[bool]) -> None:
    """Inside the pass or before it, and H2 sees a gradient only where something is to be learned from it."""
    torch.manual_seed(7)
    fast, calls = sn.NormGRU(5, 7, **INPUTS[which]).double(), []
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
        x, dy = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double()
        got = fast(x)[0]
        got.backward(dy)
        with using("eager"):
            want = slow(x)[0]
            want.backward(dy)
        torch.testing.assert_close(got, want)
        for model in (fast, slow):
            for norm in model.modules():
                if isinstance(norm, sn.Norm):
                    norm.fold()
    assert taken == [True, False] * 3
    assert len(calls) == (6 if which == "watched" else 0)
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("bad", [None, 0, 3])
@pytest.mark.parametrize("norm", ["mixed", "l1", "batch"])
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
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
            for layer in model.modules():
                if isinstance(layer, sn.Norm):
                    layer.fold()
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name, equal_nan=True)
    runs = 4  # of 6, 5, 3 and 2 sequences
    assert len(taken) == 3 * 2 * 2 * runs
    assert taken[: 2 * runs] == [True] * 2 * runs
    assert [norm._calls.unfolded for norm in fast.modules() if isinstance(norm, sn.Norm)] == [0] * (
        4 * len(fast.cells["l0"].gates)
    )


def test_a_sequence_is_one_call_whatever_its_lengths() -> None:
    """For the question whether a layer was forgotten."""
    x = nn.utils.rnn.pack_sequence([torch.randn(k, 5) for k in (9, 5, 2)])
    for backend in ("cpu", "eager"):
        for norms in ({}, {"norm": sn.SampleNorm, "norm_h": sn.StreamingNorm}):
            net = sn.NormGRU(5, 7, **norms)
            with using(backend):
                net(x)
                net(x)
            unfolded = {norm._calls.unfolded for norm in net.modules() if isinstance(norm, sn.Norm) and norm.H1}
            assert unfolded == {2}


def compare(fast: nn.Module, slow: nn.Module, x: Tensor, *dys: Tensor) -> None:
    """Forward and back in compiled code and in the loop, once for every gradient: everything is the same."""
    for dy in dys:
        got = fast(x)[0]
        got.backward(dy)
        with using("eager"):
            want = slow(x)[0]
            want.backward(dy)
        torch.testing.assert_close(got, want)
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, equal_nan=True)


class Narrow(nn.Module):
    """A norm of somebody's own, which computes in float32."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float())

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return self  # stays float32 in a network of another dtype


class OneForAll(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Doubled(sn.StreamingNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [Narrow, OneForAll, Doubled])
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_norms_of_ones_own(net: Any, norm: Any) -> None:
    torch.manual_seed(8)
    fast = net(5, 7, norm=norm, norm_h=sn.StreamingNorm).double()
    compare(fast, copy.deepcopy(fast), torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double())


@pytest.mark.parametrize("where", [("norm_hh", "norm_hh"), ("norm_hh", "norm_ih")])
def test_norms_that_share_a_memory(where: tuple[str, str]) -> None:
    torch.manual_seed(9)
    fast = sn.NormGRU(5, 7).double()
    one, other = getattr(fast.cells["l0"], where[0])["r"], getattr(fast.cells["l0"], where[1])["z"]
    other.H1, other.H2 = one.H1, one.H2
    compare(fast, copy.deepcopy(fast), torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double())


@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_what_a_relu_stops_may_be_infinite(net: Any) -> None:
    torch.manual_seed(10)
    fast = net(5, 7, nonlinearity="relu").double()
    slow, x, dy = copy.deepcopy(fast), torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double()
    compare(fast, slow, x, dy)
    with torch.no_grad():
        stopped = copy.deepcopy(fast)(x)[0] == 0
    assert stopped.any()
    if net is sn.NormRNN:  # a unit of a GRU at 0 has a past that is not
        dy = dy.masked_fill(stopped, float("inf"))
        compare(fast, slow, x, dy)
        assert all(norm.H2.skipped == 0 for norm in fast.modules() if isinstance(norm, sn.Norm))


def test_a_gradient_with_a_negative_bit() -> None:
    torch.manual_seed(11)
    fast = sn.NormGRU(5, 7).double()
    x, dy = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double()
    compare(fast, copy.deepcopy(fast), x, torch._neg_view(dy))


def test_what_is_saved_may_be_kept_otherwise() -> None:
    def run() -> list[Tensor | None]:
        torch.manual_seed(12)
        net, x = sn.NormGRU(5, 7).double(), torch.randn(4, 6, 5).double()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            y = net(x)[0]
        y.backward(x.sum(2, keepdim=True).expand_as(y))
        return [parameter.grad for parameter in net.parameters()]

    def pack(t: Tensor) -> Tensor:
        return t.float() if t.ndim == 1 and t.numel() > 7 else t.t().contiguous().t() if t.ndim == 2 else t.clone()

    got = run()
    with using("eager"):
        want = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_state_may_be_carried_in_place() -> None:
    """A pass keeps what it starts from; the loop would refuse to go back."""

    def run(keep: bool) -> Tensor:
        torch.manual_seed(4)
        net, h = sn.NormRNN(4, 3).double(), torch.zeros(1, 8, 3).double()
        h.copy_(net(torch.randn(5, 8, 4).double(), h)[1].detach())
        output, last = net(torch.randn(5, 8, 4).double(), h.clone() if keep else h)
        h.copy_(last.detach())
        output.relu_().sum().backward()
        grad = net.cells["l0"].weight_hh.grad
        assert grad is not None
        return grad

    fast = run(keep=False)
    with using("eager"):
        torch.testing.assert_close(fast, run(keep=True))


def test_what_a_relu_is_given_that_is_no_number_stays() -> None:
    """A NaN that a ReLU would turn into 0 is left to the loop."""
    net = sn.NormRNN(4, 3, nonlinearity="relu", norm=None, norm_h=sn.StreamingNorm).double()
    slow = copy.deepcopy(net)
    x = torch.randn(5, 8, 4).double()
    x[2, 0, 0] = float("nan")
    with torch.no_grad():
        got = net(x)[0]
        with using("eager"):
            want = slow(x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()
    for a, b in zip(net.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_gains_of_another_dtype() -> None:
    def run() -> Tensor:
        torch.manual_seed(5)
        net = sn.NormRNN(4, 3, norm=sn.BatchNorm)
        nn.init.uniform_(net.cells["l0"].norm_hh["h"].affine.bfloat16().weight)
        return net(torch.randn(5, 8, 4))[0].detach()

    fast = run()
    with using("eager"):
        torch.testing.assert_close(fast, run())


def test_a_frozen_matrix_from_a_given_start_is_left_to_the_loop(taken: list[bool]) -> None:
    """Nobody asks for a gradient at the first step then."""
    net = sn.NormRNN(4, 3)
    net.cells["l0"].weight_hh.requires_grad_(False)
    net(torch.randn(5, 8, 4))[0].sum().backward()
    net(torch.randn(5, 8, 4), torch.zeros(1, 8, 3, requires_grad=True))[0].sum().backward()
    assert taken == [False, True]
    assert net.cells["l0"].norm_hh["h"].H2.seen == 4 + 5


def test_gradients_that_are_not_finite_stay_out_of_h2() -> None:
    net = sn.NormRNN(3, 4)
    net(torch.randn(5, 6, 3))[0].sum().backward()
    before = copy.deepcopy(net)
    output, _ = net(torch.randn(5, 6, 3))
    dy = torch.ones_like(output)
    dy[-1, 0, 0] = float("inf")
    output.backward(dy)
    H2, was = net.cells["l0"].norm_hh["h"].H2, before.cells["l0"].norm_hh["h"].H2
    assert H2.skipped == was.skipped + 5
    assert all(torch.equal(H2.state()[name], value) for name, value in was.state().items())


def test_testing_and_strangers_are_left_to_the_loop(taken: list[bool]) -> None:
    x = torch.randn(4, 3, 5)
    net = sn.NormGRU(5, 7)
    net(x)
    net.eval()(x)
    sn.NormGRU(5, 7, norm=sn.SampleNorm)(x)
    sn.NormGRU(5, 7, norm=sn.TimeSpecific(sn.BatchNorm))(x)
    sn.NormGRU(5, 7, norm_h=None)(x)
    hooked = sn.NormGRU(5, 7)
    hooked.cells["l0"].norm_hh["z"].register_forward_hook(lambda *_: None)
    hooked(x)
    sn.NormGRU(5, 7, backward_stats="latest")(x)
    sn.NormLSTM(5, 7)(x)
    assert taken == [True] + [False] * 7


def test_frozen_parts_get_no_gradient() -> None:
    net = sn.NormGRU(5, 7)
    net.cells["l0"].weight_hh.requires_grad_(False)
    net(torch.randn(4, 3, 5))[0].sum().backward()
    assert net.cells["l0"].weight_hh.grad is None
    assert net.cells["l0"].weight_ih.grad is not None


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    output, _ = sn.NormGRU(5, 7)(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("H", [100, 130])
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_a_pass_does_not_depend_on_the_number_of_threads(net: Any, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit's sums have one order, whoever takes them, in however many blocks."""
    torch.manual_seed(3)
    layer, x = net(7, H, norm=NORMS["mixed"]), torch.randn(6, 70, 7)
    before, made = torch.get_num_threads(), []
    monkeypatch.setattr(fusedscan, "BLOCK", 33)
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
