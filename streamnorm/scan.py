"""A cell through time: the loop over time steps, and what may be done for all of them at once (sections 4.3 and 5).

The same ``Norm`` object is called at every time step: one H1 and one H2 for all of them, so that a layer streams
through past samples and past time steps. Going back, gradients arrive in H2 from the last step to the first. Imports
the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``N`` = T n rows, or the rows of a packed sequence; ``sizes`` the sequences
at each time step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from streamnorm import fusedscan
from streamnorm.cells import Cell, State, at
from streamnorm.norm import Norm


def scan(
    cell: Cell, data: Tensor, sizes: Sequence[int], start: State, from_the_end: bool = False
) -> tuple[Tensor, State]:
    """A cell over all time steps of ``data (N, input_size)``: one compiled call where there is one, else the loop that
    it is compared with.

    Args:
        sizes: how many sequences each step has; their rows follow each other in ``data``, longer sequences first.
        start: the state before the first step, ``(n, hidden_size)`` each.
        from_the_end: take the steps from the last to the first.

    Returns:
        h of every step ``(N, hidden_size)``, and every sequence's state after its last step.
    """
    if from_the_end:
        data, sizes = torch.cat(data.split(list(sizes))[::-1]), sizes[::-1]
    n, is_even = sizes[0], min(sizes) == max(sizes)
    rows = fusedscan.run(cell, data, len(sizes), start[0]) if is_even else None
    inputs = cell.project(data) if rows is None else []
    if rows is None and cell.norm_ih is not None:
        inputs = [over_time(cell.norm_ih[gate], a, sizes) for gate, a in zip(cell.gates, inputs, strict=True)]
        rows = fusedscan.run(cell, data, len(sizes), start[0], inputs) if is_even else None
    if rows is not None:
        return (torch.cat(rows.split(n)[::-1]) if from_the_end else rows), (rows[-n:],)
    outputs, state = _loop(cell, inputs, sizes, start)
    return torch.cat(outputs[::-1] if from_the_end else outputs), state


def _loop(cell: Cell, inputs: Sequence[Tensor], sizes: Sequence[int], start: State) -> tuple[list[Tensor], State]:
    for norm in cell.hidden_norms():
        _count_as_one(norm, len(sizes))
    weights = cell.hidden_weights()
    state: State = tuple(part[: sizes[0]] for part in start)
    outputs: list[Tensor] = []
    ended: list[State] = []
    for t, now in enumerate(zip(*(a.split(list(sizes)) for a in inputs), strict=True)):
        n, before = sizes[t], len(state[0])
        if n < before:
            ended.append(tuple(part[n:] for part in state))
            state = tuple(part[:n] for part in state)
        elif n > before:  # from the end, shorter sequences begin later
            state = tuple(torch.cat([part, first[before:n]]) for part, first in zip(state, start, strict=True))
        state = cell.step(now, state, weights, t)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return outputs, state


def over_time(norm: nn.Module, a: Tensor, sizes: Sequence[int]) -> Tensor:
    """``Norm(W_x x_t)`` of all time steps, ``a (N, hidden_size)``: in one call where that is what the loop would do.

    It is for rows that are normalized by themselves, with nothing kept or with constant statistics; and for a ``Norm``
    that takes mini-batches of one size in order, if their gradients arrive in H2 in the reversed order.
    """
    if isinstance(norm, Norm):
        keeps = norm.H1 is not None
        if (not keeps and norm.H2 is None) or (keeps and not norm.training):
            return norm(a)
        if keeps and min(sizes) == max(sizes):
            with _time_steps(norm, len(sizes)):
                return norm(a)
    _count_as_one(norm, len(sizes))
    return torch.cat([at(norm, part, t) for t, part in enumerate(a.split(list(sizes)))])


@contextmanager
def _time_steps(norm: Norm, steps: int) -> Iterator[None]:
    """Inside, the first axis holds so many mini-batches in order, which come back from the last to the first."""
    before = norm.steps, norm.reverse
    norm.steps, norm.reverse = steps, True
    try:
        yield
    finally:
        norm.steps, norm.reverse = before


def _count_as_one(norm: nn.Module, steps: int) -> None:
    """A sequence is one call for the question whether a layer was forgotten, however many steps it has."""
    if isinstance(norm, Norm) and norm.training:
        norm._calls.unfolded -= steps - 1
