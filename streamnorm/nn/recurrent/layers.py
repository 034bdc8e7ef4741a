"""Normalized recurrent networks, replacing ``torch.nn.RNN``, ``GRU`` and ``LSTM`` (sections 4 and 5).

Cells stacked in layers and directions, sequences in every form that torch accepts. Imports the scan, the cells and what
stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``N`` = T n rows, or the rows of a packed sequence.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from streamnorm.nn.affine import Device
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.norm import Calls, Norm
from streamnorm.nn.recurrent.cells import (
    Cell,
    HiddenNorm,
    Nonlinearity,
    NormGRUCell,
    NormLSTMCell,
    NormRNNCell,
    State,
    expect,
    given_state,
)
from streamnorm.nn.recurrent.scan import scan
from streamnorm.nn.timespecific import Factory, TimeSpecificNorm
from streamnorm.ops import functional
from streamnorm.tracing import is_readable, is_traced

BackwardStats = Literal["saved", "latest"]
INSTEAD = {
    "bias": "a norm brings its own bias (affine), and a path without a norm always has one",
    "proj_size": "nothing projects h; put a torch.nn.Linear behind it",
}
"""What to do instead of using arguments that torch's layers have and these do not."""


# --- sequences ---


@dataclass(frozen=True)
class _Sequences:
    """Sequences in packed form, converted from any input form.

    Attributes:
        data: ``(N, input_size)``, step after step.
        sizes: sequences at each step, never increasing.
        order: the indices that sort sequences by length, and their inverse; None if not needed.
        write: converts rows ``(N, features)`` to the form of the input.
    """

    data: Tensor
    sizes: tuple[int, ...]
    order: tuple[Tensor | None, Tensor | None]
    write: Callable[[Tensor], Any]

    @staticmethod
    def of(x: Any, name: str, input_size: int, batch_first: bool, weight: Tensor) -> _Sequences:
        if isinstance(x, PackedSequence):
            return _Sequences._packed(x, name, input_size, weight)
        axes = "(n, T, input_size)" if batch_first else "(T, n, input_size)"
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} takes a tensor {axes} or (T, input_size), or a PackedSequence, got {type(x).__name__}"
            )
        if x.ndim not in (2, 3) or x.shape[-1] != input_size:
            raise ValueError(
                f"{name} takes {axes} or (T, input_size) with input_size {input_size}, got {tuple(x.shape)}"
            )
        steps_first = x.unsqueeze(1) if x.ndim == 2 else x.transpose(0, 1) if batch_first else x
        T, n = steps_first.shape[:2]
        if not T:
            raise ValueError(f"{name} got {n} sequences of no time steps in {tuple(x.shape)}; give at least one step")
        expect("the input", x, tuple(x.shape), weight)

        def write(rows: Tensor) -> Tensor:
            y = rows.reshape(T, n, rows.shape[1])
            return y.squeeze(1) if x.ndim == 2 else y.transpose(0, 1) if batch_first else y

        return _Sequences(steps_first.reshape(T * n, x.shape[-1]), (n,) * T, (None, None), write)

    @staticmethod
    def _packed(x: PackedSequence, name: str, input_size: int, weight: Tensor) -> _Sequences:
        sizes = tuple(x.batch_sizes.tolist())
        fits = bool(sizes) and sizes[-1] > 0 and list(sizes) == sorted(sizes, reverse=True)
        if not fits or sum(sizes) != len(x.data):
            shown = f"{sizes}" if len(sizes) < 9 else f"{sizes[:8]} and so on"
            raise ValueError(
                f"{name} got a packed batch of {len(x.data)} rows with batch_sizes {shown}, {sum(sizes)} in all; they "
                "must never increase, be at least 1 and add up to the rows; pack with torch.nn.utils.rnn.pack_sequence"
            )
        expect("the packed data", x.data, (len(x.data), input_size), weight, "(rows, input_size)")

        def write(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, x.batch_sizes, x.sorted_indices, x.unsorted_indices)

        return _Sequences(x.data, sizes, (x.sorted_indices, x.unsorted_indices), write)


# --- layers ---


class Recurrent(nn.Module):
    """Base class of the layers: cells stacked and in both directions, in torch's conventions.

    Attributes:
        cells: one for each layer and direction: ``l0``, ``l0_reverse``, ``l1``, ...
        beside_torch: whether weights can be exchanged with torch's layer.
    """

    beside_torch: ClassVar[str] = "Without a norm it computes the same; a path with a norm has no bias of its own."

    def __new__(cls, *_: Any, **options: Any) -> Self:
        known = inspect.signature(cls.__init__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        for name in options:
            if name not in known and not takes_any:
                what = INSTEAD.get(name, f"it takes {', '.join(list(known)[1:])}")
                raise TypeError(f"{cls.__name__} has no {name}: {what}")
        return super().__new__(cls)

    def __init__(
        self,
        make: Callable[[int], Cell],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        backward_stats: BackwardStats,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
            raise ValueError(f"num_layers is a whole number >= 1, got {num_layers!r}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a probability in [0, 1], got {dropout!r}")
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers and there is one; set num_layers > 1", stacklevel=3)
        if backward_stats not in ("saved", "latest"):
            raise ValueError(f'backward_stats is "saved" or "latest", got {backward_stats!r}')
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.backward_stats: BackwardStats = backward_stats
        self._directions = ("", "_reverse") if bidirectional else ("",)
        self.cells = nn.ModuleDict()
        for layer in range(num_layers):
            width = hidden_size * len(self._directions) if layer else input_size
            self.cells.update({f"l{layer}{direction}": make(width) for direction in self._directions})
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward(self, x: Any, hx: Any = None) -> tuple[Any, Any]:
        cells: list[Cell] = list(self.cells.values())  # type: ignore[arg-type]
        weight = cells[0].weight_ih
        sequences = _Sequences.of(x, type(self).__name__, self.input_size, self.batch_first, weight)
        single = isinstance(x, Tensor) and x.ndim == 2
        shape = (len(cells), *(() if single else sequences.sizes[:1]), self.hidden_size)
        words = f"(num_layers{' * 2' if self.bidirectional else ''}, {'' if single else 'n, '}hidden_size)"
        names = tuple(f"{name}_0" for name in cells[0].states)
        state = given_state(hx, names, shape, words, sequences.data, weight)
        if single:
            state = tuple(part.unsqueeze(1) for part in state)
        sort, unsort = sequences.order
        if sort is not None:
            state = tuple(part.index_select(1, sort) for part in state)
        from_zeros = hx is None or (is_readable(state[0]) and not state[0].any())
        references = self._refuse(cells, sequences, from_zeros)
        with functional.latest_statistics() if self.backward_stats == "latest" else nullcontext():
            rows, final = self._through_layers(cells, sequences, state)
        for calls, size in references:
            calls.reference_size = size
        if unsort is not None:
            final = tuple(part.index_select(1, unsort) for part in final)
        if single:
            final = tuple(part.squeeze(1) for part in final)
        return sequences.write(rows), final[0] if len(final) == 1 else final

    def _through_layers(self, cells: list[Cell], sequences: _Sequences, state: State) -> tuple[Tensor, State]:
        rows, finals, directions = sequences.data, [], len(self._directions)
        for layer in range(self.num_layers):
            if layer and self.dropout:
                rows = F.dropout(rows, self.dropout, self.training)
            outputs = []
            for i in range(layer * directions, (layer + 1) * directions):
                from_the_end = i % directions == 1
                output, final = scan(cells[i], rows, sequences.sizes, tuple(part[i] for part in state), from_the_end)
                outputs.append(output)
                finals.append(final)
            rows = torch.cat(outputs, 1) if directions > 1 else outputs[0]
        return rows, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _refuse(self, cells: list[Cell], sequences: _Sequences, from_zeros: bool) -> list[tuple[Calls, int | None]]:
        """Raise for any input that some norm would not accept at some time step, before any state changes.

        Returns:
            For every norm in training its calls, and the smallest reference that they hold since the last weight
            update. If h_0 = 0, W_h h_0 is the same for all sequences and equivalent to a single activation: sigma is
            sqrt(eps), H2 would remember a gradient divided by it, and training needs a ``Warmup``.
        """
        if not sequences.sizes[0]:
            return []
        smallest = sequences.data.new_empty(min(sequences.sizes), self.hidden_size)
        alike = {norm for cell in cells for norm in (cell.norm_hh or {}).values()} if from_zeros else set()
        references = []
        for norm in (norm for cell in cells for norm in cell.norms()):
            single = norm in alike
            if isinstance(norm, TimeSpecificNorm):
                norm.expect(len(sequences.sizes))
                norm = norm.times[0]
            if not isinstance(norm, Norm) or not norm.training:
                continue
            if norm.steps > 1 and norm.H1 is not None:
                raise ValueError(
                    f"{type(self).__name__} inside vectorized(model, {norm.steps}): its norms would meet all "
                    "mini-batches at each time step, and a loop over mini-batches meets all time steps of each; use "
                    "the loop, DAU(..., vectorize=False)"
                )
            if is_traced():
                norm._check(smallest, 1)
                continue
            before = norm._calls.reference_size if norm.follows.unfolded else None
            norm._check(smallest, 1)
            sizes = [size for size in (1 if single else norm.reference_size, before) if size is not None]
            references.append((norm._calls, min(sizes) if sizes else None))
        return references

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "weight_ih_l0" in state_dict and "weight_ih_l0" not in self.state_dict():
            warnings.warn(
                f"what is loaded into {prefix[:-1] or 'it'} ({type(self).__name__}) comes from a layer of torch: its "
                f"weight_ih_l0 is cells.l0.weight_ih here, and so on. {self.beside_torch}",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        options = {
            "num_layers": (self.num_layers, 1),
            "nonlinearity": (getattr(self, "nonlinearity", "tanh"), "tanh"),
            "batch_first": (self.batch_first, False),
            "dropout": (self.dropout, 0),
            "bidirectional": (self.bidirectional, False),
            "backward_stats": (self.backward_stats, "saved"),
        }
        given = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.input_size), str(self.hidden_size), *given])


class _WithNonlinearity(Recurrent):
    cell: ClassVar[type[NormRNNCell] | type[NormGRUCell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: Nonlinearity = "tanh",
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        norm: Factory | None = StreamingNorm,
        norm_h: HiddenNorm = "same",
        backward_stats: BackwardStats = "saved",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def make(width: int) -> Cell:
            return self.cell(width, hidden_size, nonlinearity, norm, norm_h)

        as_torch = (input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)
        super().__init__(make, *as_torch, backward_stats, device, dtype)
        self.nonlinearity: Nonlinearity = nonlinearity


class NormRNN(_WithNonlinearity):
    """The normalized RNN (equation 3), a replacement for ``torch.nn.RNN``.

    ``h_t = f(Norm(W_x x_t) + Norm(W_h h_{t-1}))``

    Args:
        input_size, hidden_size, num_layers: as torch's.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.
        batch_first, dropout, bidirectional, device, dtype: as torch's.
        norm: makes a Norm of c features: a class such as ``StreamingNorm``, ``BatchNorm`` (statistics shared over time)
            or ``SampleNorm``, a ``functools.partial``, a function, ``TimeSpecific(BatchNorm)``; None: no norm, and a
            bias.
        norm_h: likewise for the hidden path; None normalizes the input path alone (vertical). By default as ``norm``.
        backward_stats: the backward pass of N uses the estimate ``"saved"`` at its time step, or the ``"latest"`` one:
            the paper's caveat in section 4.3.

    Shapes: ``x (T, n, input_size)``, with batch_first ``(n, T, input_size)``, a single sequence ``(T, input_size)``, or
    a ``PackedSequence``; ``h_0`` and ``h_n (num_layers * directions, n, hidden_size)``. Returns ``(output, h_n)``, the
    output in the form of x. H1 and H2 are shared over all time steps, and sequences may have any length.

    Raises:
        ValueError: for wrong shapes, no time steps, a time step with too few sequences for a norm, or a vectorized
            cycle; the state is unchanged then.

    >>> net = NormRNN(4, 3)
    >>> output, h_n = net(torch.randn(7, 8, 4))
    >>> output.shape, h_n.shape
    (torch.Size([7, 8, 3]), torch.Size([1, 8, 3]))
    >>> net.cells["l0"].norm_hh["h"].H1.count
    tensor(56)
    """

    cell = NormRNNCell


class NormGRU(_WithNonlinearity):
    """The normalized GRU (equations 4 to 7), a replacement for ``torch.nn.GRU``.

    ::

        g_r   = sigmoid(Norm(W_xr x_t) + Norm(W_hr h_{t-1}))
        g_z   = sigmoid(Norm(W_xz x_t) + Norm(W_hz h_{t-1}))
        h_new = f(Norm(W_xh x_t) + Norm(W_hh (h_{t-1} * g_r)))
        h_t   = g_z * h_new + (1 - g_z) * h_{t-1}

    Unlike in torch's, g_r is applied before W_hh, and g_z weights the new state.

    Args, shapes and errors: those of ``NormRNN``.

    >>> net = NormGRU(4, 3, num_layers=2, bidirectional=True)
    >>> output, h_n = net(torch.randn(7, 8, 4))
    >>> output.shape, h_n.shape
    (torch.Size([7, 8, 6]), torch.Size([4, 8, 3]))
    """

    cell = NormGRUCell
    beside_torch = (
        "But nn.GRU computes something else: its reset gate works behind the matrix, its update gate keeps the old "
        "state; so train anew."
    )


class NormLSTM(Recurrent):
    """A normalized LSTM after the pattern of section 5, a replacement for ``torch.nn.LSTM``: see ``NormLSTMCell``.

    Args:
        norm_c: makes the norm of c_t in h_t; None: there is none.
        others: those of ``NormRNN``.

    Shapes and errors: those of ``NormRNN``, with ``(h_0, c_0)`` and ``(output, (h_n, c_n))``.

    >>> net = NormLSTM(4, 3)
    >>> output, (h_n, c_n) = net(torch.randn(7, 8, 4))
    >>> output.shape, c_n.shape
    (torch.Size([7, 8, 3]), torch.Size([1, 8, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        norm: Factory | None = StreamingNorm,
        norm_h: HiddenNorm = "same",
        norm_c: Factory | None = None,
        backward_stats: BackwardStats = "saved",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def make(width: int) -> Cell:
            return NormLSTMCell(width, hidden_size, norm, norm_h, norm_c)

        as_torch = (input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)
        super().__init__(make, *as_torch, backward_stats, device, dtype)
