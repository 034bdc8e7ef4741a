"""A normalized RNN or GRU over all time steps in one compiled call, forward and backward.

It computes what the loop of ``scan`` computes, for cells whose hidden path is normalized per feature by rules that
the kernels know; and the norms of ``W_x x`` on the way, if they know those too. Where it cannot, or where something is
not finite, it leaves the memories as they were, and the loop does it.
Imports the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``H`` hidden units, ``k`` gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.nn.affine import gains_of
from streamnorm.nn.norm import Norm
from streamnorm.nn.recurrent.cells import Cell, NormGRUCell, NormRNNCell
from streamnorm.ops import backends, cpu, library
from streamnorm.ops.functional import refuse_second_derivative
from streamnorm.ops.fused import NOTHING, FusedCall, Native, as_read, is_hooked
from streamnorm.tracing import is_traced

BLOCK = 512
"""The most hidden units that are computed together."""
BLOCKS = 64
"""The most parts that they are cut into: ``Cut::MOST`` of ``csrc/layer.h``."""
MANY = 1 << 16
"""Multiplications in a step's product from which on it is worth several threads."""
FEW = 32
"""The fewest hidden units that are worth a thread."""
NORMS = 6
"""The norms that an operator takes: of ``W h`` and ``W x`` of three gates."""
CELLS = NormRNNCell, NormGRUCell
"""Cells that there are kernels for; they are told apart by how many gates they have."""


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
        calls=[call for _, call in calls],
        gates=len(cell.gates),
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
        or type(cell) not in CELLS
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
        calls: the compiled calls of the norms: of ``W h``, and of ``W x`` unless that comes normalized.
        gates: how many.
        relu: the candidate's non-linearity.
        blocks: in how many parts the units are computed.
    """

    calls: list[FusedCall]
    gates: int
    relu: bool
    blocks: int

    @property
    def normalizes_input(self) -> bool:
        """Whether its input comes before its norms."""
        return len(self.calls) > self.gates

    def forward(
        self, h0: Tensor, x: Tensor, weight: Tensor, gains: list[Tensor | None]
    ) -> tuple[Tensor, Tensor] | None:
        """h of every step ``(T n, H)`` and what the way back needs; None if something was not finite or cannot be read,
        with the memories as they were. ``x (T n, k H)``: what the input brings to the gates."""
        norms = self._norms(gains, [call.fused.H1 for call in self.calls])
        out, tape = library.operators().scan_forward(
            x.contiguous(), h0.contiguous(), weight, self.relu, self.blocks, *norms
        )
        return (out, tape) if tape.numel() else None

    def backward(
        self, dout: Tensor, tape: Tensor, x: Tensor | None, weight: Tensor, gains: list[Tensor | None], learns: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of h0, x, the weight if it ``learns``, and the gains."""
        norms = self._norms(gains, [call.fused.H2 for call in self.calls])
        given = dout.resolve_neg().contiguous(), tape, NOTHING[0] if x is None else x, weight
        compute = library.operators().scan_backward
        dh0, dx, dweight, dgains = compute(*given, self.relu, self.blocks, learns, *norms)
        if not dx.numel():
            raise RuntimeError("the memories of a recurrent layer were moved between its forward and backward pass")
        by_gain = [None if gain is None else d.to(gain.dtype) for gain, d in zip(gains, dgains, strict=True)]
        return dh0, dx, dweight if learns else None, *by_gain

    def _norms(self, gains: list[Tensor | None], memories: list[Native | None]) -> list[Tensor]:
        """What the operators are given of each norm: gain, bias, two buffers and the call; the rest is empty."""
        dtype = self.calls[0].dtype
        read = [NOTHING[0] if gain is None else as_read(gain, dtype) for gain in gains]
        given: list[Tensor] = []
        for call, memory, gain, bias in zip(self.calls, memories, read[::2], read[1::2], strict=True):
            given += (gain, bias, *(NOTHING if memory is None else memory.buffers()), call.bytes)
        return given + [NOTHING[0]] * (5 * NORMS - len(given))


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
