"""The op in one compiled call: statistics, F, map and the gain and bias that follow, and its backward pass.

What ``ops.functional`` composes of a backend's functions and the stream, one CPU operator does here while the data are
in the cache, for the rules and references that its kernels support. It is only a fast path: anything unsupported, and
every call with values that are not finite, falls back to ``ops.functional``, with the memories unchanged. Imports the
op and what stands below it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.ops import cpu, eager, library
from streamnorm.ops.functional import (
    expect_the_same,
    observe_back,
    pack,
    raise_forgotten,
    second_derivative,
    unpack_row,
)
from streamnorm.stream import Exponential, LongShort, Memory, Pooled, Residual
from streamnorm.stream.policy import Policy
from streamnorm.tracing import has_global_hook, is_traced

TABLES = 5
"""What a kernel saves of each step for the backward pass: mu, sigma, their estimates, and the mean slope."""
KINDS = 16
"""Kinds of input whose calls a layer caches."""

_KNOWN: dict[type, tuple[int, Callable[[Any], tuple[float, ...]], tuple[str, str, str, str]]] = {
    LongShort: (cpu.LONG_SHORT, lambda rule: rule.mix, ("long", "short", "count", "updates")),
    Exponential: (cpu.EXPONENTIAL, lambda rule: (rule.rate,), ("long", "long", "count", "seen")),
    Pooled: (cpu.POOLED, lambda rule: (rule.memory, rule.prior, rule.updates), ("long", "short", "count", "held")),
    Residual: (cpu.RESIDUAL, lambda rule: (rule.memory,), ("theta", "theta", "held", "seen")),
}
"""The rules that the kernels support: their kind, their numbers, and the members used as long, short, count and
updates."""


class Native:
    """A memory as the kernels see it: the numbers of its rule, and the indices of its members in its two buffers.

    Attributes:
        at: the mapping that holds its buffers.
        stream: everything else, for an operator.
    """

    def __init__(self, memory: Memory) -> None:
        rule: Any = memory.rule
        kind, numbers, members = _KNOWN[type(rule)]
        self.memory, self.rule = memory, rule
        self.at: Any = memory._at
        self.names = memory._names
        long, short, estimate, *counters = map(
            memory.place, (*members[:2], "estimate", *members[2:], "seen", "skipped")
        )
        k, counts = len(memory.tables), len(memory.counts)
        self.stream = cpu.Stream(
            cpu.RuleNumbers(kind, (ctypes.c_double * 3)(*numbers(rule))),
            cpu.Places(long, short, estimate, k, *counters, counts),
            (ctypes.c_double * 2)(*(rule.keep if type(rule) is LongShort else (1.0, 0.0))),
        )

    @staticmethod
    def serves(memory: Memory | None) -> bool:
        """Whether the kernels support the rule of this memory."""
        return memory is None or type(memory.rule) in _KNOWN

    def buffers(self) -> tuple[Tensor, Tensor]:
        """``tables`` and ``counts`` of the memory."""
        tables, counts = self.names
        return self.at[tables], self.at[counts]


class FusedCall:
    """The call for one kind of input: one shape, memory layout and dtype.

    Attributes:
        fused: the layer's calls, of which this is one.
        way: how the input is split into steps: ``(steps, is_reversed, unit)``.
        bytes: all parameters for the operators.
        has_gains: whether gain and bias are part of the call.
        reference_size: activations in the smallest reference.
        kept: what the latest call saved for its backward pass.
    """

    __slots__ = (
        *("bytes", "dtype", "fused", "has_gains", "kept", "operators", "reference_size", "size", "slots"),
        *("steps", "trust", "way", "x_dtype", "x_shape"),
    )

    def __init__(
        self, fused: Fused, plan: cpu.Plan, x: Tensor, way: tuple[int, bool, float], has_gains: bool, size: int
    ) -> None:
        self.fused = fused
        self.way = way
        self.steps = way[0]
        self.trust = plan.trust
        self.slots = plan.slots
        self.size = plan.k0 * plan.slots
        self.x_dtype, self.x_shape = x.dtype, x.shape
        self.dtype = cpu.wide(x.dtype)
        self.has_gains = has_gains
        self.reference_size = size
        self.kept: Tensor | None = None
        self.operators = library.operators()
        H1, H2 = fused.H1, fused.H2
        axes = ctypes.c_int64 * cpu.AXES
        self.bytes = cpu.Call(
            plan,
            x.ndim,
            axes(*x.shape),
            axes(*x.stride()),
            self.slots,
            TABLES * self.size,
            4 * self.slots,
            [*cpu.NAMES].index(x.dtype),
            H1 is not None,
            H2 is not None,
            0,
            *(cpu.Stream() if native is None else native.stream for native in (H1, H2)),
        ).tensor()

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """``y`` in training, with gain and bias if it ``has_gains``; None: use the fallback, nothing has changed."""
        H1, gain, shift = self.fused.H1, NOTHING[0], NOTHING[0]
        if not self.has_gains:
            weight = bias = None
        elif weight is not None and bias is not None:
            gain, shift = as_read(weight, self.dtype), as_read(bias, self.dtype)
        tables, counts = NOTHING if H1 is None else H1.buffers()
        y, kept = self.operators.forward(x, gain, shift, tables, counts, self.bytes)
        if not kept.numel():
            return None
        self.kept = kept
        return _apply(x, weight, bias, (self, y, kept)) if torch.is_grad_enabled() else y

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, kept: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of x, gain and bias that are needed; None: use the fallback."""
        H2 = self.fused.H2
        tables, counts = NOTHING if H2 is None else H2.buffers()
        gain = NOTHING[0] if weight is None else as_read(weight, self.dtype)
        rest = (x, gain, kept, tables, counts, self.bytes, needs[0] | 2 * needs[1] | 4 * needs[2])
        first = needs.index(True)
        made = None if dy.is_neg() else self.operators.backward(dy, *rest)
        if made is None or not made[first].numel():  # dy may have other strides than x
            made = self.operators.backward(cpu.like(dy, x), *rest)
            if not made[first].numel():
                return None
        dx, dgain, dbias = made
        return dx if needs[0] else None, dgain if needs[1] else None, dbias if needs[2] else None

    def fold(self) -> bool:
        """The weight update of both memories; False: use the fallback."""
        memories = [NOTHING if native is None else native.buffers() for native in (self.fused.H1, self.fused.H2)]
        done: bool = self.operators.fold(*memories[0], *memories[1], self.bytes)
        return done


class Fused:
    """The compiled calls of one layer.

    Args:
        definition: R, S and N of the layer.
        policy: of the layer.
        H1, H2: its memories, or None.
    """

    def __init__(self, definition: Definition, policy: Policy, H1: Memory | None, H2: Memory | None) -> None:
        self.definition = definition
        self.policy = policy
        self.uses_estimate = policy.uses_estimate
        self.H1 = None if H1 is None else Native(H1)
        self.H2 = None if H2 is None else Native(H2)
        self.latest: FusedCall | None = None
        self._calls: dict[Any, FusedCall | None] = {}

    @staticmethod
    def serves(definition: Definition, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether there are compiled calls for such a layer; ``call`` says for which inputs."""
        whole = definition.ref.samples == ("one" if H1 is None else "batch")
        return whole and Native.serves(H1) and Native.serves(H2) and cpu.unsupported(definition) is None

    def is_of(self, definition: Definition, policy: Policy, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether this was made for exactly these, and the memories still have the same rules."""
        f, g = self.H1, self.H2
        return (
            self.definition is definition
            and self.policy is policy
            and (H1 is None if f is None else f.memory is H1 and f.rule is f.memory.rule and f.at is f.memory._at)
            and (H2 is None if g is None else g.memory is H2 and g.rule is g.memory.rule and g.at is g.memory._at)
        )

    def call(
        self,
        x: Tensor,
        steps: int,
        is_reversed: bool,
        check: Callable[[Tensor, int], Tensor],
        unit: float = 1,
    ) -> FusedCall | None:
        """The call for such an input; None: there are no kernels for it.

        ``unit``: gradients are multiplied by it before G.
        ``check(x, steps)`` is called for every new kind of input: it returns its canonical view, and raises for those
        that the layer does not accept.
        """
        way = steps, is_reversed, unit
        key = (x.shape, x.stride(), x.dtype, way)
        if key in self._calls:
            return self._calls[key]
        view = check(x, steps)
        shape, trust = tuple(x.shape), self.policy.trust(x.shape[0] // steps)
        plan = cpu.plan(self.definition, steps, shape, x.stride(), self.uses_estimate, is_reversed, unit, trust)
        memories = [native.memory for native in (self.H1, self.H2) if native is not None]
        if plan is not None and any(memory.estimate.numel() != 2 * plan.slots for memory in memories):
            return None  # a memory that gets its shape from this call
        own = self.definition.ref.groups(x.shape[1]) == x.shape[1]
        has_gains = plan is not None and self.H1 is not None and own and plan.slots == x.shape[1]
        size = self.definition.ref.size(view.shape) if view.numel() else 0
        if len(self._calls) == KINDS:
            self._calls.clear()
        call = self._calls[key] = None if plan is None else FusedCall(self, plan, x, way, has_gains, size)
        return call

    def fold(self) -> bool:
        """The weight update of both memories in one call; False: use the fallback."""
        return self.latest is not None and self.latest.fold()

    def again(self, x: Tensor, call: FusedCall, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Recompute ``y`` of the latest such call, without observing its statistics twice.

        Raises:
            RuntimeError: if ``x`` is not the input of that call.
        """
        shape, d, kept = _stat_shape(x, call, self.definition), self.definition, call.kept
        if shape is None or kept is None:
            raise_forgotten()
        mu, sigma, est_mu, est_sigma = (table.reshape(shape) for table in kept[: 4 * call.size].chunk(4))
        view = d.ref.view(x.detach(), call.steps)
        data = view.to(call.dtype)
        expect_the_same(eager.mean(data, d), mu)
        y = eager.apply(data, d, *((est_mu, est_sigma) if self.uses_estimate else (mu, sigma)))
        if weight is not None and bias is not None:
            per_feature = (-1, *[1] * (y.ndim - 3))
            y = y * weight.detach().reshape(per_feature) + bias.detach().reshape(per_feature)
        y = torch.empty_like(x).copy_(y.reshape(x.shape))
        return _apply(x, weight, bias, (call, y, kept)) if torch.is_grad_enabled() else y


NOTHING = torch.empty(0, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
"""Placeholder for the two buffers of a missing memory; the first also for a missing parameter."""


def _stat_shape(x: Tensor, call: FusedCall, d: Definition) -> list[int] | None:
    """The shape of a statistic, broadcastable to the canonical view of ``x``; None: not an input of this call."""
    if x.shape != call.x_shape or x.dtype != call.x_dtype:
        return None
    view = d.ref.view(x, call.steps)
    whole = d.ref.dims(view.ndim)
    return [1 if axis in whole else size for axis, size in enumerate(view.shape)]


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, or its ``forward`` has been replaced."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or has_global_hook()
    )


def as_read(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A gain or bias in a form that the kernels can read."""
    if parameter.dtype is dtype and not parameter.is_neg() and parameter.is_contiguous():
        return parameter
    return parameter.detach().to(dtype).contiguous().resolve_neg()


class _Backward(torch.autograd.Function):
    """The backward pass of a finished call: ``apply(x, weight, bias, (call, y, kept))`` returns y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, made: tuple[FusedCall, Tensor, Tensor]
    ) -> Tensor:
        ctx.call, y, kept = made
        ctx.save_for_backward(x, weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), call, needs = grads, ctx.call, ctx.needs_input_grad
        x, weight, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            d, H1 = call.fused.definition, call.fused.H1
            view, grad = (d.ref.view(t, call.steps) for t in (x, dy))
            return second_derivative(view, grad, d, H1 and H1.memory).reshape(x.shape), None, None, None
        if not is_traced() and not x.is_neg():
            found = call.backward(dy, x, weight, kept, needs)
            if found is not None:
                return *found, None
        x, kept = x.to(call.x_dtype), kept.to(call.dtype)  # saved-tensor hooks may change the dtype
        return *_composed(dy, x, weight, kept, call, call.fused.H2 if needs[0] else None), None


# Skips the handling of ``torch.func`` transforms in torch's own ``apply``; they never get here (``cpu.takes``).
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Backward).apply  # type: ignore[misc]


def _composed(
    dy: Tensor, x: Tensor, weight: Tensor | None, kept: Tensor, call: FusedCall, H2: Native | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fallback backward pass in torch operations, for values that are not finite and under tracing."""
    fused = call.fused
    d = fused.definition
    data, grad = (d.ref.view(t.to(call.dtype), call.steps) for t in (x, dy))
    shape = _stat_shape(x, call, d)
    assert shape is not None
    mu, sigma, est_mu, est_sigma = (table.reshape(shape) for table in kept[: 4 * call.size].chunk(4))
    mu_hat, sigma_hat = (est_mu, est_sigma) if fused.uses_estimate else (mu, sigma)
    dweight = dbias = None
    if weight is not None:
        rest = [axis for axis in range(data.ndim) if axis != 2]
        dweight = (grad * eager.apply(data, d, mu_hat, sigma_hat)).sum(rest) * call.trust
        dbias = grad.sum(rest) * call.trust
        grad = grad * weight.to(call.dtype).reshape(-1, *[1] * (data.ndim - 3))
    g_mu, g_sigma = eager.stat_grads(grad, data, d, mu_hat, sigma_hat)
    if H2 is not None:
        _, is_reversed, unit = call.way
        s = pack(mu, sigma, d.ref), pack(mu_hat, sigma_hat, d.ref)
        g = pack(g_mu, g_sigma, d.ref) * unit
        g_hat = observe_back(H2.memory, g, None, is_reversed, data.shape[1], s) / unit
        g_mu, g_sigma = unpack_row(g_hat[:, 0], g_mu), unpack_row(g_hat[:, 1], g_sigma)
    center = est_mu if d.moment.center == "estimate" else None
    statistics = Statistics(mu, sigma, center, mu_hat, sigma_hat)
    dx = eager.input_grad(grad, data, d, statistics, g_mu, g_sigma)
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias
