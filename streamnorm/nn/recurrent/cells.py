"""One time step of the normalized recurrent networks (paper, section 5), with any normalization.

Every ``Norm(.)`` of the equations is a layer of its own, with its own statistics, gain and bias. A cell computes one
step; ``scan`` runs it over time. Imports the layers.

Legend: ``n`` sequences, ``t`` time steps from 0; gates in the order of the rows of the weights; a state is ``(h,)``, or
``(h, c)`` for the LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.checks import expect_whole
from streamnorm.inputs import expect_floating, expect_tensor
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.timespecific import Factory, TimeSpecificNorm

State = tuple[Tensor, ...]
HiddenNorm = Factory | Literal["same"] | None
"""The normalization of the hidden path: its factory, that of the input path, or none."""
Nonlinearity = Literal["tanh", "relu"]
Weights = Sequence[tuple[Tensor, Tensor | None]]
"""W and b of every gate."""
NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


class Cell(nn.Module):
    """Base class of the cells: the two paths into every gate, W_x x_t and W_h h_{t-1}, each with its norm.

    A matrix followed by a norm has no bias; a path without a norm has one.

    Attributes:
        gates: their names, in the order of the rows of ``weight_ih`` and ``weight_hh``.
        states: h, and for the LSTM c.
        norm_ih, norm_hh: the norms of the two paths by gate, or None.
    """

    gates: ClassVar[tuple[str, ...]] = ("h",)
    states: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(self, input_size: int, hidden_size: int, norm: Factory | None, norm_h: HiddenNorm) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            expect_whole(name, value)
        self.input_size, self.hidden_size = input_size, hidden_size
        rows = len(self.gates) * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.norm_ih = self._norms(norm)
        self.norm_hh = self._norms(norm if norm_h == "same" else norm_h)
        self.bias_ih = None if self.norm_ih is not None else nn.Parameter(torch.empty(rows))
        self.bias_hh = None if self.norm_hh is not None else nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    def _norms(self, make: Factory | None) -> nn.ModuleDict | None:
        return None if make is None else nn.ModuleDict({gate: made(make, self.hidden_size) for gate in self.gates})

    def reset_parameters(self) -> None:
        """Weights and biases uniform in +-1/sqrt(hidden_size), as torch's; norms reset their own."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def norms(self) -> Iterator[nn.Module]:
        """Every ``Norm(.)`` of the equations."""
        yield from () if self.norm_ih is None else self.norm_ih.values()
        yield from self.hidden_norms()

    def hidden_norms(self) -> Iterator[nn.Module]:
        """Those that are called step by step, because they depend on the state."""
        yield from () if self.norm_hh is None else self.norm_hh.values()

    def forward(self, x: Tensor, hx: Any = None, t: int = 0) -> Any:
        expect_tensor("the input", x)
        n = tuple(x.shape[:-1])[:1]
        expect("the input", x, (*n, self.input_size), self.weight_ih)
        words = "(n, hidden_size)" if n else "(hidden_size,)"
        state = given_state(hx, self.states, (*n, self.hidden_size), words, x, self.weight_ih)
        if not n:
            x, state = x.unsqueeze(0), tuple(part.unsqueeze(0) for part in state)
        inputs = self.project(x)
        if self.norm_ih is not None:
            inputs = [at(self.norm_ih[gate], a, t) for gate, a in zip(self.gates, inputs, strict=True)]
        state = self.step(inputs, state, self.hidden_weights(), t)
        state = tuple(part.squeeze(0) for part in state) if not n else state
        return state[0] if len(state) == 1 else state

    def project(self, x: Tensor) -> list[Tensor]:
        """``W_x x (n, input_size) -> (n, hidden_size)`` of every gate, each its own tensor; n may hold all time
        steps."""
        return [F.linear(x, W, b) for W, b in self._by_gate(self.weight_ih, self.bias_ih)]

    def hidden_weights(self) -> Weights:
        """W_h and its bias of every gate: split once for all time steps, so that gradients are concatenated once."""
        return self._by_gate(self.weight_hh, self.bias_hh)

    def _by_gate(self, weight: Tensor, bias: Tensor | None) -> Weights:
        biases = [None] * len(self.gates) if bias is None else bias.split(self.hidden_size)
        return list(zip(weight.split(self.hidden_size), biases, strict=True))

    def hidden(self, gate: str, h: Tensor, weights: Weights, t: int) -> Tensor:
        """``Norm(W_h h)`` of one gate."""
        a = F.linear(h, *weights[self.gates.index(gate)])
        return a if self.norm_hh is None else at(self.norm_hh[gate], a, t)

    def step(self, inputs: Sequence[Tensor], state: State, weights: Weights, t: int) -> State:
        """The new state from ``Norm(W_x x_t)`` of every gate, the old state and ``hidden_weights()``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class _WithNonlinearity(Cell):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: Nonlinearity = "tanh",
        norm: Factory | None = StreamingNorm,
        norm_h: HiddenNorm = "same",
    ) -> None:
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f'nonlinearity is "tanh" or "relu", got {nonlinearity!r}')
        super().__init__(input_size, hidden_size, norm, norm_h)
        self.nonlinearity: Nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        f = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        return super().extra_repr() + f


class NormRNNCell(_WithNonlinearity):
    """One step of the normalized RNN (equation 3).

    ``h_t = f(Norm(W_x x_t) + Norm(W_h h_{t-1}))``

    Args:
        input_size, hidden_size: of x_t and of h_t.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.
        norm: makes a Norm of c features: a class such as ``StreamingNorm``, a ``functools.partial``, a function,
            ``TimeSpecific(BatchNorm)``; None: no norm, and a bias.
        norm_h: likewise for the hidden path; None normalizes the input path alone (vertical).

    Shapes: ``x (n, input_size), h (n, hidden_size) -> h (n, hidden_size)``, or all without n; h defaults to 0. W_x and
    W_h are ``weight_ih`` and ``weight_hh``.

    >>> cell = NormRNNCell(4, 3)
    >>> h = None
    >>> for t, x in enumerate(torch.randn(5, 8, 4)):
    ...     h = cell(x, h, t)
    >>> h.shape
    torch.Size([8, 3])
    """

    def step(self, inputs: Sequence[Tensor], state: State, weights: Weights, t: int) -> State:
        (h,) = state
        return (NONLINEARITIES[self.nonlinearity](inputs[0] + self.hidden("h", h, weights, t)),)


class NormGRUCell(_WithNonlinearity):
    """One step of the normalized GRU (equations 4 to 7).

    ::

        g_r   = sigmoid(Norm(W_xr x_t) + Norm(W_hr h_{t-1}))
        g_z   = sigmoid(Norm(W_xz x_t) + Norm(W_hz h_{t-1}))
        h_new = f(Norm(W_xh x_t) + Norm(W_hh (h_{t-1} * g_r)))
        h_t   = g_z * h_new + (1 - g_z) * h_{t-1}

    Unlike in ``torch.nn.GRU``, g_r is applied before W_hh, and g_z weights the new state.

    Args:
        input_size, hidden_size, nonlinearity, norm, norm_h: as for ``NormRNNCell``.

    Shapes: as for ``NormRNNCell``. The rows of ``weight_ih`` and ``weight_hh`` belong to r, z, h.

    >>> NormGRUCell(4, 3)(torch.randn(8, 4)).shape
    torch.Size([8, 3])
    """

    gates = ("r", "z", "h")

    def step(self, inputs: Sequence[Tensor], state: State, weights: Weights, t: int) -> State:
        (h,) = state
        x_r, x_z, x_h = inputs
        g_r = torch.sigmoid(x_r + self.hidden("r", h, weights, t))
        g_z = torch.sigmoid(x_z + self.hidden("z", h, weights, t))
        h_new = NONLINEARITIES[self.nonlinearity](x_h + self.hidden("h", h * g_r, weights, t))
        return (g_z * h_new + (1 - g_z) * h,)


class NormLSTMCell(Cell):
    """One step of a normalized LSTM, after the pattern of section 5.

    ::

        i, f, o = sigmoid(Norm(W_x x_t) + Norm(W_h h_{t-1}))    each with matrices and norms of its own
        g       = tanh(Norm(W_x x_t) + Norm(W_h h_{t-1}))       likewise
        c_t     = f * c_{t-1} + i * g
        h_t     = o * tanh(Norm(c_t))

    Args:
        input_size, hidden_size, norm, norm_h: as for ``NormRNNCell``.
        norm_c: makes the norm of c_t in h_t; None: there is none.

    Shapes: ``x (n, input_size), (h, c) -> (h, c)``, both ``(n, hidden_size)``, or all without n. The rows of
    ``weight_ih`` and ``weight_hh`` belong to i, f, g, o, as torch's.

    >>> h, c = NormLSTMCell(4, 3)(torch.randn(8, 4))
    >>> h.shape
    torch.Size([8, 3])
    """

    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        norm: Factory | None = StreamingNorm,
        norm_h: HiddenNorm = "same",
        norm_c: Factory | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, norm, norm_h)
        self.norm_c = None if norm_c is None else made(norm_c, hidden_size)

    def hidden_norms(self) -> Iterator[nn.Module]:
        yield from super().hidden_norms()
        yield from () if self.norm_c is None else (self.norm_c,)

    def step(self, inputs: Sequence[Tensor], state: State, weights: Weights, t: int) -> State:
        h, c = state
        i, f, g, o = (a + self.hidden(gate, h, weights, t) for gate, a in zip(self.gates, inputs, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        read = c if self.norm_c is None else at(self.norm_c, c, t)
        return torch.sigmoid(o) * torch.tanh(read), c


def made(make: Factory, num_features: int) -> nn.Module:
    """The norm that a factory makes.

    Raises:
        TypeError: if it does not make a module.
    """
    norm = None if isinstance(make, nn.Module) or not callable(make) else make(num_features)
    if not isinstance(norm, nn.Module):
        raise TypeError(f"a norm is given by what makes one of c features, such as StreamingNorm, got {make!r}")
    return norm


def at(norm: nn.Module, x: Tensor, t: int) -> Tensor:
    """``Norm(x)`` at time step t, which only statistics per time step depend on."""
    return norm(x, t) if isinstance(norm, TimeSpecificNorm) else norm(x)


def expect(what: str, x: Tensor, shape: tuple[int, ...], weight: Tensor, words: str = "") -> None:
    """Raise unless ``x`` has this shape, and can be multiplied with ``weight``."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(x.shape)}, expected {words + ' = ' if words else ''}{shape}")
    expect_floating(what, x)
    if x.device != weight.device or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(
            f"{what} is {x.dtype} on {x.device} and the weights are {weight.dtype} on {weight.device}; "
            "bring one to the other with .to()"
        )


def given_state(
    hx: Any, names: tuple[str, ...], shape: tuple[int, ...], words: str, x: Tensor, weight: Tensor
) -> State:
    """The state given by the caller, one tensor for each of ``names``, or zeros.

    Raises:
        TypeError: if it is neither.
        ValueError: for a wrong shape, dtype or device.
    """
    if hx is None:
        return tuple(x.new_zeros(shape) for _ in names)
    state = (hx,) if len(names) == 1 else hx
    if (
        not isinstance(state, (tuple, list))
        or len(state) != len(names)
        or not all(isinstance(s, Tensor) for s in state)
    ):
        wanted = f"a tensor {names[0]}" if len(names) == 1 else f"a tuple ({', '.join(names)}) of tensors"
        raise TypeError(f"the state is {wanted} or None, got {type(hx).__name__}")
    for name, part in zip(names, state, strict=True):
        expect(f"the state {name}", part, shape, weight, words)
    return tuple(state)
