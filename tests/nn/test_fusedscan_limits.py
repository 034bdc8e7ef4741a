"""What the compiled passes over time leave to the loop, and what they do with odd and broken input."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from passes import compare, fold
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.ops import library
from streamnorm.ops.backends import using

if library.library() is None:
    pytest.skip("there are no compiled kernels", allow_module_level=True)


PAPER = functools.partial(sn.StreamingNorm, alpha=(0.7, 0.3))
RULES = pytest.mark.parametrize("norm", [PAPER, sn.StreamingNorm], ids=["paper", "evidence"])


def begun(net: Any, x: Tensor) -> Any:
    """After the first call, which evidence leaves to the loop: it pools all features."""
    net(x)[0].sum().backward()
    net.zero_grad()
    fold(net)
    return net


@pytest.mark.parametrize("where", [0, 2])
@RULES
def test_what_is_not_finite_is_left_to_the_loop(norm: Any, where: int, taken: list[bool]) -> None:
    torch.manual_seed(2)
    fast = sn.NormGRU(3, 4, norm=norm).double()
    slow = copy.deepcopy(fast)
    for step in range(4):
        x = torch.randn(5, 6, 3, dtype=torch.float64)
        if step == 2:
            x[where, 1, 2] = float("nan")
        fast(x)[0].sum().backward()
        with using("eager"):
            slow(x)[0].sum().backward()
    assert taken == [norm is PAPER, False, True, False, False, False, True, False]
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, msg=name)


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


@pytest.mark.parametrize("own", [Narrow, OneForAll, Doubled])
@RULES
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_norms_of_ones_own(net: Any, norm: Any, own: Any) -> None:
    torch.manual_seed(8)
    fast = net(5, 7, norm=own, norm_h=norm).double()
    compare(fast, copy.deepcopy(fast), torch.randn(4, 6, 5).double(), *torch.randn(2, 4, 6, 7).double())


@pytest.mark.parametrize("where", [("norm_hh", "norm_hh"), ("norm_hh", "norm_ih")])
@RULES
def test_norms_that_share_a_memory(norm: Any, where: tuple[str, str]) -> None:
    torch.manual_seed(9)
    fast = sn.NormGRU(5, 7, norm=norm).double()
    one, other = getattr(fast.cells["l0"], where[0])["r"], getattr(fast.cells["l0"], where[1])["z"]
    other.H1, other.H2 = one.H1, one.H2
    compare(fast, copy.deepcopy(fast), torch.randn(4, 6, 5).double(), *torch.randn(2, 4, 6, 7).double())


@RULES
@pytest.mark.parametrize("net", [sn.NormRNN, sn.NormGRU])
def test_what_a_relu_stops_may_be_infinite(net: Any, norm: Any) -> None:
    torch.manual_seed(10)
    x, dy = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double()
    fast = begun(net(5, 7, nonlinearity="relu", norm=norm).double(), x)
    slow = copy.deepcopy(fast)
    compare(fast, slow, x, dy)
    with torch.no_grad():
        stopped = copy.deepcopy(fast)(x)[0] == 0
    assert stopped.any()
    if net is sn.NormRNN:  # a unit of a GRU at 0 has a past that is not
        dy = dy.masked_fill(stopped, float("inf"))
        compare(fast, slow, x, dy)
        assert all(norm.H2.skipped == 0 for norm in fast.modules() if isinstance(norm, sn.Norm))


@RULES
def test_a_gradient_with_a_negative_bit(norm: Any) -> None:
    torch.manual_seed(11)
    x, dy = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 7).double()
    fast = begun(sn.NormGRU(5, 7, norm=norm).double(), x)
    compare(fast, copy.deepcopy(fast), x, torch._neg_view(dy))


@RULES
def test_what_is_saved_may_be_kept_otherwise(norm: Any) -> None:
    def run() -> list[Tensor | None]:
        torch.manual_seed(12)
        x = torch.randn(4, 6, 5).double()
        net = begun(sn.NormGRU(5, 7, norm=norm).double(), x)
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


@RULES
def test_the_state_may_be_carried_in_place(norm: Any) -> None:
    """A pass keeps what it starts from; the loop would refuse to go back."""

    def run(keep: bool) -> Tensor:
        torch.manual_seed(4)
        net, h = sn.NormRNN(4, 3, norm=norm).double(), torch.zeros(1, 8, 3).double()
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


@RULES
def test_what_a_relu_is_given_that_is_no_number_stays(norm: Any) -> None:
    """A NaN that a ReLU would turn into 0 is left to the loop."""
    net = sn.NormRNN(4, 3, nonlinearity="relu", norm=None, norm_h=norm).double()
    begun(net, torch.randn(5, 8, 4).double())
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


@RULES
def test_a_frozen_matrix_from_a_given_start_is_left_to_the_loop(norm: Any, taken: list[bool]) -> None:
    """Nobody asks for a gradient at the first step then."""
    net = begun(sn.NormRNN(4, 3, norm=norm), torch.randn(5, 8, 4))
    net.cells["l0"].weight_hh.requires_grad_(False)
    net(torch.randn(5, 8, 4))[0].sum().backward()
    net(torch.randn(5, 8, 4), torch.zeros(1, 8, 3, requires_grad=True))[0].sum().backward()
    assert taken == [norm is PAPER, False, True]
    assert net.cells["l0"].norm_hh["h"].H2.seen == 5 + 4 + 5


@RULES
def test_gradients_that_are_not_finite_stay_out_of_h2(norm: Any) -> None:
    net = sn.NormRNN(3, 4, norm=norm)
    net(torch.randn(5, 6, 3))[0].sum().backward()
    before = copy.deepcopy(net)
    output, _ = net(torch.randn(5, 6, 3))
    dy = torch.ones_like(output)
    dy[-1, 0, 0] = float("inf")
    output.backward(dy)
    H2, was = net.cells["l0"].norm_hh["h"].H2, before.cells["l0"].norm_hh["h"].H2
    assert H2.skipped == was.skipped + 5
    assert all(torch.equal(H2.state()[name], value) for name, value in was.state().items())


@RULES
def test_a_matrix_that_lies_otherwise_is_left_to_the_loop(norm: Any, taken: list[bool]) -> None:
    fast = begun(sn.NormRNN(3, 4, norm=norm).double(), torch.randn(5, 6, 3).double())
    matrix = fast.cells["l0"].weight_hh
    matrix.data = matrix.data.t()
    taken.clear()
    compare(fast, copy.deepcopy(fast), torch.randn(5, 6, 3).double(), torch.randn(5, 6, 4).double())
    assert taken == [False, False]


@RULES
def test_a_memory_that_was_moved_on_the_way_is_refused(norm: Any) -> None:
    net = begun(sn.NormRNN(3, 4, norm=norm), torch.randn(5, 6, 3))
    output, _ = net(torch.randn(5, 6, 3))
    before = copy.deepcopy(net.state_dict())
    H2 = net.cells["l0"].norm_hh["h"].H2.double()
    with pytest.raises(RuntimeError, match="were moved between"):
        output.sum().backward()
    H2.float()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@RULES
def test_testing_and_strangers_are_left_to_the_loop(norm: Any, taken: list[bool]) -> None:
    x = torch.randn(4, 3, 5)
    net = begun(sn.NormGRU(5, 7, norm=norm), x)
    net(x)
    net.eval()(x)
    sn.NormGRU(5, 7, norm=sn.SampleNorm)(x)
    sn.NormGRU(5, 7, norm=sn.TimeSpecific(sn.BatchNorm))(x)
    begun(sn.NormGRU(5, 7, norm=norm, norm_h=None), x)(x)
    hooked = begun(sn.NormGRU(5, 7, norm=norm), x)
    hooked.cells["l0"].norm_hh["z"].register_forward_hook(lambda *_: None)
    hooked(x)
    begun(sn.NormGRU(5, 7, norm=norm, backward_stats="latest"), x)(x)
    begun(sn.NormLSTM(5, 7, norm=norm), x)(x)
    paper = norm is PAPER  # which may begin in compiled code
    assert taken == [paper, True, *[False] * 5, paper, *[False] * 5]


@RULES
def test_frozen_parts_get_no_gradient(norm: Any) -> None:
    net = begun(sn.NormGRU(5, 7, norm=norm), torch.randn(4, 3, 5))
    net.cells["l0"].weight_hh.requires_grad_(False)
    net(torch.randn(4, 3, 5))[0].sum().backward()
    assert net.cells["l0"].weight_hh.grad is None
    assert net.cells["l0"].weight_ih.grad is not None


@RULES
def test_a_second_derivative_is_refused(norm: Any) -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    output, _ = begun(sn.NormGRU(5, 7, norm=norm), torch.randn(4, 3, 5))(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
