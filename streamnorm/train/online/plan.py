"""A model as the compiled step sees it: which models are supported, and the operator's parameters for them.

Imports ``layers`` and what stands below them, and ``rates``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.definition.operation import Standardize
from streamnorm.definition.stats import Lp
from streamnorm.nn.affine import Affine
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.norm import Norm
from streamnorm.ops import cpu, library
from streamnorm.ops.fused import NOTHING, Native
from streamnorm.stream import Memory
from streamnorm.stream.policy import Evidence, Streaming
from streamnorm.train.online.rates import Rates, Served

# Supported models


@dataclass
class _Layer:
    linear: nn.Linear | None  # None: a norm of the model's input
    norm: Norm | nn.LayerNorm | None = None
    affine: Affine | None = None
    relu: bool = False

    @property
    def width(self) -> int:
        if self.linear is not None:
            return self.linear.out_features
        return self.norm.num_features if isinstance(self.norm, Norm) else self.norm.normalized_shape[-1]  # type: ignore[union-attr]


def _layers(model: nn.Module) -> list[_Layer]:
    """The layers of a model, or an error that says which module is not supported and what to do."""
    if type(model) is not nn.Sequential:
        raise TypeError(f"model is an nn.Sequential of nn.Linear, norms and nn.ReLU, got {type(model).__name__}")
    layers: list[_Layer] = []
    for name, module in model._modules.items():
        last = layers[-1] if layers else None
        wrong = _why_not(module, last)
        if wrong is not None:
            raise ValueError(f"module {name!r}, {module}, cannot be trained so: {wrong}. Use a loop")
        match module:
            case nn.Linear():
                layers.append(_Layer(module))
            case nn.ReLU() if last:
                last.relu = True
            case Affine() if last:
                last.affine = module
            case Norm() | nn.LayerNorm():
                if last is None:
                    layers.append(last := _Layer(None))
                last.norm = module
                last.affine = module.affine if isinstance(module, Norm) else None
    if not layers or (last := layers[-1]) != _Layer(last.linear) or last.linear is None:
        raise ValueError("the last module of the model has to be an nn.Linear. Use a loop")
    if len({id(layer.linear) for layer in layers}) < len(layers):
        raise ValueError("a module stands twice in the model. Use a loop")
    return layers


def _why_not(module: nn.Module, last: _Layer | None) -> str | None:
    """Why ``module`` is not supported after the layer ``last``; None: it is."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    width = last.width if last else None
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return (
            None if width in (None, module.in_features) else f"it takes {module.in_features} features and gets {width}"
        )
    if kind not in (nn.ReLU, nn.LayerNorm, Norm, StreamingNorm, Affine):
        return "it is none of nn.Linear, StreamingNorm, Norm, Affine, nn.LayerNorm and nn.ReLU"
    if last is None:
        if kind in (nn.ReLU, Affine):
            return "the order is a norm or none, then nn.Linear"
    elif last.relu or (last.norm is not None and kind not in (nn.ReLU, Affine)):
        return "the order is nn.Linear, then a norm or none, then nn.ReLU or none"
    elif last.linear is None and kind is nn.ReLU:
        return "the order is a norm of the input, then nn.Linear"
    if isinstance(module, Affine) and (last is None or not isinstance(last.norm, Norm) or last.affine):
        return "it has to follow a norm that has no gain and bias"
    if isinstance(module, nn.LayerNorm):
        shape = tuple(module.normalized_shape)
        fits = shape == (width,) if last else len(shape) == 1
        return None if fits else f"it takes {module.normalized_shape} features and gets {width}"
    if isinstance(module, (Norm, Affine)) and width not in (None, module.num_features):
        return f"it takes {module.num_features} features and gets {width}"
    if not isinstance(module, Norm):
        return None
    d = module.definition
    if type(module.policy) not in (Streaming, Evidence):
        return "a norm has to be streaming (or nn.LayerNorm)"
    if d.ref.features != "own" or d.ref.place != "all" or not d.ref.is_built_in:
        return "a streaming norm has to compare each feature with itself (BA1)"
    if type(d.moment) is not Lp or d.moment.p not in (1, 2) or type(d.op) is not Standardize:
        return "a streaming norm has to have p=1 or p=2 and the operation (x - mu) / sigma"
    return None if d.moment.center != "batch" else 'of one activation, center="batch" makes sigma 0'


CROSS_ENTROPY, SQUARED_ERROR = 0, 1


def _kind_of_loss(loss_fn: Any, classes: int) -> int:
    if loss_fn is F.cross_entropy:
        return CROSS_ENTROPY
    if loss_fn is F.mse_loss or (type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean"):
        return SQUARED_ERROR
    if type(loss_fn) is nn.CrossEntropyLoss:
        plain = loss_fn.weight is None and loss_fn.label_smoothing == 0 and loss_fn.reduction == "mean"
        if plain and not 0 <= loss_fn.ignore_index < classes:
            return CROSS_ENTROPY
    raise ValueError(
        "loss_fn is F.cross_entropy, F.mse_loss, nn.CrossEntropyLoss() or nn.MSELoss() without options, got "
        f"{loss_fn!r}; for another loss use a loop"
    )


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    yield from (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


class Layer(ctypes.Structure):
    """The parameters of a layer: ``sn_spec`` of ``csrc/online.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_int32) for name in ("kind", "p", "about_zero", "relu")),
        *((name, ctypes.c_double) for name in ("eps", "trust")),
        ("groups", ctypes.c_int32 * 4),
        *((name, cpu.Stream) for name in ("F", "G")),
    ]


AT_ONCE = 24
"""Tensors that the operator ``gather`` takes in one call."""

STREAMING, LAYER_NORM = 1, 2
"""Kinds of norm that a compiled step supports; 0: none."""


class Steps(NamedTuple):
    """The result of a call.

    Attributes:
        learned, skipped: number of samples.
        latest: the last one that was learned, or -1.
        why: 0, or what was not finite in the sample that ended the call, as an index of ``trainer.WHY``.
    """

    learned: int
    skipped: int
    latest: int
    why: int


class Plan:
    """The parameters of the compiled step for a model; valid as long as ``holds()``.

    The constructor raises for anything that is not supported.
    """

    def __init__(self, model: nn.Module, optimizer: Served, loss_fn: Any) -> None:
        layers = _layers(model)
        linears = [layer.linear for layer in layers if layer.linear is not None]
        like = linears[0].weight
        self.rates = Rates(optimizer)
        self.loss = _kind_of_loss(loss_fn, linears[-1].out_features)
        self.norms = [layer.norm for layer in layers if isinstance(layer.norm, Norm)]
        self.hooks = [hooks for module in model.modules() for hooks in _hooks(module)]
        self.dtype, self.inputs, self.outputs = like.dtype, like.shape[1], linears[-1].weight.shape[0]
        if not like.is_cpu or self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model has to be float32 or float64 on the CPU; {_words('weight', like)}")
        self._owners: list[dict[str, Any]] = [m._modules for m in (model, *self.norms)]  # and those of tensors
        self._tensors: list[Tensor] = []  # parameters and memories in order
        self._seen = torch.empty(0, dtype=torch.int64, device="cpu")  # the same, as the kernels read them
        told = [self._told(layer) for layer in layers]
        self._layers = torch.frombuffer(bytearray((Layer * len(told))(*told)), dtype=torch.uint8)
        self.params = self.rates.params
        if len({p.data_ptr() for p in self.params}) < len(self.params):
            raise ValueError("parameters share their memory, and each would move them. Use a loop")
        self._owned = [owned for owner in self._owners for owned in owner.values()]
        self.all_move = all(map(self.rates.moves, self.params))
        self._where = [*map(Tensor.data_ptr, self._tensors)]
        self._require = [parameter.requires_grad for parameter in self.params]

    def _told(self, layer: _Layer) -> Layer:
        linear, norm, affine = layer.linear, layer.norm, layer.affine
        outputs, inputs = (layer.width, layer.width) if linear is None else linear.weight.shape
        told = Layer(inputs, outputs, relu=layer.relu, trust=1.0)
        told.groups[:] = [*self._groups(linear), *self._groups(norm if isinstance(norm, nn.LayerNorm) else affine)]
        if isinstance(norm, nn.LayerNorm):
            told.kind, told.eps = LAYER_NORM, norm.eps
        elif norm is not None:
            told.kind, told.p, told.eps = STREAMING, norm.moment.p, norm.moment.eps
            told.about_zero = norm.moment.center == "zero"
            told.trust = norm.policy.trust(1) if affine is norm.affine else 1.0
            told.F, told.G = self._stream(norm.H1), self._stream(norm.H2)
        return told

    def _groups(self, module: nn.Module | None) -> Iterator[int]:
        """Add weight and bias; the parameter group of each, or -1 if there is none."""
        if module is not None:
            self._owners.append(module._parameters)
        for name in ("weight", "bias"):
            parameter = None if module is None else module._parameters[name]
            if parameter is not None:
                self._take(name, parameter)
            yield -1 if parameter is None else self.rates.add(parameter)

    def _stream(self, memory: Memory | None) -> cpu.Stream:
        assert memory is not None
        self._owners.append(memory._buffers)
        for name, buffer in memory.named_buffers():
            self._take(name, buffer)
        return Native(memory).stream

    def _take(self, name: str, tensor: Tensor) -> None:
        dtype = self.dtype if tensor.is_floating_point() else torch.int64
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"the model has to be {self.dtype}, on the CPU and contiguous; {_words(name, tensor)}")
        self._tensors.append(tensor)

    def holds(self) -> bool:
        """Whether no module or tensor was replaced or moved, and nothing was frozen or unfrozen."""
        return (
            all(map(is_, chain.from_iterable(map(dict.values, self._owners)), self._owned))
            and [*map(Tensor.data_ptr, self._tensors)] == self._where
            and [parameter.requires_grad for parameter in self.params] == self._require
            and self.rates.holds()
        )

    def train(self, given: tuple[Tensor, ...], moving: bool, raises: bool) -> Steps | None:
        """Train on samples: ``given`` are x, targets, and the tensors for losses and outputs. None: not supported,
        nothing has changed.

        ``moving``: parameters are updated; otherwise only statistics. ``raises``: a sample that is not finite ends the
        call.
        """
        state = self.rates.reads(moving)
        if state is None:
            return None
        operators, tensors = library.operators(), [*self._tensors, *state]
        tensors += NOTHING[:1] * (-len(tensors) % AT_ONCE)
        if self._seen.numel() != 3 * len(tensors):
            self._seen = torch.empty(3 * len(tensors), dtype=torch.int64, device="cpu")
        for first in range(0, len(tensors), AT_ONCE):
            operators.gather(self._seen, first, *tensors[first : first + AT_ONCE])
        told = self._layers, self.rates.numbers, self._seen
        steps = Steps(*operators.online(*told, *given, self.loss, moving, raises))
        if steps.why < 0:
            return None
        if steps.learned and moving:  # tell autograd of the change in place, and give the optimizer its new state
            torch.autograd.graph.increment_version(self.params)
            self.rates.written()
        return steps


def _words(name: str, tensor: Tensor) -> str:
    order = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{name} is {tensor.dtype} of {tuple(tensor.shape)} on {tensor.device}{order}"
