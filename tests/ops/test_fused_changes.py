"""The second call of a layer takes the compiled call of the first: it must notice whatever changed between them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm.nn.affine import Affine
from streamnorm.ops import library
from streamnorm.ops.backends import using

pytestmark = pytest.mark.skipif(library.library() is None, reason="there are no compiled kernels")


RULES: dict[str, dict[str, Any]] = {"default": {}, "the paper's": {"beta": (0.5, 0.3, 0.2)}}
BOTH = pytest.mark.parametrize("rule", RULES)


def streaming(rule: str = "the paper's", c: int = 6) -> sn.StreamingNorm:
    layer = sn.StreamingNorm(c, **RULES[rule])
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return layer


def train(layer: sn.Norm, x: Tensor, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> list[Tensor]:
    """A call, forward and backward, and what it leaves."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with within():
        y = layer(x)
    y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype))
    assert x.grad is not None
    made = [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    layer.zero_grad()
    return [value.detach().clone() for value in (*made, *layer.buffers())]


def renewed(layer: sn.Norm) -> None:
    layer.affine = Affine(6)
    nn.init.constant_(layer.affine.weight, 3)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output if isinstance(module, Affine) else output


def replaced_rule(layer: sn.Norm) -> None:
    assert layer.H1 is not None
    other = {"memory": 3.0} if hasattr(layer.H1.rule, "memory") else {"mix": (0.1, 0.9, 0.0)}
    layer.H1.rule = replace(layer.H1.rule, **other)  # type: ignore[type-var]


def other_memory(layer: Any, name: str) -> None:
    rule = "the paper's" if isinstance(layer.policy, sn.Streaming) else "default"
    setattr(layer, name, getattr(streaming(rule), name))


class Twice(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: None,
    "a fold": lambda layer: layer.fold(),
    "the definition": lambda layer: setattr(
        layer, "definition", replace(layer.definition, moment=sn.Lp(2, "zero", 0.1))
    ),
    "the rule": replaced_rule,
    "H1": lambda layer: other_memory(layer, "H1"),
    "H2": lambda layer: other_memory(layer, "H2"),
    "a member": lambda layer: setattr(layer.H1, "short", torch.ones(2, 6)),
    "where a memory lies": lambda layer: layer.H1.tables.set_(torch.full((3, 2, 6), 0.5)),
    "the wide dtype": lambda layer: layer.H1.double(),
    "the layer after it": renewed,
    "no layer after it": lambda layer: setattr(layer, "affine", None),
    "the gain": lambda layer: setattr(layer.affine, "weight", nn.Parameter(torch.full((6,), 3.0))),
    "the gain's dtype": lambda layer: layer.affine.bfloat16(),
    "one gain for all": lambda layer: setattr(layer.affine, "weight", nn.Parameter(torch.full((1,), 3.0))),
    "a gain that is a view": lambda layer: setattr(layer.affine, "weight", nn.Parameter(torch.arange(12.0)[::2])),
    "a frozen gain": lambda layer: layer.affine.weight.requires_grad_(False),
    "a gain of another shape": lambda layer: setattr(layer.affine, "weight", nn.Parameter(torch.full((6, 1), 3.0))),
    "the class of the layer after it": lambda layer: setattr(layer.affine, "__class__", Twice),
    "a hook": lambda layer: layer.affine.register_forward_hook(doubled),
    "its own forward": lambda layer: setattr(layer.affine, "forward", lambda x: 3 * x),
    "the number of steps": lambda layer: setattr(layer, "steps", 4),
    "saved and loaded": lambda layer: layer.load_state_dict(
        {name: value + 1 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    ),
}


@BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_noticed(change: str, rule: str) -> None:
    made = []
    for backend in (None, "eager"):
        torch.manual_seed(1)
        layer, xs = streaming(rule), torch.randn(4, 8, 6)
        with using(backend):
            train(layer, xs[0])
            layer.fold()
            train(layer, xs[1])
            assert bool(layer._calls.fused and layer._calls.fused.latest) == (backend is None)
            CHANGES[change](layer)
            made.append([*train(layer, xs[2]), *train(layer, xs[3])])
    dtype = torch.bfloat16 if "gain's" in change else torch.float32
    for i, (got, want) in enumerate(zip(*made, strict=True)):
        assert_close(f"{change}, value {i}", got, want, terms=100, dtype=dtype)


def test_a_forward_of_its_own_comes_to_a_layer_that_is_called_apart() -> None:
    """A watched gain and bias is no part of the compiled call; what stands in its place knows nothing of caution."""
    layer, x = streaming("default"), torch.randn(8, 6)
    layer.affine.register_forward_hook(lambda module, args, output: None)
    twin = streaming("default")
    twin.load_state_dict(layer.state_dict())
    for _ in range(3):
        layer(x), twin(x)
    assert layer._calls.fused.latest is not None
    layer.affine.forward = lambda x: torch.full_like(x, 3.0)
    assert (layer(x) == 3).all()
    del layer.affine.forward
    layer.affine.__class__ = Twice
    twin(x)
    assert_close("y", layer(x), 2 * twin(x), terms=100)


@BOTH
def test_a_hook_on_all_modules_is_noticed(rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6)
    twin = streaming(rule)
    twin.load_state_dict(layer.state_dict())
    layer(x), layer(x)
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        after = layer(x)
    finally:
        handle.remove()
    assert layer.H1.seen == 3
    torch.testing.assert_close(after, 2 * [twin(x) for _ in range(3)][2])


@BOTH
@pytest.mark.parametrize(
    "kind",
    [
        *("a slice", "transposed", "expanded", "negated", "narrower", "wider", "not a number", "longer", "empty"),
        "a subclass",
    ],
)
def test_another_kind_of_input_is_noticed(kind: str, rule: str) -> None:
    def of(x: Tensor) -> Tensor:
        return {
            "a slice": lambda: torch.cat([x, x], 1)[:, ::2],
            "transposed": lambda: x.T.contiguous().T,
            "expanded": lambda: x[:1].expand(8, 6),
            "negated": lambda: torch._neg_view(x),
            "narrower": lambda: x.bfloat16(),
            "wider": lambda: x.double(),
            "not a number": lambda: x.masked_fill(x > 1, float("nan")),
            "longer": lambda: torch.cat([x, x]),
            "empty": lambda: x[:0],
            "a subclass": lambda: x.as_subclass(Plain),
        }[kind]()

    made = []
    for backend in (None, "eager"):
        torch.manual_seed(1)
        layer, xs = streaming(rule), torch.randn(4, 8, 6)
        with using(backend):
            train(layer, xs[0]), train(layer, xs[1])
            with torch.no_grad():
                y = layer(of(xs[2]))
            made.append([y.as_subclass(Tensor), *train(layer, xs[3])])
    for i, (got, want) in enumerate(zip(*made, strict=True)):
        dtype = torch.bfloat16 if kind == "narrower" and not i else torch.float32
        assert torch.equal(got.isfinite(), want.isfinite())
        assert_close(f"{kind}, value {i}", got.nan_to_num(), want.nan_to_num(), terms=100, dtype=dtype)


class Plain(Tensor):
    """A subclass that does nothing of its own."""


@BOTH
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(mode: str, rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6)
    layer(x), layer(x)
    with getattr(torch, mode)():
        y = layer(x)
        z = layer(torch.ones_like(x) + x)
    assert not y.requires_grad
    assert not z.requires_grad
    assert layer.H1.seen == 4


@BOTH
def test_eval_and_train_take_turns(rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6)
    for _ in range(3):
        layer.train()
        layer(x)
        layer.eval()
        seen = int(layer.H1.seen)
        layer(x)
        assert layer.H1.seen == seen


@BOTH
def test_checkpointing_computes_the_latest_call_again(rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6, requires_grad=True)
    plain = streaming(rule)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        want = train(plain, x.detach())
        y = checkpoint(layer, x, use_reentrant=False)
        y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape))
        assert_close("dx", x.grad, want[1], terms=100)
        x.grad = None
        layer.zero_grad()
    assert layer.H1.seen == layer.H2.seen == 3


@BOTH
def test_a_second_derivative_is_refused(rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="differentiated again"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@BOTH
def test_who_wants_no_gradient_of_the_input_leaves_h2_alone(rule: str) -> None:
    layer, x = streaming(rule), torch.randn(8, 6)
    for _ in range(3):
        layer(x).sum().backward()
    assert layer.H2.seen == 0
    trust = 8 / (8 + 4) if rule == "default" else 1
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 24.0 * trust))


@pytest.mark.parametrize("layer", [*map(streaming, RULES), sn.SampleNorm(6), sn.BatchNorm(6, affine=False)], ids=repr)
def test_nothing_is_kept_beyond_its_time(layer: sn.Norm) -> None:
    x, dy = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)

    def go(times: int) -> None:
        for _ in range(times):
            layer(x).backward(dy)
            layer.fold()
            x.grad = None
            layer.zero_grad()

    def counts() -> list[int]:
        while gc.collect():  # what these calls have left may take several rounds
            pass
        mine = [x, dy, *layer.parameters(), *layer.buffers(), layer.H1, layer.affine]
        return [sys.getrefcount(o) for o in (*mine, torch.empty_like, torch.float32, torch.int64, "weight", Tensor)]

    while gc.collect():  # what other tests have left
        pass
    gc.freeze()  # and what is there to stay is not looked through again
    try:
        go(3)
        before = counts()
        go(50)
        after = counts()
    finally:
        gc.unfreeze()
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) <= 1, (before, after)


def test_a_layer_goes_with_its_last_name() -> None:
    layer = streaming()
    for _ in range(3):
        layer(torch.randn(8, 6, requires_grad=True)).sum().backward()
    y = layer(torch.randn(8, 6))
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    y.sum().backward()  # what the way back needs is still there


@pytest.mark.parametrize(
    ("pack", "unpack", "dtype"),
    [
        (lambda t: t.bfloat16(), lambda t: t, torch.bfloat16),
        (lambda t: t.bfloat16(), lambda t: t.float(), torch.bfloat16),
        (lambda t: t.double(), lambda t: t, torch.float32),
        (lambda t: torch.stack([t, t], -1), lambda t: t[..., 0], torch.float32),
    ],
    ids=["narrower", "narrower meanwhile", "wider", "strided"],
)
def test_saved_tensors_may_come_back_as_others(pack: Any, unpack: Any, dtype: torch.dtype) -> None:
    """What is saved belongs to whoever set the hooks: nothing is read or written past it."""
    made = []
    for backend in (None, "eager"):
        torch.manual_seed(1)
        layer = streaming()
        with using(backend):
            hooks = nullcontext() if backend else torch.autograd.graph.saved_tensors_hooks(pack, unpack)
            for _ in range(3):
                x = torch.randn(8, 6, requires_grad=True)
                with hooks:
                    y = layer(x)
                y.backward(torch.linspace(-1, 2, 48).reshape(8, 6))
            assert x.grad is not None
            made.append(x.grad)
    assert_close("dx", *made, terms=100, dtype=dtype)


def test_a_negated_gain() -> None:
    gain, x = torch._neg_view(torch.arange(1.0, 7)), torch.randn(8, 6)
    made = []
    for backend in (None, "eager"):
        layer = streaming()
        with using(backend):
            layer(x)
            made.append(torch.func.functional_call(layer, {"affine.weight": gain, "affine.bias": gain}, (x,)))
    assert_close("y", *made, terms=100)


@pytest.mark.filterwarnings("ignore")
def test_a_backward_pass_that_is_compiled() -> None:
    made = []
    for compiled in (False, True):
        torch.manual_seed(1)
        layer, x = streaming(), torch.randn(8, 6, requires_grad=True)
        y = layer(x)
        with torch._dynamo.compiled_autograd._enable(lambda graph: graph) if compiled else nullcontext():
            y.backward(torch.linspace(-1, 2, 48).reshape(8, 6))
        assert x.grad is not None
        made.append(torch.cat([x.grad, layer.H2.short]))
    assert_close("dx and H2", made[1], made[0], terms=100)


@pytest.mark.parametrize("backend", [None, "eager", "generic"])
def test_autocast_leaves_statistics_wide(backend: str | None) -> None:
    x, made = torch.randn(8, 6), []
    for narrow in (False, True):
        layer = streaming()
        layer.steps = 4
        with using(backend), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            layer(x)
        made.append(layer.H1.short)
    assert torch.equal(*made)
