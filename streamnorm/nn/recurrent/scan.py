"""A cell over time: the loop over time steps, and what can be computed for all of them at once (sections 4.3 and 5).

The same ``Norm`` object is called at every time step: one H1 and one H2 for all of them, so that a layer streams
through past samples and past time steps. In the backward pass gradients arrive in H2 from the last step to the first.
Imports the cells and what stands below them.

Legend: ``T`` time steps, ``n`` sequences, ``N`` = T n rows, or the rows of a packed sequence; ``sizes`` the sequences
at each time step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from streamnorm.nn.norm import Norm
from streamnorm.nn.recurrent import fused
from streamnorm.nn.recurrent.cells import Cell, State, Weights, at


def scan(
    cell: Cell, data: Tensor, sizes: Sequence[int], start: State, from_the_end: bool = False
) -> tuple[Tensor, State]:
    """A cell over all time steps of ``data (N, input_size)``: one compiled call for all steps of one size if supported,
    else a loop.

    Args:
        sizes: how many sequences each step has; ``data`` holds their rows step after step, longer sequences first.
        start: the state before the first step, ``(n, hidden_size)`` each.
        from_the_end: read each sequence from its own last step, which is its time step 0: a mini-batch holds the rows
            that are equally far from the ends of their sequences.

    Returns:
        h of every step ``(N, hidden_size)``, and every sequence's state after its last step.
    """
    if not sizes[0]:
        sizes = sizes[:1]  # without sequences one step is enough
    if from_the_end:
        output, state = scan(cell, _reversed(data, sizes), sizes, start)
        return _reversed(output, sizes), state
    runs = _runs(sizes)
    parts = _split(data, runs)
    inputs: list[Sequence[Tensor]] = []  # of this run and the later ones, unless the compiled call normalizes them
    weights: Weights | None = None
    state = start
    outputs: list[Tensor] = []
    ended: list[State] = []
    for i, (first, steps, n) in enumerate(runs):
        if n < len(state[0]):
            ended.append(tuple(part[n:] for part in state))
            state = tuple(part[:n] for part in state)
        rows = None if inputs else fused.run(cell, parts[i], steps, state[0])
        norms = cell.hidden_norms() if rows is None else cell.norms()  # used in this run only
        if rows is None:
            inputs = inputs[1:] or _inputs(cell, parts[i:], runs[i:])
            rows = fused.run(cell, parts[i], steps, state[0], list(inputs[0]))
        for norm in norms:
            _count_as_one(norm, (steps if rows is None else 1) + (i > 0))
        if rows is None:
            weights = weights or cell.hidden_weights()
            for t, now in enumerate(zip(*(a.split(n) for a in inputs[0]), strict=True), first):
                state = cell.step(now, state, weights, t)
                outputs.append(state[0])
        else:
            outputs.append(rows)
            state = (rows[-n:],)
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), state


def _reversed(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """``rows (N, features)`` with the steps of each sequence in reversed order."""
    if sizes[0] == sizes[-1]:
        return rows.unflatten(0, (len(sizes), sizes[0])).flip(0).flatten(0, 1)
    size, (t, i) = torch.tensor(sizes), (torch.arange(k) for k in (len(sizes), sizes[0]))
    there = i < size[:, None]
    from_the_end = there.sum(0) - 1 - t[:, None]  # negative beyond a sequence's end
    order = ((size.cumsum(0) - size)[from_the_end] + i)[there]
    return rows.index_select(0, order.to(rows.device))


Run = tuple[int, int, int]
"""Consecutive time steps of the same size: the first, how many, and their number of sequences."""


def _runs(sizes: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for n, same in groupby(sizes):
        runs.append((sum(steps for _, steps, _ in runs), len(list(same)), n))
    return runs


def _split(a: Tensor, runs: Sequence[Run]) -> Sequence[Tensor]:
    return a.split([steps * n for _, steps, n in runs]) if len(runs) > 1 else [a]


def _inputs(cell: Cell, parts: Sequence[Tensor], runs: Sequence[Run]) -> list[Sequence[Tensor]]:
    """``Norm(W_x x)`` of every gate, run by run."""
    inputs = cell.project(torch.cat(list(parts)) if len(parts) > 1 else parts[0])
    if cell.norm_ih is not None:
        sizes = [n for _, steps, n in runs for _ in range(steps)]
        norms = [cell.norm_ih[gate] for gate in cell.gates]
        inputs = [over_time(norm, a, sizes) for norm, a in zip(norms, inputs, strict=True)]
        for norm in norms:
            _count_as_one(norm, 1 + (runs[0][0] > 0))
    return list(zip(*(_split(a, runs) for a in inputs), strict=True))


def over_time(norm: nn.Module, a: Tensor, sizes: Sequence[int]) -> Tensor:
    """``Norm(W_x x_t)`` of all time steps, ``a (N, hidden_size)``: in one call where that equals the loop.

    It does for rows that are normalized separately, without memory or with constant statistics; and for a ``Norm`` that
    takes mini-batches of one size in order, if their gradients arrive in H2 in reversed order.
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
    """Inside, the first axis holds so many mini-batches in order, whose gradients arrive from the last to the first."""
    before = norm.steps, norm.reverse
    norm.steps, norm.reverse = steps, True
    try:
        yield
    finally:
        norm.steps, norm.reverse = before


def _count_as_one(norm: nn.Module, calls: int) -> None:
    """Count the calls of a sequence as one, for the warning that weight updates are missing."""
    if isinstance(norm, Norm) and norm.training:
        norm.follows.unfolded -= calls - 1
