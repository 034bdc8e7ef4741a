"""The layer: normalization as a ``torch.nn`` module, and the gain and bias that follow it (paper, section 3).

``Norm`` is the whole framework, R x S x policy. Imports the op and what stands below it.

Legend: ``n`` inputs along the first axis = ``g`` mini-batches (steps of the stream) of ``m`` samples; ``c`` features;
``place`` = x, y, z.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from streamnorm import kernels
from streamnorm import op as _op
from streamnorm.checks import is_whole
from streamnorm.fused import SHAPES, Fused, Shortcut, Told, is_hooked
from streamnorm.kernels import Definition, cpu
from streamnorm.kernels.calls import Guard, answers, is_still, keeps_its_class
from streamnorm.normop import Scale, Standardize
from streamnorm.normref import NormRef
from streamnorm.normstats import Lp
from streamnorm.policy import Policy
from streamnorm.stream import Memory
from streamnorm.tracing import is_readable

Device = torch.device | str | int | None
NOT_RECOMPUTING = -1
"""The task of autograd where there is none."""
FORGOTTEN = 1000
"""Training calls without a weight update after which a streaming layer asks whether it was forgotten."""


class Affine(nn.Module):
    """The learnable gain and bias, a layer of its own after each normalization (section 3.5).

    ``y = weight x + bias``, one pair a feature; ``x (n, c, *place) -> y (n, c, *place)``.

    >>> Affine(3)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, num_features: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, trust: float = 1.0) -> Tensor:
        """``y``; the gradients of gain and bias are multiplied by ``trust``."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (n, {self.num_features}, ...), got {tuple(x.shape)}")
        weight, bias = self.weight, self.bias
        if trust != 1:  # the same values, of which a share has gradients
            weight, bias = (torch.lerp(p.detach(), p, trust) for p in (weight, bias))
        shape = (-1, *[1] * (x.ndim - 2))
        return (x * weight.reshape(shape)).add_(bias.reshape(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}"


@dataclass(slots=True)
class Calls:
    """What a layer remembers of its training calls beside the stream; nothing of it is saved.

    Attributes:
        reference_size: activations in the smallest reference of the latest call.
        unfolded: calls since the last weight update.
        in_cycle: calls in the vectorized cycle that is under way, None outside of one.
        latest: how the latest call was cut, its s and its estimates, for a call that is computed again; or what its
            compiled kernel was told and has left.
        fused: the layer's compiled calls, False if there are none for it, None if nobody has asked.
        shortcuts: by what was told, and the latest of them. They hold the layer, and what was told goes into the graph.
    """

    reference_size: int | None = None
    unfolded: int = 0
    in_cycle: int | None = None
    latest: Any = None
    fused: Any = None
    shortcuts: dict[Told, Shortcut] = field(default_factory=dict)
    shortcut: Shortcut | None = None


class Norm(nn.Module):
    """A normalization layer: NormRef x NormStats x policy (section 3), the framework in one class.

    ``y = N(x, s_hat)`` with ``s = S(R)``; the policy says what s_hat is and what its gradient is.

    Args:
        num_features: c.
        ref: R, one of ``SP1 ... SP5``, ``BA1 ... BA6``, any ``NormRef`` or one of your own.
        moment: S, ``Lp(p, center)`` or one of your own.
        policy: ``Sample()``, ``Batch()``, ``Streaming()`` or one of your own with F and G.
        affine: follow with a gain and a bias per feature (``Affine``).
        op: N, ``Standardize()`` as in the paper, ``Scale()``, or one of your own.
        device, dtype: as torch's; statistics stay float32 or wider.

    Shapes: ``x (n, c)``, ``(n, c, x)``, ``(n, c, x, y)`` or ``(n, c, x, y, z)`` -> ``y`` of the same shape and dtype.
    Statistics are kept in float32 or wider.

    A layer that streams needs to be told of every weight update: ``attach(model, optimizer)``, or ``fold()`` after each
    ``optimizer.step()``.

    Raises:
        ValueError: for a rank, feature count or map size other than the layer's, and for Setting A with a single
            activation in a reference; no state has changed then.
        RuntimeError: when it is tested before it was trained.

    >>> from streamnorm import BA1, Lp, Streaming
    >>> layer = Norm(3, BA1, Lp(2, "estimate"), Streaming())
    >>> y = layer(torch.randn(8, 3))
    >>> layer.fold()
    >>> layer.eval()(torch.randn(1, 3)).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef,
        moment: Lp,
        policy: Policy,
        affine: bool = False,
        op: Standardize | Scale | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_whole(num_features):
            raise ValueError(f"num_features is a number of features >= 1, got {num_features!r}")
        if not isinstance(ref, NormRef):
            raise TypeError(f"ref is a NormRef such as streamnorm.BA1, got {ref!r}")
        if not isinstance(policy, Policy):
            raise TypeError(f"policy is a Policy such as streamnorm.Streaming(), got {policy!r}")
        self.num_features = num_features
        self.definition = Definition(ref, moment, op or Standardize())
        self.policy = policy
        self.steps = 1
        self.reverse = False
        self.unit = 1
        _check_pairing(ref, moment, policy)
        shape = (2, ref.groups(num_features)) if ref.place == "all" and ref.is_built_in else None
        self.H1 = None if policy.F is None else Memory(policy.F, shape)
        self.H2 = None if policy.G is None else Memory(policy.G, shape)
        self.affine = Affine(num_features) if affine else None
        self._calls = Calls()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @property
    def ref(self) -> NormRef:
        """R, the normalization reference."""
        return self.definition.ref

    @property
    def moment(self) -> Lp:
        """S, the statistics."""
        return self.definition.moment

    @property
    def weight(self) -> nn.Parameter | None:
        """The gain of ``affine``, or None."""
        return None if self.affine is None else self.affine.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of ``affine``, or None."""
        return None if self.affine is None else self.affine.bias

    @property
    def reference_size(self) -> int | None:
        """How many activations the smallest reference of the latest training call held."""
        return self._calls.reference_size

    def forward(self, x: Tensor) -> Tensor:
        calls = self._calls
        shortcut = calls.shortcut
        if shortcut is not None and not calls.in_cycle and not is_dynamo_compiling():
            y = shortcut.call(x)
            if y is not None:
                calls.reference_size = shortcut.reference_size
                if shortcut.latest is not None:
                    self._count(calls, shortcut.latest)
                return y if shortcut.then is None else shortcut.then(y)
        return self._normalize(x, self._modules.get("affine"))

    def normalize(self, x: Tensor) -> Tensor:
        """``forward`` without the gain and bias."""
        return self._normalize(x, None)

    def _normalize(self, x: Tensor, affine: nn.Module | None) -> Tensor:
        if self.H1 is None and not is_readable(x):
            y = _op.normalize_alone(self._check(x, 1), self.definition).reshape(x.shape)
            return y if affine is None else affine(y)
        if self.training or self.H1 is None:
            self._expect_first_call()
            y = self._fused(x, affine)
            return self._train(x, affine) if y is None else y
        y = self._test(x)
        return y if affine is None else affine(y)

    def _test(self, x: Tensor) -> Tensor:
        view, memory = self._view(x, steps=1), self.H1
        assert memory is not None
        if not is_readable(memory.seen):
            # Nobody can be asked without waiting, or at all: where there are no statistics, y is NaN.
            return _op.normalize_fixed(view, self.definition, memory.estimate, memory.seen > 0).reshape(x.shape)
        if not memory.known:
            raise RuntimeError(
                f"{type(self).__name__} is tested (eval mode) before it has seen any training data, so there are no "
                "statistics to normalize with; run it in train() mode first, or load a state_dict"
            )
        return _op.normalize_fixed(view, self.definition, memory.estimate).reshape(x.shape)

    def _expect_first_call(self) -> None:
        """Raise at a second call in a vectorized cycle, which would bring its mini-batches in another order than the
        loop does."""
        if self._calls.in_cycle and self._is_cyclic() and self.H1 is not None and not _recomputing():
            raise ValueError(
                f"{self!r} is called twice in a vectorized cycle: all {self.steps} mini-batches of its first call "
                "would arrive before those of the second, and in the loop they take turns; use the loop over "
                "mini-batches (DAU(..., vectorize=False)), a layer for each place, or, if a call is a cycle, "
                "vectorized() for each"
            )

    def _is_cyclic(self) -> bool:
        return self.steps > 1 and not self.reverse

    def compiled(self) -> Fused | Literal[False]:
        """The layer's compiled calls, or False if there are none for it. Its definition, rules and memories may have
        been replaced."""
        modules: Any = self._modules
        fused, H1, H2 = self._calls.fused, modules.get("H1"), modules.get("H2")
        if fused is None or (fused and not fused.is_of(self.definition, self.policy, H1, H2)):
            served = Fused.serves(self.definition, H1, H2)
            self._calls.fused = fused = served and Fused(self.definition, self.policy, H1, H2)
        return fused

    def _fused(self, x: Tensor, affine: nn.Module | None) -> Tensor | None:
        """A training call by one compiled kernel, or None where that cannot be."""
        calls, modules = self._calls, self._modules
        fused = self.compiled()
        if fused is False or not cpu.takes(x) or not kernels.may_use("cpu"):
            return None
        remembers = modules.get("H1") is not None
        if remembers and _recomputing():
            return self._fused_again(x, affine)
        told = fused.told(x, self.steps if remembers else 1, self.reverse, self._check, self.unit)
        if told is None:
            return None
        calls.reference_size = told.reference_size
        gains = gains_of(affine) if told.has_gains else None
        y = told.forward(x, *(gains or (None, None)))
        if y is None:
            return None
        joined = gains is not None
        if affine is modules.get("affine"):
            shortcut = calls.shortcuts.get(told)
            if shortcut is None or calls.shortcut is shortcut:  # the latter has just failed
                if len(calls.shortcuts) == SHAPES:
                    calls.shortcuts.clear()
                memories = [*(is_still(modules, name) for name in ("H1", "H2")), *fused.guards()]
                then = None if joined or affine is None else trusting(affine, told.plan.trust)
                looked_at = self._looked_at(remembers)
                shortcut = calls.shortcuts[told] = Shortcut(told, memories, looked_at, affine, then)
            calls.shortcut = shortcut
        if remembers:
            self._count(calls, (told, joined))
        return y if affine is None or joined else trusting(affine, told.plan.trust)(y)

    def _looked_at(self, remembers: bool) -> Iterator[Guard]:
        """What the choice of a compiled call depends on, beside the memories."""
        mine = vars(self)
        yield keeps_its_class(self)
        for name in ("definition", "policy", "steps", "reverse", "unit", "_modules"):
            yield is_still(mine, name)
        yield is_still(self._modules, "affine")
        yield answers(kernels.limit, 0)
        if remembers:
            yield is_still(mine, "training")
            yield answers(torch._C._current_graph_task_id, NOT_RECOMPUTING)

    def _fused_again(self, x: Tensor, affine: nn.Module | None) -> Tensor | None:
        """The latest call once more, if it was one by a compiled kernel: activation checkpointing repeats it."""
        latest = self._calls.latest
        if latest is None or len(latest) == 3:
            return None
        told, joined = latest
        y = told.fused.again(x, told, *((gains_of(affine) if joined else None) or (None, None)))
        return y if affine is None or joined else trusting(affine, told.plan.trust)(y)

    def _check(self, x: Tensor, steps: int) -> Tensor:
        """The canonical view of a training input that the layer does not refuse."""
        view = self._view(x, steps)
        if view.numel():
            count = self.ref.size(view.shape)
            self.moment.check_size(self.ref, count)
            self._calls.reference_size = count
        return view

    def _count(self, calls: Calls, latest: Any) -> None:
        calls.latest = latest
        calls.unfolded += 1
        if calls.in_cycle is not None and self._is_cyclic():
            calls.in_cycle = 1
        if calls.unfolded == FORGOTTEN and self.policy.uses_estimate:
            warnings.warn(
                f"{self!r} has seen {FORGOTTEN} training calls and no weight update; call streamnorm.attach(model, "
                "optimizer) once, or layer.fold() after each optimizer.step()",
                stacklevel=5,
            )

    def _train(self, x: Tensor, affine: nn.Module | None) -> Tensor:
        gains = gains_of(affine)
        latest = self._calls.latest
        again = latest if self.H1 is not None and latest and len(latest) == 3 and _recomputing() else None
        # A sample is normalized by itself, however the first axis is cut; a recomputed call is cut as it was.
        steps, unit = again[0] if again else (self.steps, self.unit)
        view = self._check(x, 1 if self.H1 is None else steps)
        if not view.numel():
            return x.clone()
        recall = (again[1], again[2]) if again else None
        trust = self.policy.trust(view.shape[1])
        streams = _op.Streams(self.H1, self.H2, self.policy.uses_estimate, recall, self.reverse, unit, trust)
        joined = gains is not None and not x.is_inference() and _op.joins(view, self.definition)
        y, estimates, s = _op.normalize(view, self.definition, streams, *(gains if joined and gains else ()))
        if estimates is not None and s is not None and not again:
            self._count(self._calls, ((steps, unit), s, estimates))
        # What follows may change it in place (a ReLU), which a view of what a Function returned forbids.
        y = torch.ops.aten._unsafe_view(y.reshape(x.shape), x.shape)
        if affine is None or joined:
            return y
        return trusting(affine, trust)(y)

    def fold(self, happened: Tensor | bool = True) -> None:
        """A weight update took place: long <- kappa1 long + kappa2 short, short emptied (section 3.3.1, 3.3.2)."""
        calls = self._calls
        shortcut = calls.shortcut
        if happened is not True or shortcut is None or not shortcut.fold():
            fused, modules = calls.fused, self._modules
            if happened is not True or not fused or not fused.fold(modules.get("H1"), modules.get("H2")):
                for memory in (self.H1, self.H2):
                    if memory is not None:
                        memory.fold(happened)
        calls.unfolded = 0

    def _view(self, x: Tensor, steps: int) -> Tensor:
        c = self.num_features
        if not 2 <= x.ndim <= 5:
            raise ValueError(
                f"expected (n, {c}), (n, {c}, x), (n, {c}, x, y) or (n, {c}, x, y, z), got {tuple(x.shape)}"
                + ("; for a single sample write x.unsqueeze(0)" if x.ndim == 1 else "")
            )
        if x.shape[1] != c:
            raise ValueError(
                f"expected {c} features on axis 1, got {tuple(x.shape)}; features come second: (n, {c}, ...)"
            )
        if not x.is_floating_point():
            raise ValueError(f"expected a floating dtype, got {x.dtype}; write x.float()")
        if x.shape[0] % steps:
            raise ValueError(f"{x.shape[0]} samples do not divide into {steps} mini-batches of equal size")
        view = self.ref.view(x, steps)
        memory = self.H1
        if memory is not None and memory.shaped and self.ref.place != "all":
            known, place = tuple(memory.estimate.shape[2:]), tuple(x.shape[2:])
            if known != place and self.ref.is_built_in:
                raise ValueError(
                    f"{self.ref!r} keeps statistics for every place of a map of size {known}, got {place} in "
                    f"{tuple(x.shape)}; use a reference over all places (BA1, BA2, SP1, SP2), or a layer for each size"
                )
        return view

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        strange = {name for name in ("weight", "running_mean") if prefix + name in state_dict} - set(self.state_dict())
        if strange:
            gains = "have no place (affine=False)" if self.affine is None else "are affine.weight and affine.bias here"
            statistics = (
                ", and its running statistics have no place; streamnorm.recalibrate(model, data) takes them anew"
                if "running_mean" in strange and self.H1 is not None
                else ""
            )
            warnings.warn(
                f"what is loaded into {prefix[:-1] or 'it'} ({type(self).__name__}) comes from a layer of torch: its "
                f"weight and bias {gains}{statistics}",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": Calls(reference_size=self.reference_size)}

    def __repr__(self) -> str:
        options = ", affine=True" if self.affine is not None else ""
        if self.definition.op != Standardize():
            options += f", op={self.definition.op!r}"
        return f"Norm({self.num_features}, {self.ref!r}, {self.moment!r}, {self.policy!r}{options})"


def _check_pairing(ref: NormRef, moment: Lp, policy: Policy) -> None:
    if not policy.uses_estimate:
        if policy.F is None and ref.samples != "one":
            raise ValueError(f"{policy!r} looks at one sample, {ref!r} at the mini-batch; use SP1 ... SP5, or Batch()")
        if policy.F is not None and ref.samples != "batch":
            raise ValueError(f"{policy!r} looks at the mini-batch, {ref!r} at one sample; use BA1 ... BA6, or Sample()")
    elif policy.F is None:
        raise ValueError(f"{policy!r} trains with F's estimate (uses_estimate) and has no F")
    if policy.F is None and getattr(moment, "center", None) == "estimate":
        raise ValueError(f'center="estimate" (Setting B) needs a running estimate and {policy!r} keeps none')


def gains_of(affine: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Gain and bias of an ``Affine``, one a feature on one device, that does nothing else and that nobody watches."""
    if type(affine) is not Affine or is_hooked(affine):
        return None
    parameters: Any = affine._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    c = affine.num_features
    return (weight, bias) if weight.shape == bias.shape == (c,) and weight.is_cpu == bias.is_cpu else None


def trusting(affine: nn.Module, trust: float) -> Callable[[Tensor], Tensor]:
    """What follows a layer, with the gradients of its gain and bias multiplied by ``trust``; a forward of its own knows
    nothing of that and is called as it is."""
    return affine if trust == 1 else partial(_trusted, affine, trust)


def _trusted(affine: nn.Module, trust: float, y: Tensor) -> Tensor:
    # Asked at every call: the forward of what follows may be replaced between two.
    takes_trust = (
        isinstance(affine, Affine) and type(affine).forward is Affine.forward and "forward" not in vars(affine)
    )
    return affine(y, trust=trust) if takes_trust else affine(y)


def _recomputing() -> bool:
    """Whether autograd is running a backward pass: a forward call inside it repeats one that has been."""
    return torch._C._current_graph_task_id() != NOT_RECOMPUTING


def norms(model: nn.Module) -> Iterator[Norm]:
    """Every ``Norm`` layer of a model, each once."""
    return (module for module in model.modules() if isinstance(module, Norm))
