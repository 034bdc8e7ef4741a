"""The layer: normalization as a ``torch.nn`` module, and the gain and bias that follow it (paper, section 3).

``Norm`` is the whole framework, R x S x policy. Imports the op and what stands below it.

Legend: ``n`` inputs along the first axis = ``g`` mini-batches (steps of the stream) of ``m`` samples; ``c`` features;
``place`` = x, y, z.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_sizes, is_whole
from streamnorm.definition.layer import Definition
from streamnorm.definition.masked import expect_mask, masked
from streamnorm.definition.operation import Scale, Standardize
from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.inputs import expect_floating, expect_tensor
from streamnorm.nn.affine import Affine, Device, gains_of, trusting, unwatched
from streamnorm.nn.checkpoints import translate
from streamnorm.nn.freezable import Freezable
from streamnorm.nn.updates import Follows, enlist
from streamnorm.ops import backends, cpu
from streamnorm.ops import functional as _op
from streamnorm.ops.fused import Fused, FusedCall
from streamnorm.stream import Memory
from streamnorm.stream.policy import Policy
from streamnorm.tracing import is_readable, is_traced, refuse_recorded

NOT_RECOMPUTING = -1
"""Autograd's task id outside of a backward pass."""


@dataclass
class Calls:
    """A layer's record of its training calls, apart from the stream; it is not saved.

    Attributes:
        reference_size: activations in the smallest reference of the latest call.
        follows: whose steps are its weight updates.
        in_cycle: calls in the current vectorized cycle, None outside of one.
        has_warned: whether it was tested before it was trained.
        latest: how the latest call was split into steps, its s and its estimates, for recomputing it; or the compiled
            call, and whether gain and bias were part of it.
        fused: the layer's compiled calls, False if there are none for it, None if not checked yet.
    """

    reference_size: int | None = None
    follows: Follows = field(default_factory=Follows)
    in_cycle: int | None = None
    has_warned: bool = False
    latest: Any = None
    fused: Any = None


class Norm(Freezable):
    """A normalization layer: NormRef x NormStats x policy (section 3), the framework in one class.

    ``y = N(x, s_hat)`` with ``s = S(R)``; the policy defines s_hat and its gradient.

    Args:
        num_features: c.
        ref: R, one of ``SP1 ... SP5``, ``BA1 ... BA6``, any ``NormRef`` or one of your own.
        moment: S, ``Lp(p, center)`` or one of your own.
        policy: ``Sample()``, ``Batch()``, ``Streaming()`` or one of your own with F and G.
        affine: add a gain and a bias per feature (``Affine``).
        op: N, ``Standardize()`` as in the paper, ``Scale()``, or one of your own.
        device, dtype: as torch's; statistics stay float32 or wider.
        place: the size of the map, for references with statistics for every place, so that buffers have their shape
            from the start. None: taken from the first input.

    Shapes: ``x (n, c)``, ``(n, c, x)``, ``(n, c, x, y)`` or ``(n, c, x, y, z)`` -> ``y`` of the same shape and dtype.
    Statistics are kept in float32 or wider.

    ``layer(x, mask=mask)`` with a boolean ``mask (n, *place)``, for padded sequences and maps: statistics and gradients
    are those of the activations where it is true, and y is 0 where it is false.

    A layer with a memory hears of every ``optimizer.step()`` of the ``torch.optim.Optimizer`` that holds its gain
    (``nn.updates``). For updates of another kind call ``fold()`` after each.

    Raises:
        ValueError: for a rank, feature count or map size other than the layer's, and for Setting A with a single
            activation in a reference; the state is unchanged then.

    >>> from streamnorm import BA1, Lp, Streaming
    >>> layer = Norm(3, BA1, Lp(2, "estimate"), Streaming())
    >>> y = layer(torch.randn(8, 3))
    >>> layer.fold()
    >>> layer.eval()(torch.randn(1, 3)).shape
    torch.Size([1, 3])
    """

    place: tuple[int, ...] | None = None

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
        place: Sequence[int] | None = None,
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
        self.loss_scale = 1.0
        _check_pairing(ref, moment, policy)
        if place is not None:
            expect_sizes("place", place)
            self.place = tuple(place)
        shape = (2, ref.groups(num_features)) if ref.place == "all" and ref.is_built_in else None
        if shape is None and self.place is not None:
            view = ref.view(torch.zeros(2, num_features, *self.place, device="cpu"))
            shape = (2, *_op.pack_row(ref.mean(view), ref).shape[1:])
        self.H1 = None if policy.F is None else Memory(policy.F, shape)
        self.H2 = None if policy.G is None else Memory(policy.G, shape)
        self.affine = Affine(num_features) if affine else None
        self._calls = Calls()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        if self.is_updated:
            enlist(self)

    @property
    def is_updated(self) -> bool:
        """Whether a memory changes at a weight update."""
        return any(memory is not None and memory.rule.folds for memory in (self.H1, self.H2))

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
    def follows(self) -> Follows:
        """Whose steps are its weight updates."""
        return self._calls.follows

    @property
    def reference_size(self) -> int | None:
        """How many activations the smallest reference of the latest training call held."""
        return self._calls.reference_size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self._normalize_masked(x, mask)
        return self._normalize(x, self._modules.get("affine"))

    def normalize(self, x: Tensor) -> Tensor:
        """``forward`` without the gain and bias."""
        return self._normalize(x, None)

    def _normalize_masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """``forward`` where ``mask`` is true, and 0 elsewhere."""
        self._view(x, steps=1)
        expect_mask(mask, x, self.ref)
        affine = self._modules.get("affine")
        if not self.training and self.H1 is not None:
            y = self._normalize(x, affine)
        elif is_readable(mask) and not mask.any():
            y = _empty(x, affine)
        else:
            if self._calls.in_cycle:
                self._expect_first_call()
            y = self._train_traced(x, affine, mask) if is_traced() else self._train(x, affine, mask)
        return y.masked_fill(~mask.unsqueeze(1), 0)

    def _normalize(self, x: Tensor, affine: nn.Module | None) -> Tensor:
        remembers = self._modules.get("H1") is not None
        if not self.training and remembers:
            y = self._test(x)
            return y if affine is None else affine(y)
        if not remembers and not (isinstance(x, Tensor) and is_readable(x)):
            view = self._check(x, 1)
            y = _op.normalize_alone(view, self.definition).reshape(x.shape) if view.numel() else x.clone()
            return y if affine is None else affine(y)
        if self._calls.in_cycle:
            self._expect_first_call()
        if is_traced():
            return self._train_traced(x, affine)
        if cpu.takes(x) and backends.may_use("cpu"):
            fused_y = self._fused(x, affine)
            if fused_y is not None:
                return fused_y
        return self._train(x, affine)

    def normalize_by(self, x: Tensor, s: Tensor) -> Tensor:
        """``N(x, s)`` with constant statistics; with mean 0 and sigma 1 if there are none."""
        return _op.normalize_fixed(self._view(x, steps=1), self.definition, s, s[-1].any()).reshape(x.shape)

    def _test(self, x: Tensor) -> Tensor:
        memory = self.H1
        assert memory is not None
        if memory.shaped and not is_readable(memory.seen):
            return self.normalize_by(x, memory.estimate)
        view = self._view(x, steps=1)
        if torch.is_grad_enabled():
            self._calls.follows.evaluated += 1
        if memory.shaped and memory.known:
            return _op.normalize_fixed(view, self.definition, memory.estimate).reshape(x.shape)
        if not view.numel():
            return x.clone()
        if not self._calls.has_warned:
            self._calls.has_warned = True
            warnings.warn(
                f"{type(self).__name__} is tested (eval mode) before it has seen any training data: mean 0 and sigma 1 "
                "stand in for its statistics",
                stacklevel=4,
            )
        s = memory.estimate if memory.shaped else torch.cat([_op.pack_row(self.ref.mean(view), self.ref)] * 2)
        return _op.normalize_fixed(view, self.definition, s, s.new_zeros((), dtype=torch.bool)).reshape(x.shape)

    def _expect_first_call(self) -> None:
        """Raise at a second call in a vectorized cycle: its mini-batches would arrive in another order than in the
        loop."""
        if self._is_cyclic() and self.H1 is not None and (is_traced() or not _recomputing()):
            raise ValueError(
                f"{self!r} is called twice in a vectorized cycle: all {self.steps} mini-batches of its first call "
                "would arrive before those of the second, and in the loop they take turns; use the loop over "
                "mini-batches (DAU(..., vectorize=False)), a layer for each place, or, if a call is a cycle, "
                "vectorized() for each"
            )

    def _is_cyclic(self) -> bool:
        return self.steps > 1 and not self.reverse

    def compiled(self) -> Fused | Literal[False]:
        """The layer's compiled calls, or False if there are none for it; made anew if its definition, rules or memories
        have been replaced."""
        modules: Any = self._modules
        fused, H1, H2 = self._calls.fused, modules.get("H1"), modules.get("H2")
        if fused is None or (fused and not fused.is_of(self.definition, self.policy, H1, H2)):
            served = Fused.serves(self.definition, H1, H2)
            self._calls.fused = fused = served and Fused(self.definition, self.policy, H1, H2)
        return fused

    def _fused(self, x: Tensor, affine: nn.Module | None) -> Tensor | None:
        """A training call by one compiled kernel; None: use the fallback."""
        calls, fused = self._calls, self.compiled()
        if not fused:
            return None
        remembers = fused.H1 is not None
        if remembers and _recomputing():
            return self._fused_again(x, affine)
        way = self.steps if remembers else 1, self.reverse, self.unit / self.loss_scale
        weight, bias = unwatched(affine) or (None, None)
        call, y = fused.latest, None
        if call is not None and call.way == way:  # most inputs are like the previous one
            y = call.forward(x, weight, bias)
        if y is None or call is None:
            found = fused.call(x, *way[:2], self._check, way[2])
            if found is None or found is call:  # found is call: it was tried above
                return None
            call, y = found, found.forward(x, weight, bias)
            if y is None:
                return None
            fused.latest = call
        calls.reference_size = call.reference_size
        joined = call.has_gains and weight is not None
        if remembers:
            self._count(calls, (call, joined), x)
        return y if affine is None or joined else trusting(affine, call.trust)(y)

    def _fused_again(self, x: Tensor, affine: nn.Module | None) -> Tensor | None:
        """Recompute the latest call for activation checkpointing; None: it did not use a compiled kernel."""
        latest = self._calls.latest
        if latest is None or len(latest) == 3:
            return None
        call: FusedCall
        call, joined = latest
        y = call.fused.again(x, call, *((gains_of(affine) if joined else None) or (None, None)))
        return y if affine is None or joined else trusting(affine, call.trust)(y)

    def _check(self, x: Tensor, steps: int) -> Tensor:
        """The canonical view of a training input, after checking it."""
        view = self._view(x, steps)
        if view.numel():
            count = self.ref.size(view.shape)
            self.moment.check_size(self.ref, count)
            if not is_traced():
                self._calls.reference_size = count
        return view

    def _count(self, calls: Calls, latest: Any, x: Tensor) -> None:
        calls.latest = latest
        if calls.in_cycle is not None and self._is_cyclic():
            calls.in_cycle = 1
        calls.follows.called(self, x)

    def _train(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        """A training call in torch operations."""
        gains = gains_of(affine)
        latest = self._calls.latest
        again = latest if self.H1 is not None and latest and len(latest) == 3 and _recomputing() else None
        # Without H1 samples are normalized separately, so steps do not matter; a recomputed call keeps its steps.
        steps, unit = again[0] if again else (self.steps, self.unit / self.loss_scale)
        view = self._check(x, 1 if self.H1 is None else steps)
        if not view.numel():
            return _empty(x, affine)
        recall = (again[1], again[2]) if again else None
        streams, definition = self._streams(view, recall, unit), self.definition
        if mask is not None:
            view, definition = masked(view, mask, definition)
        joined = gains is not None and not x.is_inference() and _op.joins(view, definition)
        y, estimates, s = _op.normalize(view, definition, streams, *(gains if joined and gains else ()))
        if estimates is not None and s is not None and not again:
            self._count(self._calls, ((steps, unit), s, estimates), x)
        # Later layers may change y in place (a ReLU), which autograd forbids for a view of a Function's output.
        y = torch.ops.aten._unsafe_view(y.reshape(x.shape), x.shape)
        if affine is None or joined:
            return y
        return trusting(affine, streams.trust)(y)

    def _train_traced(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        """A training call under ``torch.compile``: changes nothing but buffers.

        Raises:
            RuntimeError: where the result would be silently wrong.
        """
        if self.policy.uses_estimate:
            refuse_recorded()
        view = self._check(x, self.steps)
        if not view.numel():
            return _empty(x, affine)
        if self._calls.in_cycle is not None and self._is_cyclic():
            self._calls.in_cycle = 1
        streams = self._streams(view, None, self.unit / self.loss_scale)
        definition = self.definition
        if mask is not None:
            torch.ops.aten._assert_async.msg(mask.any(), "a mask that is false everywhere leaves a layer nothing")
            view, definition = masked(view, mask, definition)
        y = _op.normalize_traced(view, definition, streams).reshape(x.shape)
        return y if affine is None else trusting(affine, streams.trust)(y)

    def _streams(self, view: Tensor, recall: tuple[Tensor, Tensor] | None, unit: float) -> _op.Streams:
        """The stream's part in a call."""
        trust = self.policy.trust(view.shape[1])
        return _op.Streams(self.H1, self.H2, self.policy.uses_estimate, recall, self.reverse, unit, trust)

    def fold(self, happened: Tensor | bool = True) -> None:
        """A weight update took place: long <- kappa1 long + kappa2 short, short emptied (section 3.3.1, 3.3.2)."""
        fused = self._calls.fused and self.compiled()
        if happened is not True or not fused or not backends.may_use("cpu") or is_traced() or not fused.fold():
            for memory in (self.H1, self.H2):
                if memory is not None:
                    memory.fold(happened)
        self._calls.follows.folded(self)

    def _view(self, x: Tensor, steps: int) -> Tensor:
        c = self.num_features
        expect_tensor("the input", x)
        if not 2 <= x.ndim <= 5:
            raise ValueError(
                f"expected (n, {c}), (n, {c}, x), (n, {c}, x, y) or (n, {c}, x, y, z), got {tuple(x.shape)}"
                + ("; for a single sample write x.unsqueeze(0)" if x.ndim == 1 else "")
            )
        if x.shape[1] != c:
            raise ValueError(
                f"expected {c} features on axis 1, got {tuple(x.shape)}; features come second: (n, {c}, ...)"
            )
        expect_floating("the input", x)
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
        if any(prefix + name in state_dict for name in ("weight", "bias", "running_mean")):
            gains = [name for name in ("weight", "bias") if getattr(self, name) is not None]
            memories = self.H1, self.H2
            homeless = translate(state_dict, prefix, set(self.state_dict()), gains, memories, self.definition)
            if homeless:
                warnings.warn(
                    f"what is loaded into {prefix[:-1] or 'it'} ({type(self).__name__}) comes from a layer of torch: "
                    f"{homeless}",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": Calls(reference_size=self.reference_size)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        calls = Calls(reference_size=state["_calls"].reference_size)
        super().__setstate__({"loss_scale": 1.0, **state, "_calls": calls})
        if self.is_updated:
            enlist(self)

    def __repr__(self) -> str:
        options = ", affine=True" if self.affine is not None else ""
        if self.definition.op != Standardize():
            options += f", op={self.definition.op!r}"
        if self.place is not None:
            options += f", place={self.place!r}"
        return f"Norm({self.num_features}, {self.ref!r}, {self.moment!r}, {self.policy!r}{options})"


def _empty(x: Tensor, affine: nn.Module | None) -> Tensor:
    """The output for an empty input: the state does not change, and gain and bias have gradients of 0."""
    y = x.clone()
    return y if affine is None else affine(y)


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


def _recomputing() -> bool:
    """Whether autograd is running a backward pass: a forward call inside it is a recomputation."""
    return torch._C._current_graph_task_id() != NOT_RECOMPUTING


def norms(model: nn.Module) -> Iterator[Norm]:
    """Every ``Norm`` layer of a model, each once."""
    return (module for module in model.modules() if isinstance(module, Norm))
