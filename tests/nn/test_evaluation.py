"""A layer in evaluation mode is an ordinary function: it compiles and exports whole, to a graph that changes nothing,
and goes through transforms of functions; and it never makes up statistics that it does not have."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import draw
from close import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap

import streamnorm as sn

LAYERS: dict[str, Callable[[], sn.Norm]] = {
    "streaming": lambda: sn.StreamingNorm(4),
    "the paper's": lambda: sn.StreamingNorm(4, alpha=(0.7, 0.3)),
    "batch": lambda: sn.BatchNorm(4),
    "groups": lambda: sn.Norm(4, sn.NormRef(2, "all", "batch"), sn.Lp(2, "estimate"), sn.Evidence()),
    "places": lambda: sn.Norm(4, sn.BA6, sn.Lp(1, "zero"), sn.Evidence(), affine=True),
    "scale": lambda: sn.Norm(4, sn.BA1, sn.Lp(2, "zero"), sn.Evidence(), op=sn.Scale()),
    "sample": lambda: sn.SampleNorm(4),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
X = draw((3, 4, 2, 5), 0).float()


def model_of(name: str, seed: int = 0) -> nn.Sequential:
    """Trained for one update, in evaluation mode, and never evaluated before."""
    torch.manual_seed(seed)
    trained = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]())
    trained(X + seed)
    trained[1].fold()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]()).eval()
    model.load_state_dict(trained.state_dict())
    return model


@every_layer
def test_exported_for_any_number_of_samples_to_a_graph_that_changes_nothing(name: str) -> None:
    model = model_of(name)
    n = torch.export.Dim("n", min=1, max=64)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: n},))
    assert not exported.graph_signature.buffers_to_mutate
    for samples in (1, 3):
        assert_close("y", exported.module()(X[:samples]), model(X[:samples]), 64)


@every_layer
def test_compiled_without_a_break(name: str) -> None:
    torch._dynamo.reset()  # all models share the code that is compiled
    model = model_of(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        x = X.clone().requires_grad_()
        y = function(x)
        y.backward(draw(X.shape, 1).float())
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        assert_close("result", b, a, 64)


@every_layer
def test_an_ensemble(name: str) -> None:
    models = [model_of(name, seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    for model, y in zip(models, together, strict=True):
        assert_close("y", y, model(X), 64)


@every_layer
def test_gradients_of_each_sample(name: str) -> None:
    model = model_of(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x.unsqueeze(0),)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i in range(len(X)):
        want = torch.autograd.grad(model(X[i : i + 1]).square().sum(), list(parameters.values()))
        for got, value in zip(each.values(), want, strict=True):
            assert_close("gradient", got[i], value, 1024)


@every_layer
def test_second_derivatives(name: str) -> None:
    layer = model_of(name)[1].double()
    assert torch.autograd.gradgradcheck(layer, draw(X.shape, 0).requires_grad_(), atol=1e-4)


@every_layer
def test_shapes_without_values(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model_of(name)(fake.from_tensor(X)).shape == X.shape
        model, x = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]()), fake.from_tensor(X.clone().requires_grad_())
        model(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == X.shape
    for training in (False, True):
        x = X.to("meta").requires_grad_()
        model_of(name).to("meta").train(training)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == X.shape


def test_without_statistics_every_way_has_mean_0_and_sigma_1() -> None:
    torch._dynamo.reset()
    model = sn.StreamingNorm(4).eval()
    with pytest.warns(UserWarning, match="before it has seen any training data"):
        assert torch.equal(model(X), X)
    exported = torch.export.export(model, (X,)).module()
    assert torch.equal(exported(X), X)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(X), X)


def test_statistics_that_are_taken_away_after_an_evaluation_are_missed() -> None:
    model = model_of("streaming")
    model(X)
    for buffer in model[1].buffers():
        buffer.zero_()
    with pytest.warns(UserWarning, match="before it has seen any training data"):
        model(X)
    model.load_state_dict(model_of("streaming").state_dict())
    assert torch.equal(model(X), model_of("streaming")(X))
