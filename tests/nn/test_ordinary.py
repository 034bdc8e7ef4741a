"""Layers without a memory are ordinary functions: derivatives of any order and mode, transforms, compilers.
And what follows any layer may change its output in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import draw
from close import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import streamnorm as sn
from streamnorm.definition.ref import REFS
from streamnorm.ops.backends import using

MOMENTS = [sn.Lp(2), sn.Lp(1), sn.Lp(3), sn.Lp(2, "zero")]
NAMES = ["SP1", "SP2", "SP4", "SP5"]


def layer(ref: str = "SP2", moment: sn.Lp = MOMENTS[0], features: int = 4) -> sn.Norm:
    """A layer whose gain and bias are not those of the start."""
    made = sn.Norm(features, REFS[ref], moment, sn.Sample(), affine=True).double()
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(draw((1, features), 90 + seed)[0])
    return made


@pytest.mark.parametrize("ref", NAMES)
@pytest.mark.parametrize("moment", MOMENTS, ids=repr)
def test_second_derivatives(moment: sn.Lp, ref: str) -> None:
    made = layer(ref, moment)
    x = draw((2, 4, 3), 0).requires_grad_()
    assert torch.autograd.gradgradcheck(made, x, atol=1e-4)
    y = made(x)
    first, again = (torch.autograd.grad(y, x, draw(y.shape, 1), retain_graph=True, create_graph=c)[0] for c in (0, 1))
    assert_close("dx", again.detach(), first, 64)
    assert again.requires_grad


def test_a_penalty_on_the_gradient_is_that_of_layer_normalization() -> None:
    ours, theirs = sn.SampleNorm(6, eps=1e-5).double(), nn.LayerNorm(6, dtype=torch.float64)
    results = []
    for norm in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 1)).double()
        x = draw((7, 5), 0).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None and p.numel() > 1])
    for a, b in zip(*results, strict=True):
        assert_close("penalty", a, b, 256)


@pytest.mark.parametrize("ref", NAMES)
@pytest.mark.parametrize("moment", MOMENTS, ids=repr)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, in its jvp
def test_transforms_of_functions(moment: sn.Lp, ref: str) -> None:
    made = layer(ref, moment)
    parameters = dict(made.named_parameters())
    x, dy = draw((5, 4, 3), 0), draw((5, 4, 3), 1)

    def loss(parameters: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(made, parameters, (x.unsqueeze(0),)) * dy).sum()

    each = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(parameters, x, dy)
    for i in range(len(x)):
        leaf = x[i].clone().requires_grad_()
        want = torch.autograd.grad(loss(parameters, leaf, dy[i]), [*parameters.values(), leaf])
        for name, value in zip(parameters, want, strict=False):
            assert_close(name, each[0][name][i], value, 256)
        assert_close("dx", each[1][i], want[-1], 256)
    y, along = jvp(made, (x,), (dy,))
    assert_close("y", y, made(x), 64)
    leaf = x.clone().requires_grad_()
    back = torch.autograd.grad(made(leaf), leaf, dy)[0]  # <dy, J dy> = <J' dy, dy>
    assert_close("jvp", (dy * along).sum(), (back * dy).sum(), 256)


def test_an_ensemble() -> None:
    models = [nn.Sequential(nn.Linear(3, 4).double(), layer()) for _ in range(3)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    x = draw((5, 3), 0)
    together = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for model, y in zip(models, together, strict=True):
        assert_close("y", y, model(x), 64)


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 8), sn.SampleNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for samples in (5, 2):
        results = []
        for function in (model, compiled):
            x = draw((samples, 3), samples).float().requires_grad_()
            function(x).square().sum().backward()
            results.append([x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        for a, b in zip(*results, strict=True):
            assert a is not None
            assert b is not None
            assert_close("gradient", a, b, 256)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "streaming": lambda: sn.StreamingNorm(4),
    "the paper's": lambda: sn.StreamingNorm(4, alpha=(0.7, 0.3)),
    "p=3": lambda: sn.StreamingNorm(4, p=3),
    "no gain": lambda: sn.StreamingNorm(4, affine=False),
    "batch": lambda: sn.BatchNorm(4),
    "sample": lambda: sn.SampleNorm(4),
    "places": lambda: sn.Norm(4, sn.BA6, sn.Lp(2, "estimate"), sn.Evidence()),
    "renormalization": lambda: sn.BatchRenorm(4),
    "online": lambda: sn.OnlineNorm(4),
}


@pytest.mark.parametrize("backend", ["cpu", "eager", "generic"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last)], ids=["", "last"])
def test_a_relu_in_place_behind_it(make: Callable[[Tensor], Tensor], name: str, backend: str) -> None:
    results: list[list[Any]] = []
    for in_place in (False, True):
        model = nn.Sequential(LAYERS[name](), nn.ReLU(in_place))
        seen: list[Any] = []
        with using(backend):
            for step, training in enumerate((True, True, False)):
                x = make(draw((3, 4, 2, 5), step).float()).requires_grad_()
                y = model.train(training)(x)
                y.backward(draw(y.shape, 10 + step).float())
                seen += [y.detach().clone(), x.grad]
        results.append(seen + [p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
