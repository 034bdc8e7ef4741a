"""The op in one compiled call: statistics, F, map and the gain and bias that follow, and the same going back.

What ``op`` composes of a backend's functions and the stream, a kernel on a CPU does here while the data are in the
cache, for the rules and references that it knows. It is a short cut and nothing else: whatever it does not know, and
every call in which something is not finite, is left to ``op``, with the memories as they were. Imports the op and what
stands below it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from streamnorm.kernels import cpu, eager
from streamnorm.kernels.definition import Definition, Statistics
from streamnorm.op import expect_the_same, observe_back, pack, raise_forgotten, refuse_second_derivative, unpack_row
from streamnorm.stream import Exponential, LongShort, Memory

TABLES = 5
"""What a kernel keeps of each step for the way back: mu, sigma, their estimates, and the mean slope."""
SHAPES = 16
"""Kinds of input that a layer remembers what to tell the kernels about."""


class Native:
    """A memory as a kernel sees it: where its members lie, and its rule in numbers."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.rule = memory.rule
        rule: Any = memory.rule
        self.folds = type(rule) is LongShort
        self.keep = rule.keep if self.folds else (1.0, 0.0)
        self._mix, self._rate = (rule.mix, 0.0) if self.folds else ((0.0,) * 3, rule.rate)
        self._short, self._updates = ("short", "updates") if self.folds else ("long", "seen")
        self._addresses: tuple[int, ...] = ()
        self._where: int | None = None
        self._kind: tuple[torch.dtype, int] | None = None

    @staticmethod
    def serves(memory: Memory | None) -> bool:
        """Whether a kernel knows the rule of this memory."""
        return memory is None or type(memory.rule) in (LongShort, Exponential)

    def is_of(self, memory: Memory | None) -> bool:
        """Whether this is that memory, with the rule that it had."""
        return self.memory is memory and self.rule is self.memory.rule

    def address(self, dtype: torch.dtype, slots: int) -> int | None:
        """Where the pointers to the members lie, or None if those are not tables ``(2, slots)`` of ``dtype`` and whole
        counters in the memory of the CPU.

        Buffers move (``.to()``, ``share_memory()``, assignments), so each is looked at every time.
        """
        buffers: Any = self.memory._buffers
        addresses = (
            buffers["long"].data_ptr(),
            buffers[self._short].data_ptr(),
            buffers["estimate"].data_ptr(),
            buffers["count"].data_ptr(),
            buffers[self._updates].data_ptr(),
            buffers["seen"].data_ptr(),
            buffers["skipped"].data_ptr(),
        )
        if addresses != self._addresses:
            self._addresses = ()  # until all below is true: an interrupt leaves nothing half told
            self._pointers = cpu.MemoryPointers(*addresses, (ctypes.c_double * 3)(*self._mix), self._rate)
            estimate = buffers["estimate"]
            usable = all(
                member.is_cpu
                and member.is_contiguous()
                and (member.dtype, member.numel())
                == ((estimate.dtype, estimate.numel()) if member.ndim else (torch.int64, 1))
                for member in buffers.values()
            )
            self._where = ctypes.addressof(self._pointers) if usable else None
            self._kind = (estimate.dtype, estimate.numel())
            self._addresses = addresses
        return self._where if self._kind == (dtype, 2 * slots) else None

    def changing(self) -> Iterator[Tensor]:
        """The members that a call changes."""
        return map(self.memory.get_buffer, (self._short, "estimate", "count", "seen"))


class Told:
    """What the kernels are told about one shape of input, and how they are called for it."""

    __slots__ = (
        "address",
        "backward",
        "dtype",
        "fold",
        "forward",
        "has_gains",
        "plan",
        "reference_size",
        "room",
        "scratch",
        "size",
        "slots",
        "steps",
        "x_dtype",
        "x_shape",
        "x_stride",
    )

    def __init__(self, plan: cpu.Plan, x: Tensor, steps: int, has_gains: bool, reference_size: int) -> None:
        self.plan = plan
        self.reference_size = reference_size
        self.address = ctypes.addressof(plan)
        self.steps = steps
        self.slots = plan.slots
        self.size = plan.k0 * plan.slots
        self.x_dtype, self.x_shape, self.x_stride = x.dtype, x.shape, x.stride()
        self.dtype = cpu.wide(x.dtype)
        self.forward, self.backward = (cpu.kernel(name, x.dtype) for name in ("forward", "backward"))
        self.fold = cpu.fold(self.dtype)
        # What a call leaves for the way back, and room to work in after it.
        self.scratch = TABLES * self.size * self.dtype.itemsize
        self.room = TABLES * self.size + 4 * self.slots
        self.has_gains = has_gains


class Fused:
    """The compiled calls of one layer.

    Args:
        definition: R, S and N of the layer.
        uses_estimate: of its policy.
        H1, H2: its memories, or None.
    """

    def __init__(self, definition: Definition, uses_estimate: bool, H1: Memory | None, H2: Memory | None) -> None:
        self.definition = definition
        self.uses_estimate = uses_estimate
        self.H1 = None if H1 is None else Native(H1)
        self.H2 = None if H2 is None else Native(H2)
        kappa = *(self.H1.keep if self.H1 else (1.0, 0.0)), *(self.H2.keep if self.H2 else (1.0, 0.0))
        self._keep = (ctypes.c_double * 4)(*kappa)
        self._told: dict[Any, Told | None] = {}
        self._latest: Told | None = None

    @staticmethod
    def serves(definition: Definition, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether there are compiled calls for such a layer; ``told`` says for which inputs."""
        whole = definition.ref.samples == ("one" if H1 is None else "batch")
        return whole and Native.serves(H1) and Native.serves(H2) and cpu.serves(definition)

    def is_of(self, definition: Definition, uses_estimate: bool, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether this was made for just these."""
        return (
            self.definition is definition
            and self.uses_estimate is uses_estimate
            and (H1 is None if self.H1 is None else self.H1.is_of(H1))
            and (H2 is None if self.H2 is None else self.H2.is_of(H2))
        )

    def told(self, x: Tensor, steps: int, is_reversed: bool, check: Callable[[Tensor, int], Tensor]) -> Told | None:
        """What the kernels are told about such an input; None: there are no kernels for it.

        ``check(x, steps)`` is asked for every new kind of input: it returns its canonical view, and raises for those
        that the layer refuses.
        """
        key = (x.shape, x.stride(), x.dtype, steps, is_reversed)
        if key in self._told:
            return self._told[key]
        view = check(x, steps)
        plan = cpu.plan(self.definition, steps, tuple(x.shape), x.stride(), self.uses_estimate, is_reversed)
        memories = [native.memory for native in (self.H1, self.H2) if native is not None]
        if plan is not None and any(memory.estimate.numel() != 2 * plan.slots for memory in memories):
            return None  # a memory that gets its shape from this very call
        own = self.definition.ref.groups(x.shape[1]) == x.shape[1]
        has_gains = plan is not None and self.H1 is not None and own and plan.slots == x.shape[1]
        size = self.definition.ref.size(view.shape) if view.numel() else 0
        told = None if plan is None else Told(plan, x, steps, has_gains, size)
        if len(self._told) == SHAPES:
            self._told.clear()
        self._told[key] = told
        self._latest = told or self._latest
        return told

    def addresses(self, told: Told) -> tuple[int | None, int | None]:
        """Where the kernels find H1 and H2; None for what is not there, or not as they can read it."""
        dtype, slots = told.dtype, told.slots
        return self.H1 and self.H1.address(dtype, slots), self.H2 and self.H2.address(dtype, slots)

    def changing(self) -> Iterator[Tensor]:
        """What a forward call changes."""
        return self.H1.changing() if self.H1 is not None else iter(())

    def normalize(
        self, x: Tensor, told: Told, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """``y`` and the tables of this call, or None if it has to be done otherwise.

        ``weight`` and ``bias`` only where ``told.has_gains``.
        """
        dtype = told.dtype
        h1 = None
        if self.H1 is not None and (h1 := self.H1.address(dtype, told.slots)) is None:
            return None
        if weight is not None and not weight.is_cpu:
            return None  # and torch says what it thinks of that
        gain, shift = as_read(weight, dtype), as_read(bias, dtype)
        y = torch.empty_like(x)
        tables = x.new_empty(told.room) if x.dtype is dtype else x.new_empty(told.room, dtype=dtype)
        where = tables.data_ptr()
        failed = told.forward(
            told.address,
            h1,
            x.data_ptr(),
            None if gain is None else gain.data_ptr(),
            None if shift is None else shift.data_ptr(),
            y.data_ptr(),
            where,
            where + told.scratch,
            torch.get_num_threads(),
        )
        if failed:
            return None
        if torch.is_grad_enabled():
            y = _apply(x, weight, bias, (self, told, y, tables))
        return y, tables

    def fold(self) -> bool:
        """The weight update of both memories in one call; False: it has to be done otherwise."""
        H1, H2, told = self.H1, self.H2, self._latest
        if told is None or H1 is None:
            return False
        if not H1.folds:
            return H2 is None  # a weight update means nothing to a running average
        h1, h2 = self.addresses(told)
        if h1 is None or (H2 is not None and (h2 is None or not H2.folds)):
            return False
        told.fold(h1, h2, told.slots, self._keep)
        return True

    def again(self, x: Tensor, told: Told, tables: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``y`` of the call that left ``tables``, computed once more, so that nothing is observed twice.

        Raises:
            RuntimeError: if ``x`` is not the input of that call.
        """
        shape, d = _stat_shape(x, told, self.definition), self.definition
        if shape is None:
            raise_forgotten()
        mu, sigma, est_mu, est_sigma = (table.reshape(shape) for table in tables[: 4 * told.size].chunk(4))
        view = d.ref.view(x.detach(), told.steps)
        data = view.to(told.dtype)
        expect_the_same(eager.mean(data, d), mu)
        y = eager.apply(data, d, *((est_mu, est_sigma) if self.uses_estimate else (mu, sigma)))
        if weight is not None and bias is not None:
            per_feature = (-1, *[1] * (y.ndim - 3))
            y = y * weight.detach().reshape(per_feature) + bias.detach().reshape(per_feature)
        y = torch.empty_like(x).copy_(y.reshape(x.shape))
        return _apply(x, weight, bias, (self, told, y, tables)) if torch.is_grad_enabled() else y


def _stat_shape(x: Tensor, told: Told, d: Definition) -> list[int] | None:
    """The shape of a statistic beside the canonical view of ``x``, if that is what the kernels were told."""
    if x.shape != told.x_shape or x.dtype != told.x_dtype:
        return None
    view = d.ref.view(x, told.steps)
    whole = d.ref.dims(view.ndim)
    return [1 if axis in whole else size for axis, size in enumerate(view.shape)]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know of this module's calls, or has put another ``forward`` in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def as_read(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gain or bias as the kernels read it."""
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous()):
        return parameter
    return parameter.detach().to(dtype).contiguous()


class _Fused(torch.autograd.Function):
    """The way back of a call that has been computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Any) -> Tensor:
        fused, told, y, tables = call
        ctx.save_for_backward(x, weight, tables)
        ctx.call = fused, told
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, tables = ctx.saved_tensors
        fused, told = ctx.call
        dtype, slots = told.dtype, told.slots
        # G is about the gradient of the input: where nobody wants that, nothing is remembered.
        needs = ctx.needs_input_grad
        H2 = fused.H2 if needs[0] else None
        h2 = None if H2 is None else H2.address(dtype, slots)
        # What was saved may have been somewhere else meanwhile, and come back in another order (saved_tensors_hooks).
        if cpu.unseen() or (H2 is not None and h2 is None) or x.stride() != told.x_stride:
            return *_composed(grads[0], x, weight, tables, fused, told, H2), None
        dy = cpu.like(grads[0], x)
        gain = as_read(weight, dtype)
        dx = torch.empty_like(x) if needs[0] else None
        dweight = tables.new_empty(slots) if needs[1] else None
        dbias = tables.new_empty(slots) if needs[2] else None
        where = tables.data_ptr()
        failed = told.backward(
            told.address,
            h2,
            x.data_ptr(),
            None if gain is None else gain.data_ptr(),
            dy.data_ptr(),
            where,
            where + told.scratch,
            None if dx is None else dx.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
            None if dbias is None else dbias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            return *_composed(dy, x, weight, tables, fused, told, H2), None
        return dx, dweight, dbias, None


_apply = super(torch.autograd.Function, _Fused).apply  # type: ignore[attr-defined]
"""``_Fused.apply`` without what it does for transforms of functions, which never come here (``cpu.takes``)."""


def _composed(
    dy: Tensor, x: Tensor, weight: Tensor | None, tables: Tensor, fused: Fused, told: Told, H2: Native | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The way back by torch operations, for what is not finite and for who is watching."""
    d = fused.definition
    data, grad = (d.ref.view(t.to(told.dtype), told.steps) for t in (x, dy))
    shape = _stat_shape(x, told, d)
    assert shape is not None
    mu, sigma, est_mu, est_sigma = (table.reshape(shape) for table in tables[: 4 * told.size].chunk(4))
    mu_hat, sigma_hat = (est_mu, est_sigma) if fused.uses_estimate else (mu, sigma)
    dweight = dbias = None
    if weight is not None:
        rest = [axis for axis in range(data.ndim) if axis != 2]
        dweight = (grad * eager.apply(data, d, mu_hat, sigma_hat)).sum(rest)
        dbias = grad.sum(rest)
        grad = grad * weight.to(told.dtype).reshape(-1, *[1] * (data.ndim - 3))
    g_mu, g_sigma = eager.stat_grads(grad, data, d, mu_hat, sigma_hat)
    if H2 is not None:
        g_hat = observe_back(H2.memory, pack(g_mu, g_sigma, d.ref), None, bool(told.plan.reversed))
        g_mu, g_sigma = unpack_row(g_hat[:, 0], g_mu), unpack_row(g_hat[:, 1], g_sigma)
    center = est_mu if d.moment.center == "estimate" else None
    s = Statistics(mu, sigma, center, mu_hat, sigma_hat)
    dx = eager.input_grad(grad, data, d, s, g_mu, g_sigma)
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias
