"""Rules: how a memory is updated and what it estimates, the paper's F and G (sections 3.3.1 and 3.3.2).

F and G are both rules, ``(H, s) -> (H', estimate)``, and H1 and H2 are both memories. Rules are pure functions,
independent of modules; ``Memory`` holds a rule's state as registered buffers and changes it in place. Imports torch
alone.

Legend: ``g`` arrivals in order along the first axis; ``s (g, 2, *shape)``: row 0 belongs to the mean, row 1 to sigma.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

State = dict[str, Tensor]
"""The members of H by name. Members shaped like one statistic, and counters of shape ()."""


class Remembering(ABC):
    """What F and G have in common: a state, what a weight update does to it, and how states merge.

    Attributes:
        collects: the members that arrivals change, for several processes that begin at one state: tables become the
            means over the processes, weighted by ``weighs_by``, and counters are added. None: it is not known how.
        weighs_by: the counter of what a process has seen: one of the members, or ``seen``, the number of arrivals.
    """

    collects: ClassVar[tuple[str, ...] | None] = None
    weighs_by: ClassVar[str] = "seen"

    @abstractmethod
    def empty(self, shape: Sequence[int]) -> State:
        """The state before the first arrival, for statistics of ``shape`` (2, ...)."""

    def weighing(self, samples: int) -> Self:
        """This rule for arrivals of ``samples`` samples each. A rule that counts arrivals ignores it."""
        return self

    def fold(self, state: State) -> State:
        """What a weight update does to the state. A second one without an arrival in between changes nothing."""
        return state

    @property
    def folds(self) -> bool:
        """Whether a weight update changes the state."""
        return type(self).fold is not Remembering.fold

    def for_testing(self, state: State, latest: Tensor) -> Tensor:
        """What testing normalizes with after an arrival: the ``latest`` estimate (Algorithm 5)."""
        return latest

    def settled(self, state: State) -> Tensor | None:
        """The estimate that a state gives by itself, without a new arrival; None: there is none."""
        return None

    def collected(self, state: State) -> State:
        """The state once its members in ``collects`` are those of all processes."""
        return state

    def merge(self, states: Sequence[State]) -> State:
        """One state that combines what all of ``states`` have seen."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its states merge; define merge(states)")

    def migrated(self, saved: State) -> State:
        """Convert a state saved by another rule or an older version, recognized by its names, to this rule."""
        return saved


class Rule(Remembering):
    """F or G: how a memory takes in what arrives and what it estimates (Algorithms 5 and 6).

    A rule of your own defines ``empty`` and ``step``, and ``fold`` if weight updates change its state. It must be pure
    (return new tensors). Row 0 of an F must not depend on row 1: Setting B needs the mean before sigma exists, and
    passes row 0 alone.

    >>> from streamnorm.stream import Memory
    >>> class Latest(Rule):  # estimates by the latest statistics alone
    ...     def empty(self, shape):
    ...         return {"last": torch.zeros(shape)}
    ...     def step(self, state, s):
    ...         return {"last": s}, s
    >>> Memory(Latest(), (1,)).observe(torch.tensor([[2.0], [5.0]]))
    tensor([[2.],
            [5.]])
    """

    @abstractmethod
    def step(self, state: State, s: Tensor) -> tuple[State, Tensor]:
        """One arrival ``s (2, ...)``: the new state and the estimate, ``{H, s_hat} = F(H, s)``."""

    def observe(self, state: State, s: Tensor, ok: Tensor | None = None) -> tuple[State, Tensor]:
        """Arrivals ``s (g, 2, ...)`` in order; those where ``ok (g,)`` is false do not change the state; None: all do.

        Returns the last state and every estimate ``(g, 2, ...)``; for an arrival that is left out, whatever ``step``
        returns.
        """
        estimates = []
        for j, now in enumerate(s.unbind(0)):
            new, estimate = self.step(state, now)
            state = kept(new, state, ok, j)
            estimates.append(estimate)
        return state, torch.stack(estimates)


class GradientRule(Remembering):
    """A G that sees not only the gradient ``g`` but also the ``s`` of its call and the estimate ``s_hat`` that N used.

    A rule of your own defines ``empty`` and ``step``. It must be pure; its rows may depend on each other. A G that
    needs the gradient alone is a ``Rule``.

    >>> class Unchanged(GradientRule):  # the gradient passes as it is
    ...     def empty(self, shape):
    ...         return {}
    ...     def step(self, state, g, s, s_hat):
    ...         return state, g
    >>> one = torch.ones(1, 2)
    >>> Unchanged().observe({}, 3 * one, one, one)[1]
    tensor([[3., 3.]])
    """

    @abstractmethod
    def step(self, state: State, g: Tensor, s: Tensor, s_hat: Tensor) -> tuple[State, Tensor]:
        """One arrival ``g (2, ...)`` from a call with ``s`` and ``s_hat (2, ...)``: the new state, and g_hat."""

    def observe(
        self, state: State, g: Tensor, s: Tensor, s_hat: Tensor, ok: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Arrivals ``(g, 2, ...)`` in order, as ``Rule.observe`` takes them."""
        estimates = []
        for j, now in enumerate(zip(g.unbind(0), s.unbind(0), s_hat.unbind(0), strict=True)):
            new, estimate = self.step(state, *now)
            state = kept(new, state, ok, j)
            estimates.append(estimate)
        return state, torch.stack(estimates)


def kept(new: State, old: State, ok: Tensor | None, j: int) -> State:
    """``new`` if arrival j is ok, else ``old``."""
    return new if ok is None else {name: torch.where(ok[j], new[name], was) for name, was in old.items()}


CHUNK = 256
"""Arrivals that a rule in closed form takes at a time: its matrix products grow quadratically."""


def in_chunks(rule: Rule, state: State, s: Tensor, ok: Tensor | None) -> tuple[State, Tensor]:
    """``rule.observe``, a chunk of arrivals at a time."""
    estimates = []
    for start in range(0, len(s), CHUNK):
        part = slice(start, start + CHUNK)
        state, estimate = rule.observe(state, s[part], None if ok is None else ok[part])
        estimates.append(estimate)
    return state, torch.cat(estimates)


def column(per_step: Tensor, like: Tensor) -> Tensor:
    """``per_step (g,)`` shaped to broadcast against ``like (g, ...)``."""
    return per_step.reshape(-1, *[1] * (like.ndim - 1))


def affine_scan(P: Tensor, q: Tensor, theta: Tensor) -> Tensor:
    """``theta_j = P_j theta_{j-1} + q_j`` for all j, ``P (4, g, ...)`` in rows, ``q (2, g, ...)``, ``theta (2, ...)``.

    The maps up to j are composed in pairs, then in fours, and so on: log2(g) steps, and no division.
    """
    step = 1
    while step < P.shape[1]:
        (a, b, c, d), (x, y) = P[:, step:], q[:, step:]
        (e, f, g, h), (u, v) = P[:, :-step], q[:, :-step]
        q = torch.cat([q[:, :step], torch.stack([a * u + b * v + x, c * u + d * v + y])], 1)
        P = torch.cat([P[:, :step], torch.stack([a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h])], 1)
        step *= 2
    (a, b, c, d), (u, v) = P, theta
    return q + torch.stack([a * u + b * v, c * u + d * v])


def counted(arrived: Tensor) -> Tensor:
    """The running count of ``arrived (g,)``."""
    return arrived.long() if len(arrived) == 1 else arrived.cumsum(0)


def mixed(long: Tensor, short: Tensor, total: Tensor | float, to_short: Tensor | float) -> Tensor:
    """``(total - to_short) long + to_short short``, exactly long where both are and total is 1.

    Shares that are rounded one by one add up to ``1 + e``: a memory of n updates would end ``n e`` of the mean away
    from it. Two products, as the difference of two large values may overflow.
    """
    return total * long + (to_short * short - to_short * long)


def taken_in(old: Tensor, share: Tensor, surplus: Tensor) -> Tensor:
    """``old + sum_i share_ji surplus_i`` at each of the g arrivals ``surplus (g, ...)``; ``share (g, g)``."""
    if len(surplus) == 1:
        return old + share.reshape([1] * surplus.ndim) * surplus
    return torch.addmm(old.reshape(1, -1), share, surplus.flatten(1)).reshape(surplus.shape)
