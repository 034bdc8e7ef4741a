"""A normalized RNN or GRU over all time steps in one compiled call, forward and backward.

It computes what the loop of ``scan`` computes, for cells whose hidden path is normalized per feature by rules that
the kernels know; and the norms of ``W_x x`` on the way, if they know those too. Where it cannot, or where something is
not finite, it leaves the memories as they were, and the loop does it.
Imports the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``H`` hidden units, ``k`` gates.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.nn.norm import Norm, gains_of
from streamnorm.nn.recurrent.cells import Cell, NormGRUCell, NormRNNCell
from streamnorm.ops import backends, cpu, library
from streamnorm.ops.functional import refuse_second_derivative
from streamnorm.ops.fused import FusedCall, as_read, is_hooked
from streamnorm.tracing import is_traced

BLOCK = 512
"""The most hidden units that are computed together."""
BLOCKS = 64
"""The most parts that they are cut into: ``Cut::MOST`` of ``csrc/layer.h``."""
MANY = 1 << 16
"""Multiplications in a step's product from which on it is worth several threads."""
FEW = 32
"""The fewest hidden units that are worth a thread."""
NAMES: dict[type[Cell], str] = {NormRNNCell: "rnn", NormGRUCell: "gru"}


class Site(ctypes.Structure):
    """A norm of ``W h`` or ``W x``, or nulls: ``sn_site`` of ``csrc/layer.h``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("plan", "h1", "h2", "weight", "bias", "dweight", "dbias")]


class Layer(ctypes.Structure):
    """A layer over time: ``sn_layer`` of ``csrc/layer.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "n", "H")),
        *((name, ctypes.c_int32) for name in ("paths", "relu", "blocks", "threads")),
        *((name, Site * 3) for name in ("hidden", "input")),
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "h0", "out", "dout", "dh0", "dx", "dmatrix")),
        *((name, ctypes.c_void_p) for name in ("tape", "work")),
    ]


def run(cell: Cell, data: Tensor, steps: int, h0: Tensor, inputs: list[Tensor] | None = None) -> Tensor | None:
    """h of every step ``(T n, H)`` of ``data (T n, input_size)``; None, with all memories as they were: it has to be
    done otherwise.

    ``inputs``: ``Norm(W_x x)`` of every gate ``(T n, H)``, where they are known.
    """
    norms_ih = [] if cell.norm_ih is None or inputs is not None else [*cell.norm_ih.values()]
    calls = _served(cell, data, h0, norms_ih)
    if calls is None or (inputs is not None and not all(_is_read(a, h0, (len(data), h0.shape[1])) for a in inputs)):
        return None
    x = F.linear(data, cell.weight_ih, cell.bias_ih) if inputs is None else torch.cat(inputs, 1)
    gains = [gain for norm, _ in calls for gain in gains_of(norm.affine) or (None, None)]
    layer = _Layer(
        name=NAMES[type(cell)],
        calls=[call for _, call in calls],
        gates=len(cell.gates),
        shape=(steps, *h0.shape),
        relu=getattr(cell, "nonlinearity", "") == "relu",
        blocks=_blocks(*h0.shape),
    )
    made = layer.forward(h0, x, cell.weight_hh, gains)
    if made is None:
        return None
    nothing = made[0][:0]
    for norm, *_ in calls:
        norm._count(norm._calls, ((1, 1), nothing, nothing))  # no call that could be computed again
    return _Scan.apply(layer, made, h0, x, cell.weight_hh, *gains) if torch.is_grad_enabled() else made[0]


def _is_read(x: Tensor, like: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read what somebody's norm has made."""
    return cpu.takes(x) and x.dtype is like.dtype and x.shape == shape


def _served(cell: Cell, data: Tensor, h0: Tensor, norms_ih: list[Any]) -> list[tuple[Norm, FusedCall]] | None:
    """The norms of the hidden path and of the input's with their compiled calls, if the kernels know all of them and
    nobody watches."""
    if (
        is_traced()
        or type(cell) not in NAMES
        or not backends.may_use("cpu")
        or cell.norm_hh is None
        or h0.shape[1] > BLOCKS * BLOCK
    ):
        return None
    if h0.dtype not in (torch.float32, torch.float64) or torch._C._current_graph_task_id() != -1:
        return None
    given = h0, data, cell.weight_ih, cell.weight_hh
    if not all(cpu.takes(a) and a.dtype is h0.dtype for a in given) or torch.is_autocast_enabled("cpu"):
        return None
    if not (h0.requires_grad or cell.weight_hh.requires_grad):
        return None  # the loop asks for no gradient at the first step, and H2 would miss it
    if norms_ih and torch.is_grad_enabled() and not (data.requires_grad or cell.weight_ih.requires_grad):
        return None  # nor for an input that nothing is to be learned from
    norms: list[Any] = [*cell.norm_hh.values(), *norms_ih]
    if library.library() is None:
        return None
    like, calls, seen = h0.new_empty(h0.shape), [], set()
    for norm in norms:
        if not isinstance(norm, Norm) or type(norm).forward is not Norm.forward or not norm.training:
            return None
        memories = {id(memory) for memory in (norm.H1, norm.H2) if memory is not None}
        if norm.H1 is None or norm.steps != 1 or memories & seen:
            return None  # a memory at several places meets what arrives in the loop's order
        seen |= memories
        if is_hooked(norm) or (norm.affine is not None and gains_of(norm.affine) is None):
            return None
        fused = norm.compiled()
        call = fused.call(like, 1, False, norm._check) if fused else None
        if call is None or not call.has_gains:
            return None
        calls.append((norm, call))
    return calls


@dataclass(frozen=True)
class _Layer:
    """A layer over a sequence, as the kernels are told of it.

    Attributes:
        name: the kind of its cell.
        calls: the compiled calls of the norms: of ``W h``, and of ``W x`` unless that comes normalized.
        gates: how many.
        shape: ``(T, n, H)``.
        relu: the candidate's non-linearity.
        blocks: in how many parts the units are computed.
    """

    name: str
    calls: list[FusedCall]
    gates: int
    shape: tuple[int, ...]
    relu: bool
    blocks: int

    @property
    def normalizes_input(self) -> bool:
        """Whether its input comes before its norms."""
        return len(self.calls) > self.gates

    def forward(
        self, h0: Tensor, x: Tensor, weight: Tensor, gains: list[Tensor | None]
    ) -> tuple[Tensor, Tensor] | None:
        """h of every step ``(T n, H)`` and what the way back needs; None if something was not finite, with the memories
        as they were. ``x (T n, k H)``: what the input brings to the gates."""
        T, n, H = self.shape
        layer = self._told(weight, gains)
        if layer is None:
            return None
        room = _room(layer)
        out, tape, work = h0.new_empty(T * n, H), h0.new_empty(room[0]), h0.new_empty(room[1])
        h0, x = h0.detach().contiguous(), x.detach().contiguous()
        layer.h0, layer.x, layer.out, layer.tape, layer.work = (t.data_ptr() for t in (h0, x, out, tape, work))
        wrong = _kernel(f"{self.name}_forward", h0.dtype)(ctypes.addressof(layer))
        return None if wrong else (out, tape)

    def backward(
        self, dout: Tensor, tape: Tensor, x: Tensor | None, weight: Tensor, gains: list[Tensor | None], learns: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of h0, x, the weight if it ``learns``, and the gains."""
        (T, n, H), new = self.shape, dout.new_empty
        layer = self._told(weight, gains)
        if layer is None:
            raise RuntimeError("the memories of a recurrent layer were moved between its forward and backward pass")
        dh0, dx, dgains, work = new(n, H), new(T * n, self.gates * H), new(len(gains), H), new(_room(layer)[2])
        dweight = torch.empty_like(weight) if learns else None
        dout = dout.resolve_neg().contiguous()
        layer.dout, layer.dh0, layer.tape, layer.work = (t.data_ptr() for t in (dout, dh0, tape, work))
        layer.dx, layer.dmatrix = dx.data_ptr(), None if dweight is None else dweight.data_ptr()
        layer.x = None if x is None else x.data_ptr()
        for site, dgain, dbias in zip(self._sites(layer), dgains[::2], dgains[1::2], strict=True):
            site.dweight, site.dbias = dgain.data_ptr(), dbias.data_ptr()
        _kernel(f"{self.name}_backward", dout.dtype)(ctypes.addressof(layer))
        by_gain = [None if gain is None else d.to(gain.dtype) for gain, d in zip(gains, dgains, strict=True)]
        return dh0, dx, dweight, *by_gain

    def _told(self, weight: Tensor, gains: list[Tensor | None]) -> Layer | None:
        """Where everything is; None if a memory or the matrix is not where the kernels can read it."""
        if not weight.is_contiguous():
            return None
        layer = Layer(*self.shape, self.gates, self.relu, self.blocks, min(self.blocks, torch.get_num_threads()))
        layer.matrix = weight.data_ptr()
        dtype = self.calls[0].dtype
        read = [None if gain is None else as_read(gain, dtype) for gain in gains]
        kept: list[Any] = [*read]
        layer.kept_alive = kept  # as long as they are pointed to
        pairs = zip(read[::2], read[1::2], strict=True)
        for site, call, (gain, bias) in zip(self._sites(layer), self.calls, pairs, strict=True):
            site.plan = ctypes.addressof(call.plan)
            for name, native in (("h1", call.fused.H1), ("h2", call.fused.H2)):
                if native is None:
                    continue
                pointers = native.pointers(call.dtype, call.slots)
                if pointers is None:
                    return None
                kept.append(pointers)
                setattr(site, name, ctypes.addressof(pointers))
            if gain is not None and bias is not None:
                site.weight, site.bias = gain.data_ptr(), bias.data_ptr()
        return layer

    def _sites(self, layer: Layer) -> list[Site]:
        """Where the norms stand, in the order of ``calls``."""
        k = self.gates
        return [*layer.hidden[:k], *layer.input[:k]][: len(self.calls)]


def _blocks(n: int, H: int) -> int:
    """How many parts the units are computed in: as many as are worth a thread, which waits for the others."""
    threads = 1 if n * H * H < MANY else min(torch.get_num_threads(), H // FEW)
    return min(max(-(-H // BLOCK), threads, 1), BLOCKS)


class _Scan(torch.autograd.Function):
    """The way back of a pass that has been computed."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, made: tuple[Tensor, Tensor], h0: Tensor, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        out, tape = made
        ctx.layer = layer
        ctx.save_for_backward(tape, x if layer.normalizes_input else None, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dtype = grads[0].dtype
        tape, x, weight, *gains = ctx.saved_tensors
        # Hooks may have kept them otherwise.
        tape, x, weight = (None if t is None else t.to(dtype).contiguous() for t in (tape, x, weight))
        return None, None, *ctx.layer.backward(grads[0], tape, x, weight, gains, learns=ctx.needs_input_grad[4])


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    answer = ctypes.c_int if name.endswith("forward") else None
    return library.function(f"{name}_{cpu.NAMES[dtype]}", [ctypes.c_void_p], answer)


def _room(layer: Layer) -> Any:
    """Values that its tape takes, the room for a call forward, and that for one back."""
    room = (ctypes.c_int64 * 3)()
    library.function("scan_room", [ctypes.c_void_p, ctypes.c_void_p])(ctypes.addressof(layer), ctypes.addressof(room))
    return room
