"""What the compiled step of ``online`` is told about a model: which can be served, and where everything of it lies.

Imports ``layers`` and what stands below them, and ``onlinerates``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.definition.operation import Standardize
from streamnorm.definition.stats import Lp
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.norm import Affine, Norm
from streamnorm.ops import library
from streamnorm.ops.cpu import RuleNumbers
from streamnorm.ops.fused import Native
from streamnorm.stream import LongShort, Memory
from streamnorm.stream.policy import Evidence, Streaming
from streamnorm.train.online.rates import CParam, Rates, Served, structure

# What can be served


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
    """The layers of a model, or an error that says which module cannot be served and what to do."""
    if type(model) is not nn.Sequential:
        raise TypeError(f"model is an nn.Sequential of nn.Linear, norms and nn.ReLU, got {type(model).__name__}")
    layers: list[_Layer] = []
    for name, module in model._modules.items():
        last = layers[-1] if layers else None
        wrong = _why_not(module, last)
        if wrong is not None:
            raise ValueError(f"module {name!r}, {module}, cannot be trained so: {wrong}. Use attach and a loop")
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
        raise ValueError("the last module of the model has to be an nn.Linear. Use attach and a loop")
    if len({id(layer.linear) for layer in layers}) < len(layers):
        raise ValueError("a module stands twice in the model. Use attach and a loop")
    return layers


def _why_not(module: nn.Module, last: _Layer | None) -> str | None:
    """What is against ``module`` after what came before it."""
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
        f"{loss_fn!r}; for another loss use attach and a loop"
    )


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    yield from (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


# The structures of csrc/online.cpp


_POINTERS = ("long", "short", "estimate", "count", "updates", "seen", "skipped")
_CStream = structure("_CStream", **dict.fromkeys(_POINTERS, c_void_p), rule=RuleNumbers, keep=c_double * 2)
_CLayer = structure(
    "_CLayer",
    **dict.fromkeys(("inputs", "outputs", "kind", "p", "about_zero", "relu"), c_int64),
    **dict.fromkeys(("eps", "trust"), c_double),
    **dict.fromkeys(("weight", "bias", "gain", "shift"), CParam),
    **dict.fromkeys(("F", "G"), _CStream),
    **dict.fromkeys(("pending", "proven", "back"), c_int64),
)
_CNet = structure(
    "_CNet",
    **dict.fromkeys(("depth", "loss"), c_int64),
    **dict.fromkeys(("layers", "rates", "scratch"), c_void_p),
    **dict.fromkeys(("threads", "raises", "learned", "skipped", "why", "latest", "broken"), c_int64),
)


@cache
def compiled_steps() -> Callable[..., int]:
    arguments = [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int]
    return library.function("online_steps", arguments, c_int64)


@cache
def _scratch() -> Callable[..., int]:
    return library.function("online_scratch", [c_void_p], c_int64)


class Plan:
    """Where everything lies that a compiled step reads and writes; good as long as it ``holds()``.

    What the constructor finds that cannot be served it raises.
    """

    def __init__(self, model: nn.Module, optimizer: Served, loss_fn: Any) -> None:
        layers = _layers(model)
        linears = [layer.linear for layer in layers if layer.linear is not None]
        like = linears[0].weight
        self.rates = Rates(optimizer, like.dtype)
        self.loss = _kind_of_loss(loss_fn, linears[-1].out_features)
        self.norms = [layer.norm for layer in layers if isinstance(layer.norm, Norm)]
        self.hooks = [hooks for module in model.modules() for hooks in _hooks(module)]
        self.dtype, self.inputs, self.outputs = like.dtype, like.shape[1], linears[-1].weight.shape[0]
        if not like.is_cpu or self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model has to be float32 or float64 on the CPU; {_words('weight', like)}")
        self._owners: list[dict[str, Any]] = [m._modules for m in (model, *self.norms)]  # and those of tensors
        self._watched: list[Tensor] = []  # those whose data may be put elsewhere
        self._kept: list[Tensor] = []  # what addresses point to, so that nothing else can come to lie there
        self.params: list[Tensor] = []
        self._layers = (_CLayer * len(layers))()
        for layer, c in zip(layers, self._layers, strict=True):
            self._fill(layer, c)
        if len({p.data_ptr() for p in self.params}) < len(self.params):
            raise ValueError("parameters share their memory, and each would move them. Use attach and a loop")
        self._owned = [owned for owner in self._owners for owned in owner.values()]
        self.all_move = all(map(self.rates.moves, self.params))
        self._where = [*map(Tensor.data_ptr, self._watched)]
        self._require = [parameter.requires_grad for parameter in self.params]
        self.net: Any = _CNet(len(layers), self.loss, ctypes.addressof(self._layers), self.rates.address)
        self.address = ctypes.addressof(self.net)
        if library.library() is not None:
            self._kept.append(like.new_empty(_scratch()(self.address), requires_grad=False))
            self.net.scratch = self._kept[-1].data_ptr()

    def _fill(self, layer: _Layer, c: Any) -> None:
        linear, norm, affine = layer.linear, layer.norm, layer.affine
        c.outputs, c.inputs = (layer.width, layer.width) if linear is None else linear.weight.shape
        c.relu, c.trust = layer.relu, 1.0
        if linear is not None:
            self._parameters(linear, c.weight, c.bias)
        if isinstance(norm, nn.LayerNorm):
            c.kind, c.eps = 2, norm.eps
            self._parameters(norm, c.gain, c.shift)
        elif norm is not None:
            c.kind, c.p, c.eps, c.about_zero = 1, norm.moment.p, norm.moment.eps, norm.moment.center == "zero"
            c.trust = norm.policy.trust(1) if affine is norm.affine else 1.0
            self._memory(norm.H1, c.F)
            self._memory(norm.H2, c.G)
        if affine is not None:
            self._parameters(affine, c.gain, c.shift)

    def _parameters(self, module: nn.Module, *to: Any) -> None:
        self._owners.append(module._parameters)
        for name, c in zip(("weight", "bias"), to, strict=True):
            parameter = module._parameters[name]
            if parameter is not None:
                c.at = self._address(name, parameter)
                self.params.append(parameter)
                self._watched.append(parameter)
                self.rates.add(parameter, c)

    def _memory(self, memory: Memory | None, c: Any) -> None:
        assert memory is not None
        self._owners.append(memory._buffers)
        self._watched += [memory.tables, memory.counts]
        for name, buffer in memory.named_buffers():
            self._address(name, buffer)
        pointers = Native(memory).pointers(self.dtype, memory.estimate[0].numel())
        assert pointers is not None
        c.rule = pointers.rule
        for name in _POINTERS:
            setattr(c, name, getattr(pointers, name))
        if isinstance(memory.rule, LongShort):
            c.keep[:] = memory.rule.keep

    def _address(self, name: str, tensor: Tensor) -> int:
        dtype = self.dtype if tensor.is_floating_point() else torch.int64
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"the model has to be {self.dtype}, on the CPU and contiguous; {_words(name, tensor)}")
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    def holds(self) -> bool:
        """Whether everything still lies where it lay, and nothing was frozen or thawed."""
        return (
            all(map(is_, chain.from_iterable(map(dict.values, self._owners)), self._owned))
            and [*map(Tensor.data_ptr, self._watched)] == self._where
            and [parameter.requires_grad for parameter in self.params] == self._require
            and self.rates.holds()
        )

    def reads(self, moving: bool) -> bool:
        """Read what may have changed since the last call. False: a compiled step cannot serve it."""
        self.net.threads = torch.get_num_threads()
        return self.rates.reads(moving)

    def written(self, moved: bool) -> None:
        """Tell torch what a compiled step has changed: autograd its versions, the optimizer its new state."""
        if moved:
            torch.autograd.graph.increment_version(self.params)
            self.rates.written()


def _words(name: str, tensor: Tensor) -> str:
    order = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{name} is {tensor.dtype} of {tuple(tensor.shape)} on {tensor.device}{order}"
