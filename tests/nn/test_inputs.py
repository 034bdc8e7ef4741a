"""What every layer takes alike: no values at all, and what is refused because it is no tensor or of another kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sequences import NETS, NORMS, flat, same_state, state_of
from torch import Tensor, nn
from torch.func import functional_call, vmap

import streamnorm as sn
from streamnorm.nn.affine import Affine
from streamnorm.nn.norm import norms
from streamnorm.nn.recurrent.cells import Cell
from streamnorm.ops.backends import using

PAPER = {"alpha": (0.6, 0.4), "beta": (0.5, 0.3, 0.2)}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "streaming": lambda: sn.StreamingNorm(4),
    "paper's rule": lambda: sn.StreamingNorm(4, **PAPER),
    "p = 3": lambda: sn.StreamingNorm(4, p=3),
    "place-wise": lambda: sn.StreamingNorm(4, sn.BA6),
    "windows": lambda: sn.StreamingNorm(4, sn.BA4.with_window(3)),
    "batch": lambda: sn.BatchNorm(4),
    "batch, windows": lambda: sn.BatchNorm(4, sn.BA3),
    "sample": lambda: sn.SampleNorm(4),
    "sample, windows": lambda: sn.SampleNorm(4, sn.SP4),
    "sample, p = 1.5": lambda: sn.SampleNorm(4, sn.SP1, p=1.5),
    "online": lambda: sn.OnlineNorm(4, bound="scale"),
    "renorm": lambda: sn.BatchRenorm(4),
    "time-specific": lambda: sn.TimeSpecific(sn.BatchNorm)(4),
}
EMPTY = [(0, 4), (0, 4, 3, 3), (5, 4, 0), (2, 4, 3, 0)]


def zeros(layer: nn.Module, y: Tensor, x: Tensor) -> None:
    """Everything has a gradient, and it is 0."""
    (y.sum() * 2).backward()
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("backend", ["cpu", "eager", "generic"])
@pytest.mark.parametrize("mode", ["fresh", "trained", "evaluated", "fresh, evaluated"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_values_have_gradients_of_0_and_change_nothing(name: str, mode: str, backend: str) -> None:
    for shape in EMPTY:
        layer = LAYERS[name]()
        trained = mode in ("trained", "evaluated") and not name.startswith("sample")
        if trained and 0 in shape[2:] and name in ("place-wise", "windows", "batch, windows"):
            continue  # another map than it was trained on
        with using(backend):
            if trained:
                layer(torch.randn(6, *(size or 3 for size in shape[1:])))
            layer.train("evaluated" not in mode)
            before = state_of(layer)
            x = torch.empty(shape, requires_grad=True)
            y = layer(x)
            assert y.shape == shape
            zeros(layer, y, x)
        assert same_state(layer, before)


@pytest.mark.parametrize("name", ["sample", "sample, windows", "sample, p = 1.5"])
def test_no_values_under_a_transform(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.empty(3, 0, 4, 2)
    assert vmap(partial(functional_call, layer, dict(layer.named_parameters())))(x).shape == x.shape


@pytest.mark.parametrize("name", ["streaming", "p = 3", "batch", "sample"])
def test_no_values_under_a_compiler(name: str) -> None:
    layer = LAYERS[name]()
    before = state_of(layer)
    x = torch.empty(0, 4, requires_grad=True)
    zeros(layer, torch.compile(layer, backend="aot_eager", fullgraph=True)(x), x)
    assert same_state(layer, before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_no_sequences_are_torchs(name: str, norm: str) -> None:
    for trained in (True, False):
        net = NETS[name](4, 3, 2, bidirectional=True, norm=NORMS[norm])
        theirs = getattr(nn, name)(4, 3, 2, bidirectional=True)
        if trained:
            net(torch.randn(6, 5, 4))
        before, calls = state_of(net), [norm.follows.unfolded for norm in norms(net)]
        x = torch.randn(6, 0, 4, requires_grad=True)
        (y, final), (want, want_final) = net(x), theirs(x)
        assert y.shape == want.shape
        assert [part.shape for part in flat(final)] == [part.shape for part in flat(want_final)]
        zeros(net, y, x)
        assert same_state(net, before)
        assert calls == [norm.follows.unfolded for norm in norms(net)]


NO_TENSORS: dict[str, Any] = {
    "list": [[1.0, 2.0, 3.0, 4.0]] * 6,
    "ndarray": np.ones((6, 4)),
    "NoneType": None,
    "float": 1.0,
    "str": "x",
    "PackedSequence": nn.utils.rnn.pack_sequence([torch.randn(6, 4)]),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: Affine(4),
    "rnn cell": lambda: sn.NormRNNCell(4, 3),
    "lstm cell": lambda: sn.NormLSTMCell(4, 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_what_is_no_tensor_is_named(name: str, what: str, training: bool) -> None:
    layer = {**LAYERS, **OTHERS}[name]().train(training)
    with pytest.raises(TypeError, match=f"has to be a tensor, got {what}") as raised:
        layer(NO_TENSORS[what])
    assert ("as_tensor" in str(raised.value)) == (what in ("list", "ndarray", "float"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_other_kinds_of_numbers_are_refused(name: str, training: bool) -> None:
    layer = {**LAYERS, **OTHERS}[name]()
    if not name.startswith("sample"):
        layer(torch.randn(6, 4))
    layer.train(training)
    before = state_of(layer)
    for dtype in (torch.complex64, torch.complex128):
        with pytest.raises(ValueError, match=r"has to be real, got torch.complex.*x.real, x.imag") as raised:
            layer(torch.ones(6, 4, dtype=dtype))
        assert "float()" not in str(raised.value)  # it would drop the imaginary part
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=r"of a floating dtype, got torch.*; write x.float\(\)"):
            layer(torch.ones(6, 4, dtype=dtype))
    assert same_state(layer, before)


@pytest.mark.parametrize("name", ["streaming", "place-wise", "batch", "time-specific"])
def test_recalibration_passes_over_what_is_empty(name: str) -> None:
    one, other = LAYERS[name](), LAYERS[name]()
    x = torch.randn(40, 4)
    sn.recalibrate(one, [x[:0], *x.split(10), x[:0]])
    sn.recalibrate(other, x.split(10))
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_the_online_trainer_says_what_came() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), sn.StreamingNorm(3), nn.ReLU(), nn.Linear(3, 1))
    trainer = sn.OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.mse_loss)
    before = copy.deepcopy(model.state_dict())
    x, target = torch.randn(4), torch.randn(1)
    for call, bad, error, message in (
        (trainer.step, ([1.0] * 4, target), TypeError, "a sample has to be a tensor, got list"),
        (trainer.step, (x, 1.0), TypeError, "the target has to be a tensor, got float"),
        (trainer.step, (x + 0j, target), ValueError, "a sample has to be real, got torch.complex64"),
        (trainer.steps, (np.ones((2, 4)), target), TypeError, "the input has to be a tensor, got ndarray"),
        (trainer.steps, (torch.ones(2, 4).long(), target[None]), ValueError, "a floating dtype, got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            call(*bad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cells_refuse_states_of_another_kind() -> None:
    cell: Cell = sn.NormRNNCell(4, 3)
    with pytest.raises(ValueError, match=r"the state h has to be real, got torch\.complex64"):
        cell(torch.randn(6, 4), torch.zeros(6, 3) + 0j)
