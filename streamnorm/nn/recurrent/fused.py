"""A normalized RNN or GRU over all time steps in one compiled call, forward and backward.

It computes the same as the loop of ``scan``, for cells whose hidden path is normalized per feature by rules that the
kernels support; and the norms of ``W_x x`` along with it, if they support those too. Otherwise, or if a value is not
finite, it leaves the memories unchanged and falls back to the loop.
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
"""The most hidden units in a block."""
BLOCKS = 64
"""The most blocks: ``Cut::MOST`` of ``csrc/layer.h``."""
MANY = 1 << 16
"""Multiplications in a step's matrix product from which several threads pay off."""
FEW = 32
"""The fewest hidden units for which a thread pays off."""
NORMS = 6
"""The norms that an operator takes: of ``W h`` and ``W x`` of three gates."""
CELLS = NormRNNCell, NormGRUCell
"""Cells that have kernels; they are distinguished by their number of gates."""


def run(cell: Cell, data: Tensor, steps: int, h0: Tensor, inputs: list[Tensor] | None = None) -> Tensor | None:
    """h of every step ``(T n, H)`` of ``data (T n, input_size)``; None: use the fallback, all memories are unchanged.

    ``inputs``: ``Norm(W_x x)`` of every gate ``(T n, H)``, if already computed.
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
        norm._count(norm._calls, ((1, 1), nothing, nothing), cell.weight_hh)  # cannot be recomputed
    return _Scan.apply(layer, made, h0, x, cell.weight_hh, *gains) if torch.is_grad_enabled() else made[0]


def _is_read(x: Tensor, like: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read the output of a norm."""
    return cpu.takes(x) and x.dtype is like.dtype and x.shape == shape


def _served(cell: Cell, data: Tensor, h0: Tensor, norms_ih: list[Any]) -> list[tuple[Norm, FusedCall]] | None:
    """The norms of the hidden and of the input path with their compiled calls, if the kernels support all of them and
    nothing is traced or hooked."""
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
        return None  # the loop needs no gradient at the first step, so its H2 does not see one there
    if norms_ih and torch.is_grad_enabled() and not (data.requires_grad or cell.weight_ih.requires_grad):
        return None  # nor for an input path without anything to learn
    norms: list[Any] = [*cell.norm_hh.values(), *norms_ih]
    if library.library() is None:
        return None
    like, calls, seen = h0.new_empty(h0.shape), [], set()
    for norm in norms:
        if not isinstance(norm, Norm) or type(norm).forward is not Norm.forward or not norm.training:
            return None
        memories = {id(memory) for memory in (norm.H1, norm.H2) if memory is not None}
        if norm.H1 is None or norm.steps != 1 or norm.loss_scale != 1 or memories & seen:
            return None  # a shared memory depends on the loop's order of arrivals
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
    """The kernels' parameters for a layer over a sequence.

    Attributes:
        calls: the compiled calls of the norms: of ``W h``, and of ``W x`` unless that is already normalized.
        gates: how many.
        relu: the candidate's nonlinearity.
        blocks: number of blocks that the units are split into.
    """

    calls: list[FusedCall]
    gates: int
    relu: bool
    blocks: int

    @property
    def normalizes_input(self) -> bool:
        """Whether the norms of ``W x`` are part of the call."""
        return len(self.calls) > self.gates

    def forward(
        self, h0: Tensor, x: Tensor, weight: Tensor, gains: list[Tensor | None]
    ) -> tuple[Tensor, Tensor] | None:
        """h of every step ``(T n, H)`` and what the backward pass needs; None if a value was not finite or cannot be
        read, with the memories unchanged. ``x (T n, k H)``: the input's contribution to the gates."""
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
        """The operators' arguments for each norm: gain, bias, two buffers and the call; padded with empty ones."""
        dtype = self.calls[0].dtype
        read = [NOTHING[0] if gain is None else as_read(gain, dtype) for gain in gains]
        given: list[Tensor] = []
        for call, memory, gain, bias in zip(self.calls, memories, read[::2], read[1::2], strict=True):
            given += (gain, bias, *(NOTHING if memory is None else memory.buffers()), call.bytes)
        return given + [NOTHING[0]] * (5 * NORMS - len(given))


def _blocks(n: int, H: int) -> int:
    """The number of blocks of units: as many as pay off as threads, which synchronize at every step."""
    threads = 1 if n * H * H < MANY else min(torch.get_num_threads(), H // FEW)
    return min(max(-(-H // BLOCK), threads, 1), BLOCKS)


class _Scan(torch.autograd.Function):
    """The backward pass of a finished forward pass."""

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
        # Saved-tensor hooks may change the dtype.
        tape, x, weight = (None if t is None else t.to(dtype).contiguous() for t in (tape, x, weight))
        return None, None, *ctx.layer.backward(grads[0], tape, x, weight, gains, learns=ctx.needs_input_grad[4])
