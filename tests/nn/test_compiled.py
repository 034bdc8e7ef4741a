"""Training under ``torch.compile``: whole models without a break, equal to eager in outputs, gradients and statistics;
what would be wrong without a sign is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from cases import draw
from close import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn

# Of torch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")


class Doubling(sn.Rule):
    """A rule of one's own."""

    def empty(self, shape: Any) -> dict[str, Tensor]:
        return {"average": torch.ones(*shape)}

    def step(self, state: Any, s: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        average = (state["average"] + s) / 2
        return {"average": average}, average


class Own(sn.Policy):
    F, G, uses_estimate = Doubling(), Doubling(), True


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "streaming": sn.StreamingNorm,
    "the paper's": lambda c: sn.StreamingNorm(c, alpha=(0.7, 0.3), beta=(0.5, 0.3, 0.2)),
    "p=3, one sample's own": lambda c: sn.Norm(c, sn.SP1, sn.Lp(3, "estimate"), sn.Evidence(), affine=True),
    "p=1 about 0, scale, groups": lambda c: sn.Norm(
        c, sn.NormRef(2, "all", "batch"), sn.Lp(1, "zero"), sn.Evidence(), op=sn.Scale()
    ),
    "own rules": lambda c: sn.Norm(c, sn.BA1, sn.Lp(2, "estimate"), Own(), affine=True),
    "batch": sn.BatchNorm,
    "sample": sn.SampleNorm,
    "renormalization": sn.BatchRenorm,
}


def model_of(make: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    return nn.Sequential(conv, make(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 2)).double()


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, copy.deepcopy(model)


def assert_equal(model: nn.Module, twin: nn.Module, terms: int = 4096) -> None:
    want = twin.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert_close(name, value, want[name], terms)
        else:
            assert torch.equal(value, want[name]), name


@pytest.fixture(autouse=True)
def anew() -> None:
    dynamo.reset()
    dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("name", "sizes"), [("streaming", (4, 4, 6, 3, 5, 2)), *((name, (4, 4)) for name in LAYERS if name != "streaming")]
)
def test_whole_models_train_as_in_eager(name: str, sizes: tuple[int, ...]) -> None:
    """Weights move, statistics fold, batches change their size: two graphs serve, of one size and of any."""
    model, twin = twins(model_of(LAYERS[name]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    for step, samples in enumerate(sizes):
        x, losses = draw((samples, 3, 5, 5), step), []
        for function, optimizer in zip((compiled, twin), optimizers, strict=True):
            loss = function(x).square().mean()
            loss.backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        assert_close(f"loss {step}", *losses, 4096)
    assert_equal(model, twin)
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not dynamo.utils.counters["graph_break"]


def test_what_is_not_finite_stays_out_of_the_stream() -> None:
    model, twin = twins(model_of(sn.StreamingNorm))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = draw((4, 3, 5, 5), step)
        if step == 2:
            x[1, 0, 0, 0] = float("inf")
        for function in (compiled, twin):
            function(x).square().mean().backward()
        for norm in (model[1], twin[1]):
            norm.fold()
    assert model[1].H1.skipped == model[1].H2.skipped == 1
    assert_close("H1", model[1].H1.tables, twin[1].H1.tables, 4096)
    assert_close("H2", model[1].H2.tables, twin[1].H2.tables, 4096)


def test_a_vectorized_cycle() -> None:
    model, twin = twins(model_of(sn.StreamingNorm))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for m, function in ((model, compiled), (twin, twin)):
            with sn.vectorized(m, 3):
                function(draw((6, 3, 5, 5), step)).square().mean().backward()
            m[1].fold()
    assert_equal(model, twin)


def test_a_second_call_in_a_compiled_cycle_is_refused() -> None:
    norm = sn.StreamingNorm(4)
    model = nn.Sequential(norm, nn.Tanh(), norm).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sn.vectorized(model, 2), pytest.raises(Exception, match="called twice in a vectorized cycle"):
        compiled(draw((6, 4), 0))
    assert norm.H1.seen == 0


def test_a_layer_that_keeps_places_is_called_once_before() -> None:
    model, twin = twins(model_of(lambda c: sn.StreamingNorm(c, sn.BA6)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        RuntimeError,
        match=r"cannot be compiled before it; run one batch .* place=",
    ):
        compiled(draw((4, 3, 5, 5), 0))
    dynamo.reset()
    for function in (model, twin):
        function(draw((4, 3, 5, 5), 0))
    for step in range(1, 4):
        for function in (compiled, twin):
            function(draw((4, 3, 5, 5), step)).square().mean().backward()
    assert_equal(model, twin)


def test_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    layer, twin = twins(sn.NormRNN(3, 4).double())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for function in (compiled, twin):
        function(draw((2, 2, 3), 0))[0].square().mean().backward()
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert_close(f"gradient of {name}", p.grad, q.grad, 4096)
    assert_equal(layer, twin)


class Checkpointed(nn.Module):
    """A block that is computed again on the way back, ``inside`` of what is compiled, or compiled itself."""

    def __init__(self, make: Callable[[int], nn.Module], inside: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(3, 4), make(4), nn.Tanh()).double()
        self.call = self.block if inside else torch.compile(self.block, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.call, x, use_reentrant=False)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_that_is_compiled_is_refused(inside: bool) -> None:
    model = Checkpointed(sn.StreamingNorm, inside)
    function = torch.compile(model, backend="aot_eager") if inside else model
    with pytest.raises(RuntimeError, match="leave the layer out of what is checkpointed"):
        function(draw((4, 3), 0)).sum().backward()
    assert model.block[1].H1.seen == 0


def test_checkpointing_a_layer_that_normalizes_by_its_batch_is_right() -> None:
    model, twin = twins(Checkpointed(sn.BatchNorm))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for function in (compiled, twin):
        function(draw((4, 3), 0)).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert_close("gradient", p.grad, q.grad, 256)
    assert_equal(model, twin)


@pytest.mark.parametrize("strict", [False, True])
def test_a_training_graph_is_refused_by_the_exporter(strict: bool) -> None:
    model = model_of(sn.StreamingNorm)
    with pytest.raises(Exception, match="cannot be exported in training"):
        torch.export.export(model, (draw((4, 3, 5, 5), 0),), strict=strict)
    assert model[1].H1.seen == 0


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_trains_as_eager_does() -> None:
    model, twin = twins(model_of(sn.StreamingNorm))
    compiled = torch.compile(model, fullgraph=True)
    for step in range(4):
        for m, function in ((model, compiled), (twin, twin)):
            function(draw((4, 3, 5, 5), step)).square().mean().backward()
            m[1].fold()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert_close(f"gradient of {name}", p.grad, q.grad, 4096)
    assert_equal(model, twin)
