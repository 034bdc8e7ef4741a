"""A normalized RNN or GRU over all time steps in one compiled call, forward and backward.

It computes what the loop of ``scan`` computes, for cells whose hidden path is normalized per feature by rules that
the kernels know. A step's norms are done by the kernels of ``fused``; the gradients of the weights are one product over
all steps. Where it cannot, or where something is not finite, it leaves the memories as they were, and the loop does it.
Imports the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``H`` hidden units, ``k`` gates.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from streamnorm import kernels
from streamnorm.cells import Cell, NormGRUCell, NormRNNCell
from streamnorm.fused import Fused, Told, as_read, is_hooked
from streamnorm.kernels import cpu, library
from streamnorm.norm import Norm, gains_of
from streamnorm.op import refuse_second_derivative

LINE = 16
"""Values that fill a cache line, or two."""
MANY = 1 << 19
"""Multiplications in a step's product from which on it is worth several threads."""
NAMES: dict[type[Cell], str] = {NormRNNCell: "rnn", NormGRUCell: "gru"}


class Path(ctypes.Structure):
    """One normalized product of the recurrence: ``sn_path`` of ``native/scan.cpp``."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("plan", "h1", "h2", "matrix", "packed", "weight", "bias", "input", "product", "tables", "gate"),
            *("dproduct", "dgate", "dweight", "dbias"),
        )
    ]


class Layer(ctypes.Structure):
    """A layer over time: ``sn_layer`` of ``native/scan.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "n", "H", "apart", "room", "scratch")),
        ("relu", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("path", Path * 3),
        *((name, ctypes.c_void_p) for name in ("states", "masked", "dout", "dh", "dmasked", "spare")),
    ]


def run(cell: Cell, inputs: list[Tensor], steps: int, h0: Tensor) -> Tensor | None:
    """h of every step ``(T n, H)`` from ``Norm(W_x x)`` of every gate ``(T n, H)``; None: the loop has to do it."""
    norms = _served(cell, inputs, h0)
    if norms is None:
        return None
    like = inputs[0].new_empty(h0.shape)
    calls = []
    for norm in norms:
        fused = norm.compiled()
        told = fused.told(like, 1, False, norm._check) if fused else None
        if fused is None or told is None or not told.has_gains:
            return None
        calls.append((fused, told))
    weights = [weight for weight, _ in cell.hidden_weights()]
    gains = [gain for norm in norms for gain in gains_of(norm.affine) or (None, None)]
    if not (h0.requires_grad or any(weight.requires_grad for weight in weights)):
        return None  # the loop asks for no gradient at the first step, and H2 would miss it
    layer = _Layer(NAMES[type(cell)], tuple(calls), (steps, *h0.shape), getattr(cell, "nonlinearity", "") == "relu")
    made = layer.forward(h0, inputs, weights, gains)
    if made is None:
        return None
    for norm in norms:
        norm._count(norm._calls, ((1, 1), like[:0], like[:0]))  # no call that could be computed again
    if not torch.is_grad_enabled():
        return made.states[1:, :, : h0.shape[1]].flatten(0, 1)
    return _Scan.apply(layer, made, h0, *inputs, *weights, *gains)


def _served(cell: Cell, inputs: list[Tensor], h0: Tensor) -> list[Norm] | None:
    """The norms of the hidden path, if the kernels know them and nobody watches."""
    if type(cell) not in NAMES or not kernels.may_use("cpu") or cell.norm_hh is None:
        return None
    if not cpu.takes(h0) or h0.dtype not in (torch.float32, torch.float64) or torch._C._current_graph_task_id() != -1:
        return None
    if any(a.dtype is not h0.dtype for a in (*inputs, cell.weight_hh)) or torch.is_autocast_enabled("cpu"):
        return None
    norms: list[Any] = list(cell.norm_hh.values())
    for norm in norms:
        if not isinstance(norm, Norm) or not norm.training or norm.H1 is None or norm.steps != 1:
            return None
        if is_hooked(norm) or (norm.affine is not None and gains_of(norm.affine) is None):
            return None
    if len(set(map(id, norms))) < len(norms):
        return None  # one norm for several gates meets their gradients in the loop's order
    return norms if library.library() is not None else None


@dataclass
class _Made:
    """What a pass leaves for the way back: h before the first step and after each ``(T + 1, n, H')``, the products
    ``W h`` ``(k, T, n, H')``, the tables of their norms, and of a GRU the gates and the reset states.

    H' >= H is how far rows are apart.
    """

    states: Tensor
    products: Tensor
    tables: Tensor
    gates: Tensor | None
    masked: Tensor | None


@dataclass(frozen=True)
class _Layer:
    """A layer over a sequence, as the kernels are told of it.

    Attributes:
        name: the kind of its cell.
        calls: the compiled calls of the norms of the hidden path, and what they are told.
        shape: ``(T, n, H)``.
        relu: the candidate's non-linearity.
    """

    name: str
    calls: tuple[tuple[Fused, Told], ...]
    shape: tuple[int, ...]
    relu: bool

    def forward(
        self, h0: Tensor, inputs: list[Tensor], weights: list[Tensor], gains: list[Tensor | None]
    ) -> _Made | None:
        """What a pass makes, or None if something was not finite, with the memories as they were."""
        (T, n, H), k, new = self.shape, len(self.calls), h0.new_empty
        is_gru = self.name == "gru"
        apart = H if self._threads() == 1 else -(-H // LINE) * LINE
        made = _Made(
            states=new(T + 1, n, apart),
            products=new(k, T, n, apart),
            tables=new(k, T, self.calls[0][1].room),
            gates=new(k, T, n, apart) if is_gru else None,
            masked=new(T, n, apart) if is_gru else None,
        )
        made.states[0, :, :H] = h0.detach()
        layer = self._told(made, weights, gains)
        if layer is None:
            return None
        inputs, spare = [a.detach().contiguous() for a in inputs], new(2, n, apart)
        for path, a in zip(layer.path, inputs, strict=False):
            path.input = a.data_ptr()
        layer.spare = spare.data_ptr()
        before = [(b, b.clone()) for fused, _ in self.calls for b in fused.changing()]
        if _kernel(f"{self.name}_forward", h0.dtype)(ctypes.addressof(layer)):
            for buffer, old in before:
                buffer.copy_(old)
            return None
        return made

    def backward(
        self, dout: Tensor, made: _Made, weights: list[Tensor], gains: list[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of h0, the inputs, the weights and the gains."""
        k, (_, n, H) = len(self.calls), self.shape
        layer = self._told(made, weights, gains)
        if layer is None:
            raise RuntimeError("the memories of a recurrent layer were moved between its forward and backward pass")
        dout = dout.contiguous()
        dproducts, dgates = torch.empty_like(made.products), torch.empty_like(made.products)
        dgains = dout.new_zeros(2, k, H)
        dh = dout.new_zeros(n, made.states.shape[-1])
        dmasked, work = torch.empty_like(dh), dout.new_empty(2, H)
        for i, path in enumerate(layer.path[:k]):
            path.dproduct, path.dgate = dproducts[i].data_ptr(), dgates[i].data_ptr()
            path.dweight, path.dbias = dgains[0, i].data_ptr(), dgains[1, i].data_ptr()
        layer.dout, layer.dh, layer.dmasked = dout.data_ptr(), dh.data_ptr(), dmasked.data_ptr()
        _kernel(f"{self.name}_backward", dout.dtype)(ctypes.addressof(layer), work.data_ptr())
        previous = made.states[:-1, :, :H].flatten(0, 1)
        entered = [previous] * k if made.masked is None else [previous, previous, made.masked[..., :H].flatten(0, 1)]
        dweights = [dproducts[i, ..., :H].flatten(0, 1).T @ entered[i] for i in range(k)]
        dinputs = [dgates[i, ..., :H].flatten(0, 1) for i in range(k)]
        by_norm = [None if gain is None else dgains[j % 2, j // 2].to(gain.dtype) for j, gain in enumerate(gains)]
        return dh[:, :H], *dinputs, *dweights, *by_norm

    def _threads(self) -> int:
        """How many threads are worth their waiting for each other."""
        _, n, H = self.shape
        return 1 if n * H * H < MANY else torch.get_num_threads()

    def _told(self, made: _Made, weights: list[Tensor], gains: list[Tensor | None]) -> Layer | None:
        """Where everything is; None if a memory or a matrix is not where the kernels can read it."""
        T, n, H = self.shape
        told, apart = self.calls[0][1], made.states.shape[-1]
        layer = Layer(T, n, H, apart, told.room, told.room - 4 * told.slots, self.relu, self._threads())
        layer.states = made.states.data_ptr()
        layer.masked = None if made.masked is None else made.masked.data_ptr()
        layer.packed = made.states.new_empty(len(self.calls), H * (H + LINE))
        layer.plans = []  # these live as long as they are pointed to
        layer.gains = [as_read(gain, told.dtype) for gain in gains]
        for i, (path, (fused, told)) in enumerate(zip(layer.path, self.calls, strict=False)):
            plan = cpu.Plan.from_buffer_copy(told.plan)
            plan.xr0 = apart
            layer.plans.append(plan)
            path.plan = ctypes.addressof(plan)
            path.h1, path.h2 = fused.addresses(told)
            if path.h1 is None or (fused.H2 is not None and path.h2 is None) or not weights[i].is_contiguous():
                return None
            path.matrix, path.packed = weights[i].data_ptr(), layer.packed[i].data_ptr()
            path.weight, path.bias = (
                None if gain is None else gain.data_ptr() for gain in layer.gains[2 * i : 2 * i + 2]
            )
            path.product, path.tables = made.products[i].data_ptr(), made.tables[i].data_ptr()
            path.gate = None if made.gates is None else made.gates[i].data_ptr()
        return layer


class _Scan(torch.autograd.Function):
    """The way back of a pass that has been computed."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, made: _Made, h0: Tensor, *tensors: Tensor | None) -> Tensor:
        k = len(layer.calls)
        ctx.layer = layer
        ctx.save_for_backward(*tensors[k:], made.states, made.products, made.tables, made.gates, made.masked)
        T, n, H = layer.shape
        out = h0.new_empty(T * n, H)  # a copy: what goes out may be changed in place
        out.view(T, n, H).copy_(made.states[1:, :, :H])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        layer, saved = ctx.layer, ctx.saved_tensors
        k = len(layer.calls)
        return None, None, *layer.backward(grads[0], _Made(*saved[3 * k :]), [*saved[:k]], [*saved[k : 3 * k]])


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    backward = name.endswith("backward")
    arguments = [ctypes.c_void_p] * (2 if backward else 1)
    return library.function(f"{name}_{cpu.NAMES[dtype]}", arguments, None if backward else ctypes.c_int)
