"""Pure online learning, one sample and one weight update at a time, in one compiled call for a step or for many.

What a step of a multi-layer perceptron costs at one sample is reading and writing its weights. An ordinary loop does
that several times over (the gradient of each weight is a matrix of its own); ``kernels/native/online.cpp`` reads them
once forward, and once backward while it moves them. The model, its buffers and the optimizer stay what they are and
hold the same numbers, so that either kind of step can follow the other. Imports ``dau`` and what stands below it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import SGD

from streamnorm.dau import Warmup, attach
from streamnorm.kernels import library, may_use
from streamnorm.kernels.cpu import unseen
from streamnorm.layers import Affine, Norm, StreamingNorm
from streamnorm.normop import Standardize
from streamnorm.normstats import Lp
from streamnorm.policy import Streaming
from streamnorm.stream import LongShort, Memory

Loss = Callable[[Tensor, Tensor], Tensor]


class OnlineTrainer:
    """Trains a multi-layer perceptron on one sample after another, with a weight update for each.

    A step is, up to rounding, ``loss_fn(model(x), target).backward(); optimizer.step(); optimizer.zero_grad()`` with
    ``attach(model, optimizer, warmup)``, and with the compiled kernels it takes a fraction of the time. It is just that
    without them, for a sample whose activations are not finite, in eval mode, while parameters are frozen, and while
    modules have hooks or the optimizer has others than those of ``attach`` (clipping, for instance).

    Args:
        model: ``nn.Sequential`` of ``nn.Linear``, each of them but the last followed, in this order, by a norm
            (``StreamingNorm`` with p = 1 or 2 in Setting B or C, or ``nn.LayerNorm``) and ``nn.ReLU``, or either, or
            nothing. float32 or float64, on the CPU.
        optimizer: ``torch.optim.SGD``; its rates, momentum and weight decay are read at each step.
        loss_fn: ``F.cross_entropy`` for integer targets, ``F.mse_loss`` for targets of the shape of the output, or
            ``nn.CrossEntropyLoss()`` and ``nn.MSELoss()``.
        warmup: as for ``attach``, which is called here: the model needs no other.

    Attributes:
        link: what ``attach`` returned; its ``state_dict()`` belongs into a checkpoint while a warm-up may be under way.

    Raises:
        TypeError, ValueError: for what cannot be trained so, with the module and what to do; nothing has changed then.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> online = OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.01))
    >>> loss, output = online.step(torch.randn(4), torch.tensor(2))
    >>> output.shape
    torch.Size([3])
    >>> losses, outputs = online.steps(torch.randn(20, 4), torch.randint(3, (20,)))
    >>> outputs.shape
    torch.Size([20, 3])
    """

    def __init__(self, model: nn.Module, optimizer: SGD, loss_fn: Loss = F.cross_entropy, warmup: Warmup = "auto"):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self._plan = _Plan(model, optimizer, loss_fn)
        self.link = attach(model, optimizer, warmup)
        self._own = [hook.id for hook in self.link.hooks]

    def step(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one sample ``x (d,)`` or ``(1, d)`` with its ``target``, a class ``()`` or ``(1,)``, or values
        of the shape of the output.

        Returns:
            Its loss ``()`` and the model's output before the update, ``(c,)`` or ``(1, c)``, detached.

        Raises:
            ValueError: for another shape or dtype, or a class that the model does not know; nothing has changed then.
        """
        lead = (1,) if x.ndim == 2 else ()
        self._check(x, target, lead)
        plan = self._plan
        loss, output = x.new_empty(()), x.new_empty((*lead, plan.outputs))
        self._train(x, target, 1, loss, output)
        return loss, output

    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Train on the samples ``x (n, d)`` in their order, with n weight updates: what n calls of ``step`` do, and
        faster. It cannot be interrupted; hand over as many at a time as you would like to wait for.

        Returns:
            The losses ``(n,)`` and the outputs ``(n, c)``, each from before its own update, detached.

        Raises:
            ValueError: as for ``step``, before the first sample.
        """
        lead = (*x.shape[:1],)
        self._check(x, targets, lead)
        plan = self._plan
        losses, outputs = x.new_empty(lead), x.new_empty((*lead, plan.outputs))
        self._train(x, targets, len(x), losses, outputs)
        return losses, outputs

    def _check(self, x: Tensor, targets: Tensor, lead: tuple[int, ...]) -> None:
        """Refuse what does not fit the model as it is now."""
        plan = self._renew()
        if x.shape != (*lead, plan.inputs):
            raise ValueError(f"a sample is {plan.inputs} values, got {tuple(x.shape)}; for many samples call steps")
        if x.dtype is not plan.dtype or not x.is_cpu:
            raise ValueError(f"the model computes in {plan.dtype} on the CPU, got {x.dtype} on {x.device}")
        by_class = plan.loss == CROSS_ENTROPY
        dtype, shape = (torch.int64, lead) if by_class else (plan.dtype, (*lead, plan.outputs))
        if targets.shape != shape or targets.dtype is not dtype or not targets.is_cpu:
            raise ValueError(
                f"the targets of a loss by {self.loss_fn} are {dtype} of {shape} here, got {targets.dtype} of "
                f"{tuple(targets.shape)} on {targets.device}"
            )
        if by_class and targets.numel():
            least, most = map(int, (targets, targets) if targets.numel() == 1 else targets.aminmax())
            if least < 0 or most >= plan.outputs:
                raise ValueError(f"the model knows the classes 0 to {plan.outputs - 1}, got {least} to {most}")

    def _renew(self) -> _Plan:
        """The plan, made anew if anything lies elsewhere than it did."""
        if not self._plan.holds():
            plan = _Plan(self.model, self.optimizer, self.loss_fn)
            if plan.norms != self.link.layers:
                raise ValueError("the model has other norms than it had; make another OnlineTrainer for it")
            self._plan = plan
        return self._plan

    def _train(self, x: Tensor, targets: Tensor, n: int, losses: Tensor, outputs: Tensor) -> None:
        """Train on n samples and write down their losses and outputs."""
        x, targets = x.contiguous(), targets.contiguous()
        done = 0
        while done < n:
            served = self._is_served()
            warming = not self.link._warm and self.link.warming_up
            many = 1 if warming else n - done
            did = self._compiled(x, targets, n, done, many, warming, losses, outputs) if served else 0
            done += did
            if did < many:
                samples, wanted = x.detach().reshape(n, -1), targets.detach().reshape(n, *targets.shape[x.ndim - 1 :])
                loss, output = self._ordinary(samples[done : done + 1], wanted[done : done + 1])
                losses.view(n)[done], outputs.view(n, -1)[done] = loss, output[0]
                done += 1
            if done < n:
                self._renew()

    def _is_served(self) -> bool:
        """Whether the next step may be a compiled one."""
        optimizer, plan = self.optimizer, self._plan
        if (
            library.library() is None
            or not may_use("cpu")
            or unseen()
            or any(plan.hooks)
            or _has_any_global_hook()
            or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in plan.params)
            or not plan.all_move
            or [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks] != self._own
        ):
            return False
        for norm in plan.norms:
            if not norm.training:
                return False
            norm._calls.reference_size = 1
        return True

    def _compiled(
        self, x: Tensor, targets: Tensor, n: int, start: int, many: int, warming: bool, losses: Tensor, outputs: Tensor
    ) -> int:
        """Train on ``many`` of n samples from ``start`` in one call; returns how many: the next is not finite."""
        plan = self._plan
        if not plan.reads(moving=not warming):
            return 0
        addresses = [tensor.data_ptr() for tensor in (x, targets, losses, outputs)]
        if start:
            sizes = [t.numel() // n * t.element_size() for t in (x, targets, losses, outputs)]
            addresses = [address + start * size for address, size in zip(addresses, sizes, strict=True)]
        done = _steps()(plan.address, *addresses, many, plan.dtype is torch.float64, not warming)
        if done:
            plan.written(moved=not warming)
            for norm in plan.norms:
                norm._calls.unfolded = 0
                if warming and norm.H2 is not None:
                    norm.H2.clear()
            self.link._steps += done
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether it stepped
        return done

    @torch.enable_grad()
    def _ordinary(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        output = self.model(x)
        loss = self.loss_fn(output, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), output.detach()


# What can be served


@dataclass
class _Layer:
    linear: nn.Linear
    norm: Norm | nn.LayerNorm | None = None
    affine: Affine | None = None
    relu: bool = False


def _layers(model: nn.Module) -> list[_Layer]:
    """The layers of a model, or an error that says which module cannot be served and what to do."""
    if type(model) is not nn.Sequential:
        raise TypeError(f"model is an nn.Sequential of nn.Linear, norms and nn.ReLU, got {type(model).__name__}")
    layers: list[_Layer] = []
    for name, module in model._modules.items():
        last = layers[-1] if layers else None
        width = last.linear.out_features if last else None
        wrong = _why_not(module, last)
        if wrong is None and isinstance(module, nn.Linear) and width not in (None, module.in_features):
            wrong = f"it takes {module.in_features} features and gets {width}"
        if wrong is not None:
            raise ValueError(f"module {name!r}, {module}, cannot be trained so: {wrong}. Use attach and a loop")
        match module:
            case nn.Linear():
                layers.append(_Layer(module))
            case nn.ReLU() if last:
                last.relu = True
            case Affine() if last:
                last.affine = module
            case Norm() | nn.LayerNorm() if last:
                last.norm = module
                last.affine = module.affine if isinstance(module, Norm) else None
    if not layers or layers[-1] != _Layer(layers[-1].linear):
        raise ValueError("the last module of the model has to be an nn.Linear. Use attach and a loop")
    if len({id(layer.linear) for layer in layers}) < len(layers):
        raise ValueError("a module stands twice in the model. Use attach and a loop")
    return layers


def _why_not(module: nn.Module, last: _Layer | None) -> str | None:
    """What is against ``module`` after what came before it."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    if kind is nn.Linear:
        return None
    if kind not in (nn.ReLU, nn.LayerNorm, Norm, StreamingNorm, Affine):
        return "it is none of nn.Linear, StreamingNorm, Norm, Affine, nn.LayerNorm and nn.ReLU"
    if last is None or last.relu or (last.norm is not None and kind not in (nn.ReLU, Affine)):
        return "the order is nn.Linear, then a norm or none, then nn.ReLU or none"
    width = last.linear.out_features
    if isinstance(module, Affine) and (last.norm is None or isinstance(last.norm, nn.LayerNorm) or last.affine):
        return "it has to follow a norm that has no gain and bias"
    if isinstance(module, nn.LayerNorm):
        fits = tuple(module.normalized_shape) == (width,)
        return None if fits else f"it takes {module.normalized_shape} features and gets {width}"
    if isinstance(module, (Norm, Affine)) and module.num_features != width:
        return f"it takes {module.num_features} features and gets {width}"
    if not isinstance(module, Norm):
        return None
    d = module.definition
    if type(module.policy) is not Streaming:
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


# What the compiled step is told: the structures of kernels/native/online.cpp


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_settings = itemgetter("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
_POINTERS = ("long", "short", "estimate", "count", "updates", "seen", "skipped")
_CRates = _structure("_CRates", **dict.fromkeys(("lr", "decay", "momentum", "dampening", "nesterov"), c_double))
_CParam = _structure("_CParam", at=c_void_p, average=c_void_p, group=c_int64, fresh=c_int64)
_CStream = _structure("_CStream", **dict.fromkeys(_POINTERS, c_void_p), mix=c_double * 3, keep=c_double * 2)
_CLayer = _structure(
    "_CLayer",
    **dict.fromkeys(("inputs", "outputs", "kind", "p", "about_zero", "relu"), c_int64),
    eps=c_double,
    **dict.fromkeys(("weight", "bias", "gain", "shift"), _CParam),
    **dict.fromkeys(("F", "G"), _CStream),
)
_CNet = _structure(
    "_CNet",
    **dict.fromkeys(("depth", "loss"), c_int64),
    **dict.fromkeys(("layers", "rates", "scratch"), c_void_p),
)


@cache
def _steps() -> Callable[..., int]:
    arguments = [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int]
    return library.function("online_steps", arguments, c_int64)


@cache
def _scratch() -> Callable[..., int]:
    return library.function("online_scratch", [c_void_p], c_int64)


class _Plan:
    """Where everything lies that a compiled step reads and writes; good as long as it ``holds()``.

    What the constructor finds that cannot be served it raises.
    """

    def __init__(self, model: nn.Module, optimizer: SGD, loss_fn: Any) -> None:
        layers = _layers(model)
        if type(optimizer) is not SGD:
            raise TypeError(f"optimizer is a torch.optim.SGD, got {type(optimizer).__name__}; use attach and a loop")
        self.loss = _kind_of_loss(loss_fn, layers[-1].linear.out_features)
        self.norms = [layer.norm for layer in layers if isinstance(layer.norm, Norm)]
        self.hooks = [hooks for module in model.modules() for hooks in _hooks(module)]
        like = layers[0].linear.weight
        self.dtype, self.inputs, self.outputs = like.dtype, like.shape[1], layers[-1].linear.weight.shape[0]
        if not like.is_cpu or self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model has to be float32 or float64 on the CPU; {_words('weight', like)}")
        self.optimizer = optimizer
        self._groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._owners: list[dict[str, Any]] = [m._modules for m in (model, *self.norms)]  # and those of tensors
        self._watched: list[Tensor] = []  # those whose data may be put elsewhere
        self._kept: list[Tensor] = []  # what addresses point to, so that nothing else can come to lie there
        self.params: list[Tensor] = []
        self._told: list[tuple[Tensor, Any]] = []  # parameters and what C knows of them
        self._new: list[tuple[Tensor, Tensor]] = []  # momentum buffers that the optimizer does not have yet
        self._settings: list[tuple[Any, ...]] = []  # of the optimizer, as they were told last
        self._layers = (_CLayer * len(layers))()
        self._rates = (_CRates * len(optimizer.param_groups))()
        for layer, c in zip(layers, self._layers, strict=True):
            self._fill(layer, c)
        if len({p.data_ptr() for p in self.params}) < len(self.params):
            raise ValueError("parameters share their memory, and each would move them. Use attach and a loop")
        self._owned = [owned for owner in self._owners for owned in owner.values()]
        self.all_move = all(p.requires_grad and id(p) in self._groups for p in self.params)
        self._where = [*map(Tensor.data_ptr, self._watched)]
        self._require = [parameter.requires_grad for parameter in self.params]
        self._net: Any = _CNet(len(layers), self.loss, ctypes.addressof(self._layers), ctypes.addressof(self._rates))
        self.address = ctypes.addressof(self._net)
        if library.library() is not None:
            self._kept.append(like.new_empty(_scratch()(self.address), requires_grad=False))
            self._net.scratch = self._kept[-1].data_ptr()

    def _fill(self, layer: _Layer, c: Any) -> None:
        linear, norm, affine = layer.linear, layer.norm, layer.affine
        c.outputs, c.inputs = linear.weight.shape
        c.relu = layer.relu
        self._parameters(linear, c.weight, c.bias)
        if isinstance(norm, nn.LayerNorm):
            c.kind, c.eps = 2, norm.eps
            self._parameters(norm, c.gain, c.shift)
        elif norm is not None:
            c.kind, c.p, c.eps, c.about_zero = 1, norm.moment.p, norm.moment.eps, norm.moment.center == "zero"
            self._memory(norm.H1, c.F)
            self._memory(norm.H2, c.G)
        if affine is not None:
            self._parameters(affine, c.gain, c.shift)

    def _parameters(self, module: nn.Module, *to: Any) -> None:
        self._owners.append(module._parameters)
        for name, c in zip(("weight", "bias"), to, strict=True):
            parameter = module._parameters[name]
            if parameter is not None:
                c.at, c.group = self._address(name, parameter), self._groups.get(id(parameter), -1)
                self.params.append(parameter)
                self._watched.append(parameter)
                self._told.append((parameter, c))

    def _memory(self, memory: Memory | None, c: Any) -> None:
        assert memory is not None
        assert isinstance(memory.rule, LongShort)
        self._owners.append(memory._buffers)
        self._watched.append(memory.estimate)
        for name in _POINTERS:
            setattr(c, name, self._address(name, memory.get_buffer(name)))
        c.mix[:], c.keep[:] = memory.rule.mix, memory.rule.keep

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
            and len(self.optimizer.param_groups) == len(self._rates)
        )

    def reads(self, moving: bool) -> bool:
        """Read what the optimizer says now and, while weights are moving, where its momentum buffers are. False: not
        in a way that is served."""
        groups = self.optimizer.param_groups
        settings = [_settings(group) for group in groups]
        if settings != self._settings:
            self._settings = []
            if any(group["maximize"] for group in groups):
                return False
            for c, values in zip(self._rates, settings, strict=True):
                c.lr, c.decay, c.momentum, c.dampening, c.nesterov = map(float, values[:-1])
            if not any(isinstance(value, Tensor) for values in settings for value in values):
                self._settings = settings  # and a tensor may change as it stands
        self._new = []
        return not moving or all(
            self._reads_average(parameter, c) for parameter, c in self._told if groups[c.group]["momentum"]
        )

    def _reads_average(self, parameter: Tensor, c: Any) -> bool:
        average = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
        c.fresh = average is None
        if average is None:
            average = torch.zeros_like(parameter, requires_grad=False)
            self._new.append((parameter, average))
        c.average = average.data_ptr()
        return average.dtype is self.dtype and average.is_cpu and average.is_contiguous()

    def written(self, moved: bool) -> None:
        """Tell torch what a compiled step has changed: autograd its versions, the optimizer its new averages."""
        if moved:
            torch.autograd.graph.increment_version(self.params)
            for parameter, average in self._new:
                self.optimizer.state[parameter]["momentum_buffer"] = average


def _words(name: str, tensor: Tensor) -> str:
    order = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{name} is {tensor.dtype} of {tuple(tensor.shape)} on {tensor.device}{order}"
