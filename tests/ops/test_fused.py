"""Compiled calls read what they were told: what changes between two calls is noticed, or left to torch operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from close import assert_close, rounding
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.ops import functional
from streamnorm.ops.backends import may_use, using

BACKENDS = pytest.mark.parametrize("backend", [None, "eager"])
RULES = pytest.mark.parametrize("rules", [{}, {"alpha": (0.7, 0.3)}], ids=["default", "the paper's"])


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``run`` makes with the fastest kernels, and in torch operations."""
    made = []
    for backend in (None, "eager"):
        with using(backend):
            torch.manual_seed(3)
            made.append(run())
    return made[0], made[1]


def begun(c: int, rules: dict[str, Any]) -> sn.StreamingNorm:
    """A layer behind its first call, which a memory in samples leaves to torch operations, and a second."""
    layer = sn.StreamingNorm(c, **rules)
    for _ in range(2):
        layer(torch.randn(8, c))
    return layer


@RULES
@BACKENDS
def test_an_eval_call_may_go_back_after_training_went_on(backend: str | None, rules: dict[str, Any]) -> None:
    x = torch.randn(8, 3, requires_grad=True)
    with using(backend):
        layer = begun(3, rules)
        layer(torch.randn(8, 3))
        sigma = layer.H1.estimate[1].clone()
        y = layer.eval()(x)
        layer.train()(5 * torch.randn(8, 3))
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (1 / sigma).expand(8, 3))


@RULES
def test_members_of_a_memory_may_be_replaced(rules: dict[str, Any]) -> None:
    def run() -> Tensor:
        layer = sn.StreamingNorm(6, **rules)
        layer(torch.randn(8, 6))
        layer.H1.long, layer.H1.short = torch.full((2, 6), 2.0), torch.ones(2, 6)
        layer(torch.randn(8, 6))
        return torch.cat([layer.H1.short, layer.H1.estimate])

    assert_close("H1", *both(run), terms=8, dtype=torch.float32)


@RULES
def test_members_of_another_size_are_never_written_past(rules: dict[str, Any]) -> None:
    layer = sn.StreamingNorm(6, **rules)
    layer(torch.randn(8, 6))
    with pytest.raises(ValueError, match=r"long is of shape \(2, 6\), got \(2, 3\)"):
        layer.H1.long = torch.zeros(2, 3)
    for name, buffer in layer.H1.named_buffers():
        setattr(layer.H1, name, buffer[..., :3].clone() if buffer.ndim > 1 else buffer[:2])
    with pytest.raises((RuntimeError, IndexError)):
        layer(torch.randn(8, 6))


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counters_of_another_dtype_are_no_counters(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    def run() -> Tensor:
        layer = sn.StreamingNorm(4, **rules)
        layer(torch.randn(8, 4))
        layer.type(dtype)
        for _ in range(2):
            layer(torch.randn(8, 4, dtype=dtype))
        return torch.cat([layer.H1.short.flatten(), layer.H1.count.reshape(1)])

    assert_close("H1", *both(run), terms=8, dtype=torch.float32)


@RULES
def test_a_definition_rule_or_memory_may_be_replaced(rules: dict[str, Any]) -> None:
    def run() -> Tensor:
        layer, made = sn.StreamingNorm(4, **rules), []
        other = {"mix": (0.1, 0.9, 0.0)} if rules else {"memory": 3.0}
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda: setattr(layer, "definition", replace(layer.definition, moment=sn.Lp(2, "estimate", 100.0))),
            lambda: setattr(layer, "H1", sn.StreamingNorm(4, **rules).H1),
            lambda: setattr(layer.H1, "rule", replace(layer.H1.rule, **other)),
        ]
        for change in changes:
            change()
            for _ in range(2):  # what has just begun leaves the first call to torch operations
                made.append(layer(torch.randn(8, 4)))
                layer.fold()
        return torch.stack(made)

    assert_close("y", *both(run), terms=64)


@RULES
def test_saved_tensors_may_come_back_in_another_order(rules: dict[str, Any]) -> None:
    def run() -> Tensor:
        x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        layer = begun(3, rules)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy("C"), torch.from_numpy):
            y = layer(x)
        y.backward(torch.randn(4, 3, 5, 5))
        assert x.grad is not None
        return x.grad

    assert_close("dx", *both(run), terms=100)


@RULES
@pytest.mark.parametrize("kind", ["one value", "its own forward", "of bfloat16"])
def test_a_gain_and_bias_of_another_kind(kind: str, rules: dict[str, Any]) -> None:
    def run() -> Tensor:
        layer = begun(64, rules)
        assert layer.affine is not None
        if kind == "one value":
            layer.affine.weight = nn.Parameter(torch.full((1,), 2.0))
            layer.affine.bias = nn.Parameter(torch.ones(1))
        elif kind == "of bfloat16":
            nn.init.uniform_(layer.affine.bfloat16().weight)
        else:
            layer.affine.forward = lambda x: 3 * x  # type: ignore[method-assign]
        return layer(torch.randn(8, 64)).detach()

    assert_close("y", *both(run), terms=64)


@RULES
@BACKENDS
def test_a_gain_without_data_is_not_left_out(backend: str | None, rules: dict[str, Any]) -> None:
    layer = begun(3, rules)
    assert layer.affine is not None
    layer.affine.to("meta")
    with using(backend), pytest.raises(RuntimeError):
        layer(torch.randn(8, 3))


@RULES
@BACKENDS
def test_an_input_made_in_inference_mode(backend: str | None, rules: dict[str, Any]) -> None:
    with torch.inference_mode():
        x = torch.randn(8, 3)
    layer = sn.StreamingNorm(3, **rules)
    with using(backend):
        for _ in range(2):
            layer(x).sum().backward()
    assert layer.H1.seen == 2
    trust = 1 if rules else 8 / (8 + 4)  # by default gains learn with caution
    assert_close("dbias", layer.bias.grad, torch.full((3,), 2 * 8.0 * trust))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of make_dual
def test_a_forward_derivative_is_not_lost() -> None:
    """A layer without a memory has one; that of a layer with one is not defined, and is refused."""
    alone, streaming = sn.SampleNorm(4, affine=False), sn.StreamingNorm(4)
    x, along = torch.randn(3, 4), torch.randn(3, 4)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, along)
        y = forward_ad.unpack_dual(alone(dual))
        with pytest.raises(NotImplementedError):
            streaming(dual)
    step = 1e-3 * along
    assert_close("y", y.primal, alone(x), 64)
    assert (y.tangent - (alone(x + step) - alone(x - step)) / 2e-3).abs().max() <= 1e-3


@RULES
def test_a_refused_input_is_no_call_of_a_cycle(rules: dict[str, Any]) -> None:
    layer = begun(3, rules)
    with sn.vectorized(layer, 4):
        with pytest.raises(ValueError, match="expected 3 features"):
            sn.Norm.forward(layer, torch.randn(8, 5))
        sn.Norm.forward(layer, torch.randn(8, 3))
        with pytest.raises(ValueError, match="called twice"):
            sn.Norm.forward(layer, torch.randn(8, 3))


def test_threads_do_not_set_each_other_s_backend() -> None:
    """Two threads that are inside ``latest_statistics`` and ``using``, and leave in the order they came."""
    turn = Barrier(2, timeout=10)

    def visit(first: bool) -> None:
        if not first:
            turn.wait()
        with functional.latest_statistics():
            turn.wait() if first else None
            turn.wait()
        turn.wait()

    threads = [Thread(target=visit, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert may_use("cpu")
    assert not functional._latest.get()


def test_sums_of_many_short_rows_keep_their_digits() -> None:
    """Groups of features that lie together: rows of 2 values, 2^18 of them to a statistic, summed about a far value."""
    x = torch.rand(1, 4, 512, 512) + 1
    x[:, :, 0, 0] = 0  # what sums are taken about is no typical value
    layer = sn.Norm(4, sn.NormRef(2, "all", "batch"), sn.Lp(2, "batch", 0.0), sn.Batch(1.0))
    layer(x.contiguous(memory_format=torch.channels_last))
    want = x.double().reshape(2, -1).std(1, correction=0)
    # A lane sums 4,096 values in float32, the rest is added in float64.
    assert (layer.H1.estimate[1] - want).abs().max() <= rounding(torch.float32, 4096 // 16)


def test_one_feature_s_outlier_changes_no_other_feature_s_digits() -> None:
    """How features are dealt out to threads depends on their number; what they are computed from must not."""
    x = torch.randn(4000, 64)
    x[0, 0] = 50  # a first value about which nearly all of the second moment cancels
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            layer = sn.BatchNorm(64, affine=False)
            layer(x)
            seen.append(layer.H1.estimate.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@RULES
def test_the_latest_call_says_how_large_references_are(rules: dict[str, Any]) -> None:
    """Also a shape that was seen before: the warm-up asks."""
    layer = begun(3, rules)
    seen = []
    for n in (8, 2, 8):
        layer(torch.randn(n, 3))
        seen.append(layer.reference_size)
    assert seen == [8, 2, 8]
