"""The op in one compiled call: statistics, F, map and the gain and bias that follow, and the same going back.

What ``op`` composes of a backend's functions and the stream, a kernel on a CPU does here while the data are in the
cache, for the rules and references that it knows. It is a short cut and nothing else: whatever it does not know, and
every call in which something is not finite, is left to ``op``, with the memories as they were. Imports the op and what
stands below it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from streamnorm.kernels import calls, cpu, eager
from streamnorm.kernels.definition import Definition, Statistics
from streamnorm.op import expect_the_same, observe_back, pack, raise_forgotten, second_derivative, unpack_row
from streamnorm.policy import Policy
from streamnorm.stream import Exponential, LongShort, Memory, Pooled, Residual

TABLES = 5
"""What a kernel keeps of each step for the way back: mu, sigma, their estimates, and the mean slope."""
SHAPES = 16
"""Kinds of input that a layer remembers what to tell the kernels about."""


_KNOWN: dict[type, tuple[int, Callable[[Any], tuple[float, ...]], tuple[str, str, str, str]]] = {
    LongShort: (calls.LONG_SHORT, lambda rule: rule.mix, ("long", "short", "count", "updates")),
    Exponential: (calls.EXPONENTIAL, lambda rule: (rule.rate,), ("long", "long", "count", "seen")),
    Pooled: (calls.POOLED, lambda rule: (rule.memory, rule.prior, rule.updates), ("long", "short", "count", "held")),
    Residual: (calls.RESIDUAL, lambda rule: (rule.memory,), ("theta", "theta", "held", "seen")),
}
"""The rules that the kernels know: their kind, their numbers, and the names of their buffers."""


def numbers_of(rule: Any) -> tuple[calls.RuleNumbers, tuple[str, str, str, str]]:
    """A rule as the kernels are told of it, and the buffers that stand for long, short, count and updates."""
    kind, numbers, names = _KNOWN[type(rule)]
    return calls.RuleNumbers(kind, (ctypes.c_double * 3)(*numbers(rule))), names


class Native:
    """A memory as a kernel sees it: where its members lie, and its rule in numbers."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.rule = memory.rule
        rule: Any = memory.rule
        self.folds = type(rule) is not Exponential
        self.keep = rule.keep if type(rule) is LongShort else (1.0, 0.0)
        self.buffers: Any = memory._buffers
        self._rule, (long, short, count, updates) = numbers_of(rule)
        self._names = long, short, "estimate", count, updates, "seen", "skipped"
        self._addresses: tuple[int, ...] = ()
        self._where: int | None = None
        self._kind: tuple[torch.dtype, int] | None = None

    @property
    def members(self) -> calls.Members:
        """The same for the calls, which look for the buffers themselves."""
        names = (ctypes.c_void_p * calls.MEMBERS)(*map(id, self._names))
        return calls.Members(id(self.buffers), names, self._rule)

    def guards(self) -> tuple[calls.Guard, ...]:
        """What the calls must find as it is."""
        of_memory = vars(self.memory)
        return calls.is_still(of_memory, "rule"), calls.is_still(of_memory, "_buffers")

    @staticmethod
    def serves(memory: Memory | None) -> bool:
        """Whether a kernel knows the rule of this memory."""
        return memory is None or type(memory.rule) in _KNOWN

    def is_of(self, memory: Memory | None) -> bool:
        """Whether this is that memory, with the rule that it had."""
        mine = self.memory
        return mine is memory and self.rule is mine.rule and self.buffers is mine._buffers

    def address(self, dtype: torch.dtype, slots: int) -> int | None:
        """Where the pointers to the members lie, or None if those are not tables ``(2, slots)`` of ``dtype`` and whole
        counters in the memory of the CPU.

        Buffers move (``.to()``, ``share_memory()``, assignments), so each is looked at every time.
        """
        buffers = self.buffers
        addresses = tuple([buffers[name].data_ptr() for name in self._names])
        if addresses != self._addresses:
            self._addresses = ()  # until all below is true: an interrupt leaves nothing half told
            self._pointers = cpu.MemoryPointers(*addresses, self._rule)
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


class Told:
    """What the kernels are told about one kind of input, and the calls for it.

    Attributes:
        forward: ``forward(x, weight, bias)``, y in training or None if it has to be done otherwise, which leaves
            everything as it was.
        fold: the weight update of both memories; whether it could be done.
        remembers: whether a call changes H1.
        tables: what the latest call has left.
    """

    __slots__ = (
        *("_alive", "address", "dtype", "fold", "forward", "fused", "has_gains", "plan", "reference_size"),
        *("remembers", "room", "size", "slots", "steps", "struct", "tables"),
        *("x_dtype", "x_shape", "x_stride"),
    )

    def __init__(self, fused: Fused, plan: cpu.Plan, x: Tensor, steps: int, has_gains: bool, size: int) -> None:
        _hand_over()
        self.fused = fused
        self.plan = plan
        self.reference_size = size
        self.steps = steps
        self.slots = plan.slots
        self.size = plan.k0 * plan.slots
        self.x_dtype, self.x_shape, self.x_stride = x.dtype, x.shape, x.stride()
        self.dtype = cpu.wide(x.dtype)
        self.room = TABLES * self.size + 4 * self.slots  # for what a call leaves for the way back, and to work in
        self.has_gains = has_gains
        self.remembers = fused.H1 is not None
        self.tables: Tensor | None = None
        kernels: Any = cpu.kernel("forward", x.dtype), cpu.kernel("backward", x.dtype), cpu.fold(self.dtype)
        keywords = None if x.dtype is self.dtype else {"dtype": self.dtype}
        watch = calls.watch()
        self._alive = (kernels, self.room, keywords, watch)
        code, bits = calls.CODES[x.dtype]
        H1, H2 = fused.H1, fused.H2
        self.struct = calls.Told(
            ctypes.addressof(plan),
            *(ctypes.cast(kernel, ctypes.c_void_p).value for kernel in kernels),
            keep=(ctypes.c_double * 4)(*(H1.keep if H1 else (1.0, 0.0)), *(H2.keep if H2 else (1.0, 0.0))),
            has_h1=H1 is not None,
            has_h2=H2 is not None,
            folds=fused.folds,
            code=code,
            bits=bits,
            wide_bits=calls.CODES[self.dtype][1],
            ndim=x.ndim,
            shape=(ctypes.c_int64 * calls.AXES)(*x.shape),
            stride=(ctypes.c_int64 * calls.AXES)(*x.stride()),
            slots=self.slots,
            scratch=TABLES * self.size * self.dtype.itemsize,
            values=self.room,
            room=id(self.room),
            room_dtype=None if keywords is None else id(keywords),
            wide=id(self.dtype),
            watch=watch.guards,
        )
        self.struct.self = id(self)
        for name, native in (("h1", H1), ("h2", H2)):
            if native is not None:
                setattr(self.struct, name, native.members)
        self.address = ctypes.addressof(self.struct)
        self.forward = calls.callable_of("forward", self.struct)
        self.fold = calls.callable_of("fold", self.struct)


class Shortcut:
    """The call of a layer that was just made, for the next input of its kind if nothing of the layer has changed.

    Args:
        told: what was told about the input.
        memories: guards on H1 and H2.
        guards: on what else has been looked at to choose that call.
        affine: what follows the layer.
        then: what is left to do after the call; None: nothing, gain and bias were part of it.

    Attributes:
        call: ``call(x)``, y or None.
        fold: the weight update of both memories; whether it could be done.
        then: as given.
        latest: that call, for one that is computed again; None if nothing is remembered.
        reference_size: activations in its smallest reference.
    """

    __slots__ = ("_alive", "_struct", "call", "fold", "latest", "reference_size", "then")

    def __init__(
        self,
        told: Told,
        memories: Iterable[calls.Guard],
        guards: Iterable[calls.Guard],
        affine: nn.Module | None,
        then: Callable[[Tensor], Tensor] | None,
    ) -> None:
        joined = then is None
        self.reference_size = told.reference_size
        self.then = then
        self.latest = (told, joined) if told.remembers else None
        parameters = affine._parameters if joined and affine is not None else None
        kept = calls.Kept(memories)
        kept_all = calls.Kept(
            [*kept.objects, *guards, *(_gain_guards(affine) if joined and affine is not None else ())]
        )
        self._alive = told, kept, kept_all, affine, parameters
        self._struct = calls.Shortcut(
            told.address, None if parameters is None else id(parameters), kept_all.guards, kept.guards
        )
        self.call = calls.callable_of("shortcut", self._struct)
        self.fold = calls.callable_of("shortcut_fold", self._struct)


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
        self._told: dict[Any, Told | None] = {}
        self._latest: Told | None = None

    @staticmethod
    def serves(definition: Definition, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether there are compiled calls for such a layer; ``told`` says for which inputs."""
        whole = definition.ref.samples == ("one" if H1 is None else "batch")
        return whole and Native.serves(H1) and Native.serves(H2) and cpu.serves(definition)

    def is_of(self, definition: Definition, policy: Policy, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether this was made for just these."""
        same = self.definition is definition and self.policy is policy
        return same and self.remembers_in(H1, H2)

    def remembers_in(self, H1: Memory | None, H2: Memory | None) -> bool:
        """Whether these are its memories, with the rules that they had."""
        return (H1 is None if self.H1 is None else self.H1.is_of(H1)) and (
            H2 is None if self.H2 is None else self.H2.is_of(H2)
        )

    def told(
        self,
        x: Tensor,
        steps: int,
        is_reversed: bool,
        check: Callable[[Tensor, int], Tensor],
        unit: int = 1,
    ) -> Told | None:
        """What the kernels are told about such an input; None: there are no kernels for it.

        ``unit``: what gradients are multiplied by on their way to G.
        ``check(x, steps)`` is asked for every new kind of input: it returns its canonical view, and raises for those
        that the layer refuses.
        """
        key = (x.shape, x.stride(), x.dtype, steps, is_reversed, unit)
        if key in self._told:
            return self._told[key]
        view = check(x, steps)
        shape, trust = tuple(x.shape), self.policy.trust(x.shape[0] // steps)
        plan = cpu.plan(self.definition, steps, shape, x.stride(), self.uses_estimate, is_reversed, unit, trust)
        memories = [native.memory for native in (self.H1, self.H2) if native is not None]
        if plan is not None and any(memory.estimate.numel() != 2 * plan.slots for memory in memories):
            return None  # a memory that gets its shape from this very call
        own = self.definition.ref.groups(x.shape[1]) == x.shape[1]
        has_gains = plan is not None and self.H1 is not None and own and plan.slots == x.shape[1]
        size = self.definition.ref.size(view.shape) if view.numel() else 0
        told = None if plan is None else Told(self, plan, x, steps, has_gains, size)
        if len(self._told) == SHAPES:
            self._told.clear()
        self._told[key] = told
        self._latest = told or self._latest
        return told

    def addresses(self, told: Told) -> tuple[int | None, int | None]:
        """Where the kernels find H1 and H2; None for what is not there, or not as they can read it."""
        dtype, slots = told.dtype, told.slots
        return self.H1 and self.H1.address(dtype, slots), self.H2 and self.H2.address(dtype, slots)

    def guards(self) -> Iterator[calls.Guard]:
        """What the calls must find as it is."""
        for native in (self.H1, self.H2):
            if native is not None:
                yield from native.guards()

    @property
    def folds(self) -> int:
        """What a weight update means to the memories, as ``native/calls.cpp`` counts it: 0, something that the kernels
        do not know; 1, nothing; 2, both fold."""
        H1, H2 = self.H1, self.H2
        if H1 is None or (H2 is not None and H1.folds != H2.folds):
            return 0
        return 2 if H1.folds else 1

    def fold(self, H1: Memory | None, H2: Memory | None) -> bool:
        """The weight update of both memories in one call; False: it has to be done otherwise."""
        told = self._latest
        return told is not None and self.remembers_in(H1, H2) and told.fold()

    def again(self, x: Tensor, told: Told, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``y`` of the latest call that was told this, computed once more, so that nothing is observed twice.

        Raises:
            RuntimeError: if ``x`` is not the input of that call.
        """
        shape, d, tables = _stat_shape(x, told, self.definition), self.definition, told.tables
        if shape is None or tables is None:
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
        return _apply()(x, weight, bias, (told, y, tables)) if torch.is_grad_enabled() else y


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
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous() and not parameter.is_neg()):
        return parameter
    return parameter.detach().to(dtype).contiguous().resolve_neg()


def _gain_guards(affine: nn.Module) -> Iterator[calls.Guard]:
    """Nobody watches this module's calls, and it has its own ``forward``: what ``is_hooked`` asks."""
    mine = vars(affine)
    yield calls.keeps_its_class(affine)
    yield calls.is_still(mine, "_parameters")
    yield calls.is_still(mine, "forward")
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield calls.stays_empty(mine, name)
    of_all: Any = nn.modules.module.__dict__
    for name in _has_any_global_hook.__code__.co_names:
        yield calls.stays_empty(of_all, name)


@cache
def _apply() -> Callable[..., Tensor]:
    """``apply(x, weight, bias, (told, y, tables))``: y with the way back of a call that has been computed.

    Without what torch's own ``apply`` does for transforms of functions, which never come here (``cpu.takes``).
    """
    forward = staticmethod(calls.callable_of("save"))
    kind: Any = type("Fused", (torch.autograd.Function,), {"forward": forward, "backward": staticmethod(_otherwise)})
    node = (
        kind._backward_cls
    )  # whose ``apply`` in Python calls ``kind.backward``, as torch does that compiles a backward
    node.apply = calls.method_of(node, "apply")
    return super(torch.autograd.Function, kind).apply  # type: ignore[misc]


@cache
def _hand_over() -> None:
    calls.hand_over(_apply(), as_read, cpu.like, _otherwise)


def _otherwise(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The way back where the compiled one cannot be gone."""
    x, weight, tables = ctx.saved_tensors
    told = ctx.told
    if torch.is_grad_enabled():
        d, H1 = told.fused.definition, told.fused.H1
        view, grad = (d.ref.view(t, told.steps) for t in (x, dy))
        return second_derivative(view, grad, d, H1 and H1.memory).reshape(x.shape), None, None, None
    x, tables = x.to(told.x_dtype), tables.to(told.dtype)  # hooks may have kept them otherwise
    H2 = told.fused.H2 if ctx.needs_input_grad[0] else None
    return *_composed(dy, x, weight, tables, told.fused, told, H2), None


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
        dweight = (grad * eager.apply(data, d, mu_hat, sigma_hat)).sum(rest) * told.plan.trust
        dbias = grad.sum(rest) * told.plan.trust
        grad = grad * weight.to(told.dtype).reshape(-1, *[1] * (data.ndim - 3))
    g_mu, g_sigma = eager.stat_grads(grad, data, d, mu_hat, sigma_hat)
    if H2 is not None:
        unit = told.plan.unit
        call = pack(mu, sigma, d.ref), pack(mu_hat, sigma_hat, d.ref)
        g = pack(g_mu, g_sigma, d.ref) * unit
        g_hat = observe_back(H2.memory, g, None, bool(told.plan.reversed), data.shape[1], call) / unit
        g_mu, g_sigma = unpack_row(g_hat[:, 0], g_mu), unpack_row(g_hat[:, 1], g_sigma)
    center = est_mu if d.moment.center == "estimate" else None
    s = Statistics(mu, sigma, center, mu_hat, sigma_hat)
    dx = eager.input_grad(grad, data, d, s, g_mu, g_sigma)
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias
