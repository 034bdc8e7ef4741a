"""Recurrent layers with every norm, sequences for them, and a look at their state: what the tests of recurrence stand
on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import streamnorm as sn

NETS: dict[str, Any] = {"RNN": sn.NormRNN, "GRU": sn.NormGRU, "LSTM": sn.NormLSTM}
MIXED = functools.partial(sn.StreamingNorm, alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1))
NORMS: dict[str, Any] = {
    "streaming": MIXED,
    "batch": sn.BatchNorm,
    "sample": sn.SampleNorm,
    "time-specific": sn.TimeSpecific(sn.BatchNorm),
}
LENGTHS = (3, 6, 2, 6, 1)
STEPS = 64 * 16
"""Terms in what passes through a few time steps: sums of up to 64 values, enlarged by every step on the way."""


def identity(c: int) -> nn.Module:
    return nn.Identity()


def sequences(width: int = 4, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randn(T, width, dtype=torch.float64) for T in lengths]


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same_state(net: nn.Module, before: dict[str, Tensor]) -> bool:
    now = net.state_dict()
    return now.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in now.items())


def flat(final: Any) -> tuple[Tensor, ...]:
    return final if isinstance(final, tuple) else (final,)


def initial(net: Any, *shape: int) -> Any:
    state = tuple(torch.randn(*shape, net.hidden_size, dtype=torch.float64) for _ in net.cells["l0"].states)
    return state if len(state) > 1 else state[0]
