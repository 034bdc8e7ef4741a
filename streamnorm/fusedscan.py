"""A normalized RNN or GRU over all time steps in one compiled call, forward and backward.

It computes what the loop of ``scan`` computes, for cells whose hidden path is normalized per feature by rules that
the kernels know. A step's matrix products are done by torch's own BLAS, its norms by the kernels of ``fused``; the
gradients of the weights are one product over all steps. Where it cannot, or where something is not finite, it leaves
the memories as they were, and the loop does it. Imports the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``H`` hidden units, ``k`` gates.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from streamnorm import kernels
from streamnorm.cells import Cell, NormGRUCell, NormRNNCell
from streamnorm.fused import Fused, Told
from streamnorm.kernels import cpu, library
from streamnorm.layers import Affine, Norm
from streamnorm.op import refuse_second_derivative

NAMES: dict[type[Cell], str] = {NormRNNCell: "rnn", NormGRUCell: "gru"}


class Path(ctypes.Structure):
    """One normalized product of the recurrence: ``sn_path`` of ``native/scan.cpp``."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("plan", "h1", "h2", "matrix", "weight", "bias", "input", "product", "tables", "gate"),
            *("dproduct", "dgate", "dweight", "dbias"),
        )
    ]


class Layer(ctypes.Structure):
    """A layer over time: ``sn_layer`` of ``native/scan.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "n", "H", "room", "scratch")),
        ("relu", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("gemm", ctypes.c_void_p),
        ("path", Path * 3),
        *((name, ctypes.c_void_p) for name in ("h0", "out", "masked", "dout", "dh", "dmasked", "spare")),
    ]


def run(cell: Cell, inputs: list[Tensor], steps: int, h0: Tensor) -> Tensor | None:
    """h of every step ``(T n, H)`` from ``Norm(W_x x)`` of every gate ``(T n, H)``; None: the loop has to do it."""
    norms = _served(cell, inputs, h0)
    if norms is None:
        return None
    like = inputs[0].new_empty(h0.shape)
    calls = []
    for norm in norms:
        if norm._calls.fused is None:
            norm._calls.fused = norm._fuse()
        fused = norm._calls.fused
        told = fused.told(like, 1, False, norm._check) if fused else None
        if told is None or not told.has_gains or told.plan.uses_estimate != norm.policy.uses_estimate:
            return None
        calls.append((fused, told))
    through = _Run(cell, norms, calls, steps, h0)
    weights = [weight for weight, _ in cell.hidden_weights()]
    gains = [parameter for norm in norms for parameter in _gains(norm)]
    out = through.forward(inputs, weights, gains)
    if out is None:
        return None
    for norm in norms:
        norm._count(norm._calls, (1, like[:0], like[:0]))  # no call that could be computed again
    return _Scan.apply(through, out, h0, *inputs, *weights, *gains) if torch.is_grad_enabled() else out


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
        modules = [norm] if norm.affine is None else [norm, norm.affine]
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
        )
        if hooked or type(norm.affine) not in (Affine, type(None)) or "forward" in vars(norm):
            return None
    return norms if library.library() is not None and library.gemm(h0.dtype) is not None else None


def _gains(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm.affine is None else (norm.affine.weight, norm.affine.bias)


class _Run:
    """One pass of a layer over a sequence: what the kernels are told, and the memory they work in."""

    def __init__(self, cell: Cell, norms: list[Norm], calls: list[tuple[Fused, Told]], steps: int, h0: Tensor) -> None:
        n, H = h0.shape
        self.calls = calls
        self.norms = norms
        self.name = NAMES[type(cell)]
        self.shape = (steps, n, H)
        self.dtype = h0.dtype
        told = calls[0][1]
        self.room = told.room
        self.layer = Layer(T=steps, n=n, H=H, room=told.room, scratch=told.room - 4 * told.slots)
        self.layer.relu = getattr(cell, "nonlinearity", "tanh") == "relu"
        self.layer.gemm = library.gemm(h0.dtype)
        self.h0 = h0.detach().contiguous()

    def forward(self, inputs: list[Tensor], weights: list[Tensor], gains: list[Tensor | None]) -> Tensor | None:
        """h of every step, or None if something was not finite, with the memories as they were."""
        k, new = len(self.calls), self.h0.new_empty
        self.inputs = [a.detach().contiguous() for a in inputs]
        self.products, self.tables = new(k, *self.shape), new(k, self.shape[0], self.room)
        self.gates, self.masked = (new(k, *self.shape), new(self.shape)) if self.name == "gru" else (None, None)
        out, spare = new(self.shape), new(self.shape[1:])
        before = [(b, b.clone()) for fused, _ in self.calls for b in fused.H1.memory.buffers()]  # type: ignore[union-attr]
        if not self._point(weights, gains):
            return None
        layer = self.layer
        for i, path in enumerate(layer.path[:k]):
            path.input = self.inputs[i].data_ptr()
        layer.h0, layer.out, layer.spare = self.h0.data_ptr(), out.data_ptr(), spare.data_ptr()
        if _kernel(f"{self.name}_forward", self.dtype)(ctypes.addressof(layer)):
            for buffer, old in before:
                buffer.copy_(old)
            return None
        return out.flatten(0, 1)

    def backward(
        self,
        dout: Tensor,
        out: Tensor,
        weights: list[Tensor],
        gains: list[Tensor | None],
        products: Tensor,
        tables: Tensor,
        gates: Tensor | None,
        masked: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of h0, the inputs, the weights and the gains."""
        k, (T, n, H) = len(self.calls), self.shape
        self.products, self.tables, self.gates, self.masked = products, tables, gates, masked
        if not self._point(weights, gains):
            raise RuntimeError("the memories of a recurrent layer were moved between its forward and backward pass")
        dout = dout.contiguous()
        dproducts, dgates = torch.empty_like(products), torch.empty_like(products)
        dgains = dout.new_zeros(2, k, H)
        dh, dmasked, work = dout.new_zeros(n, H), dout.new_empty(n, H), dout.new_empty(2, H)
        layer = self.layer
        for i, path in enumerate(layer.path[:k]):
            path.dproduct, path.dgate = dproducts[i].data_ptr(), dgates[i].data_ptr()
            path.dweight, path.dbias = dgains[0, i].data_ptr(), dgains[1, i].data_ptr()
        layer.h0, layer.out, layer.dout = self.h0.data_ptr(), out.data_ptr(), dout.data_ptr()
        layer.dh, layer.dmasked = dh.data_ptr(), dmasked.data_ptr()
        _kernel(f"{self.name}_backward", self.dtype)(ctypes.addressof(layer), work.data_ptr())
        previous = torch.cat([self.h0, out[: -n or None]]) if T > 1 else self.h0
        entered = [previous] * k if masked is None else [previous, previous, masked.flatten(0, 1)]
        dweights = [dproducts[i].flatten(0, 1).T @ entered[i] for i in range(k)]
        dinputs = [dgates[i].flatten(0, 1) for i in range(k)]
        by_norm = [None if gains[2 * i + j] is None else dgains[j, i] for i in range(k) for j in range(2)]
        return dh, *dinputs, *dweights, *by_norm

    def _point(self, weights: list[Tensor], gains: list[Tensor | None]) -> bool:
        """Tell where everything is; False if a memory is not where the kernels can read it."""
        self.layer.threads = torch.get_num_threads()
        if self.masked is not None:
            self.layer.masked = self.masked.data_ptr()
        for i, (fused, told) in enumerate(self.calls):
            path = self.layer.path[i]
            path.plan = told.address
            path.h1 = fused.H1.address(told.dtype)  # type: ignore[union-attr]
            path.h2 = None if fused.H2 is None else fused.H2.address(told.dtype)
            if path.h1 is None or (fused.H2 is not None and path.h2 is None) or not weights[i].is_contiguous():
                return False
            path.matrix = weights[i].data_ptr()
            gain, bias = gains[2 * i], gains[2 * i + 1]
            path.weight = None if gain is None else gain.data_ptr()
            path.bias = None if bias is None else bias.data_ptr()
            path.product, path.tables = self.products[i].data_ptr(), self.tables[i].data_ptr()
            path.gate = None if self.gates is None else self.gates[i].data_ptr()
        return True


class _Scan(torch.autograd.Function):
    """The way back of a pass that has been computed."""

    @staticmethod
    def forward(ctx: Any, run: _Run, out: Tensor, h0: Tensor, *tensors: Tensor | None) -> Tensor:
        k = len(run.calls)
        ctx.run = run
        ctx.save_for_backward(out, *tensors[k:], run.products, run.tables, run.gates, run.masked)
        run.inputs = run.products = run.tables = run.gates = run.masked = None  # type: ignore[assignment]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        run, (out, *saved) = ctx.run, ctx.saved_tensors
        k = len(run.calls)
        found = run.backward(grads[0], out, saved[:k], saved[k : 3 * k], *saved[3 * k :])
        return None, None, *found


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    backward = name.endswith("backward")
    arguments = [ctypes.c_void_p] * (2 if backward else 1)
    return library.function(f"{name}_{cpu.NAMES[dtype]}", arguments, None if backward else ctypes.c_int)
