"""How a layer computes a training call: by one compiled kernel, by torch operations, under ``torch.compile``, and again
for activation checkpointing (paper, Algorithms 1 to 4). Imports the op and what stands below it.

Legend: ``n`` inputs along the first axis = ``g`` mini-batches (steps of the stream) of ``m`` samples; ``c`` features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamnorm.definition.layer import Definition
from streamnorm.definition.masked import masked
from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.inputs import expect_floating, expect_tensor
from streamnorm.nn.affine import gains_of, trusting, unwatched
from streamnorm.nn.freezable import Freezable
from streamnorm.nn.private import refuse_private
from streamnorm.nn.replicas import Replicas
from streamnorm.nn.updates import Follows, first_parameter, nearest_parameters
from streamnorm.ops import backends, cpu
from streamnorm.ops import functional as _op
from streamnorm.ops.across import Across
from streamnorm.ops.fused import Fused, FusedCall
from streamnorm.stream import Memory
from streamnorm.stream.policy import Policy
from streamnorm.tracing import is_traced, refuse_recorded

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


class Trainable(Freezable):
    """The training calls of a layer.

    Attributes:
        num_features: c.
        definition: R, S and N.
        policy: F, G, and what training normalizes with.
        H1, H2: the memories of statistics and of their gradients, or None.
        steps: the number of mini-batches in the input of a call, in their order.
        reverse: whether they arrive at G last to first, as through time.
        unit: gradients are multiplied by it before G.
        loss_scale: gradients are divided by it before G.
        replicas: the processes that share its statistics; None: no others were named or found.
    """

    num_features: int
    definition: Definition
    policy: Policy
    H1: Memory | None
    H2: Memory | None
    steps: int
    reverse: bool
    unit: float
    loss_scale: float
    replicas: Replicas | None = None
    _calls: Calls

    @property
    def ref(self) -> NormRef:
        """R, the normalization reference."""
        return self.definition.ref

    @property
    def moment(self) -> Lp:
        """S, the statistics."""
        return self.definition.moment

    def _train(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        """A training call, by the first of three ways that can compute it: traced, compiled kernel, composition."""
        if self._calls.in_cycle:
            self._expect_first_call()
        if is_traced():
            return self._traced(x, affine, mask)
        if self.H1 is not None and "opacus" in sys.modules:
            self._refuse_private(x)
        if mask is None and cpu.takes(x) and backends.may_use("cpu"):
            y = self._fused(x, affine)
            if y is not None:
                return y
        return self._composed(x, affine, mask)

    def _refuse_private(self, x: Tensor) -> None:
        """Raise if gradients of single samples are recorded of the gain, or without one, of the nearest parameters."""
        own = first_parameter(self)
        refuse_private(self, nearest_parameters(x) if own is None else [own])

    def _expect_first_call(self) -> None:
        """Raise at a second call in a vectorized cycle: its mini-batches would arrive in another order than in the
        loop."""
        if self._is_cyclic() and self.H1 is not None and (is_traced() or not recomputing()):
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
        if self.replicas is not None and self._is_shared_in_batches:
            return False
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
        if remembers and recomputing():
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
            if not self._is_shared_in_batches:  # the count of all is checked later
                self.moment.check_size(self.ref, count)
            if not is_traced():
                self._calls.reference_size = count
        return view

    def _count(self, calls: Calls, latest: Any, x: Tensor) -> None:
        calls.latest = latest
        if calls.in_cycle is not None and self._is_cyclic():
            calls.in_cycle = 1
        calls.follows.called(self, x)

    def _composed(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        """A training call in torch operations."""
        gains = gains_of(affine)
        latest = self._calls.latest
        again = latest if self.H1 is not None and latest and len(latest) == 3 and recomputing() else None
        # Without H1 samples are normalized separately, so steps do not matter; a recomputed call keeps its steps.
        steps, unit = again[0] if again else (self.steps, self.unit / self.loss_scale)
        view = self._check(x, 1 if self.H1 is None else steps)
        if not view.numel() and not self._is_shared_in_batches:
            return empty(x, affine)
        recall = (again[1], again[2]) if again else None
        streams, definition = self._streams(view, recall, unit), self.definition
        if mask is not None:
            view, definition = masked(view, mask, definition)
        joined = gains is not None and not x.is_inference() and _op.joins(view, definition)
        y, estimates, s = _op.normalize(view, definition, streams, *(gains if joined and gains else ()))
        if streams.across is not None:
            self._calls.reference_size = streams.across.count
        if estimates is not None and s is not None and not again:
            self._count(self._calls, ((steps, unit), s, estimates), x)
        # Later layers may change y in place (a ReLU), which autograd forbids for a view of a Function's output.
        y = torch.ops.aten._unsafe_view(y.reshape(x.shape), x.shape)
        if affine is None or joined:
            return y
        samples = view.shape[1] if streams.across is None else streams.across.samples
        return trusting(affine, streams.trust(samples))(y)

    def _traced(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        """A training call under ``torch.compile``: changes nothing but buffers.

        Raises:
            RuntimeError: where the result would be silently wrong.
        """
        if self.policy.uses_estimate:
            refuse_recorded()
        if self.replicas is not None:
            self._refuse_shared("under a compiler, an export or torch.func")
        view = self._check(x, self.steps)
        if not view.numel():
            return empty(x, affine)
        if self._calls.in_cycle is not None and self._is_cyclic():
            self._calls.in_cycle = 1
        streams = self._streams(view, None, self.unit / self.loss_scale)
        definition = self.definition
        if mask is not None:
            torch.ops.aten._assert_async.msg(mask.any(), "a mask that is false everywhere leaves a layer nothing")
            view, definition = masked(view, mask, definition)
        y = _op.normalize_traced(view, definition, streams).reshape(x.shape)
        return y if affine is None else trusting(affine, streams.trust(view.shape[1]))(y)

    def _streams(self, view: Tensor, recall: tuple[Tensor, Tensor] | None, unit: float) -> _op.Streams:
        """The stream's part in a call."""
        across, policy = None, self.policy
        if self.replicas is not None and self._is_shared_in_batches:
            across = Across(self.replicas.group, self.replicas.size)
        return _op.Streams(self.H1, self.H2, policy.uses_estimate, recall, self.reverse, unit, policy.trust, across)

    @property
    def _is_shared_in_batches(self) -> bool:
        """Whether statistics are those of the batches of several processes together."""
        replicas = self.replicas
        return replicas is not None and replicas.sync == "batch" and self.H1 is not None and replicas.size > 1

    def _refuse_shared(self, what: str) -> None:
        if self._is_shared_in_batches:
            raise RuntimeError(
                f"statistics of the batches of several processes together cannot be taken {what}; merge them once a "
                'weight update: streamnorm.synchronize(model, "update")'
            )

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


def empty(x: Tensor, affine: nn.Module | None) -> Tensor:
    """The output for an empty input: the state does not change, and gain and bias have gradients of 0."""
    y = x.clone()
    return y if affine is None else affine(y)


def recomputing() -> bool:
    """Whether autograd is running a backward pass: a forward call inside it is a recomputation."""
    return torch._C._current_graph_task_id() != NOT_RECOMPUTING
