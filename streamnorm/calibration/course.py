"""The course of recalibration: which sites use stored statistics, which of them are exact, and when passes end.

A table must be computed with exactly those tables of earlier layers that will be used with it: if data are sampled
anew in each pass, tables from another pass over the same data set differ. Imports the state postproc.

Legend: a table is ``(2, ...)``, row 0 the mean, row 1 sigma; a site is one set of statistics that testing uses.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from streamnorm.calibration.postproc import Site, Told

TOLERANCE = 1e-5
"""Passes end when no mean moved by more than so many sigmas, and no sigma by a larger fraction."""
NEAR = 0.1
"""Statistics that moved by less since the previous pass are used in the next one, though they may not be exact yet."""
PATIENCE = 50
"""Passes for statistics that depend on themselves, in addition to those that a chain of layers needs."""


class Queue:
    """Sites that are done, which others wait for. If sigma needs the mean first, a site takes two passes."""

    def __init__(self) -> None:
        self.done: set[Site] = set()
        self._centered: set[Site] = set()

    def ready(self, told: Told) -> list[Site]:
        """The sites that are not done, but depend only on sites that are, by all their calls in the last pass."""
        return [site for site in told.sites if site not in self.done and told.behind[site] <= self.done]

    def move_up(self, sites: Iterable[Site], told: Told) -> None:
        """Advance these sites after a pass for which they were ready."""
        for site in sites:
            if told.sites[site].waits and site not in self._centered:
                self._centered.add(site)
            else:
                self.done.add(site)


class Course:
    """The state of recalibration after some passes.

    A site is *exact* once all its calls in a pass depended on exact sites only: these will not change any more, and
    neither will its table. A site that is called several times depends on itself and never becomes exact; it still gets
    its *turn*, in the order of first calls, and from then on normalizes with its stored table.

    First inputs and exact tables cannot move on fixed data, unless a state is carried from batch to batch. So if one
    does, the same pass is repeated: if the result differs, so do the data. Then each layer is computed once, at its
    turn; and statistics that depend on themselves go on from there.

    Args:
        most: the most passes allowed, or None.

    Attributes:
        number: of passes.
        tables: the stored tables by site.
        fixed: the sites that use them in the next pass.
        still: the furthest that a table that is not exact moved in the last pass.
        is_recurrent: whether statistics depend on themselves, through a later call.
        differs: if data differ from pass to pass: a site, and how far it moved.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.number = 0
        self.tables: dict[Site, Tensor] = {}
        self.fixed: set[Site] = set()
        self.still = math.inf
        self.is_recurrent = False
        self.differs: tuple[Site, float] | None = None
        self._turn, self._exact = Queue(), Queue()
        self._enough = 0
        self._costs: dict[Site, int] = {}
        self._first: Mapping[Site, Tensor] = {}
        self._doubt: tuple[tuple[Site, float], Mapping[Site, Tensor]] | None = None
        self._carries = self._settled = False
        self._share = 1.0
        self._move: Tensor | None = None
        self._best: tuple[float, dict[Site, Tensor]] | None = None

    def take(self, told: Told, values: Mapping[Site, Tensor], first: Mapping[Site, Tensor]) -> Mapping[Site, Tensor]:
        """Process the results of a pass, and return the tables to store.

        Args:
            values: the table of each site.
            first: the tables of the first call in each batch.
        """
        self.number += 1
        if self._is_in_doubt(told, values, first):
            return {site: table for site, table in self.tables.items() if site in told.sites}
        moves = _moves(self.tables, values)
        self._settled, self.is_recurrent = self.fixed >= set(told.sites), told.is_recurrent
        kept = set() if self._carries else self._exact.done
        if self.differs and not self._settled:
            kept = kept | self._turn.done
        free = {site: way for site, way in moves.items() if site not in kept}
        self.still = max((_far(way) for way in free.values()), default=0.0 if moves else math.inf)
        new = {site: value for site, value in values.items() if site not in kept}
        if self.is_recurrent and self._settled:
            new = self._damped(new, free)
        self.tables = self.tables | new
        self._move_up(told, moves)
        return new

    def _is_in_doubt(self, told: Told, values: Mapping[Site, Tensor], first: Mapping[Site, Tensor]) -> bool:
        """Whether this pass must be repeated to find out whether data differ."""
        self._first, before = {**first, **self._first}, self._first
        if self._doubt:
            doubt, self._doubt = self._doubt, None
            if _moved(doubt[1], values, values, told):
                self.differs = doubt[0]
            else:
                self._carries = True
        elif not self.differs and not self._carries:
            moved = _moved(before, first, first, told) or _moved(self.tables, values, self._exact.done, told)
            if moved and self.number == self.most:
                self.differs = moved
            elif moved:
                self._doubt = moved, values
                self._enough += 1
        return self._doubt is not None

    def _damped(self, new: dict[Site, Tensor], free: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Tables a fraction of the way to the new ones."""
        if self.differs and (self._best is None or self.still < self._best[0]):
            self._best = self.still, {site: self.tables[site] for site in new}
        last, self._move = self._move, torch.cat([way.flatten() for way in free.values()])
        self._share = _share(self._share, last, self._move)
        return {site: _on_the_way(self.tables[site], value, self._share) for site, value in new.items()}

    def _move_up(self, told: Told, moves: Mapping[Site, Tensor]) -> None:
        self._costs |= {site: 1 + one.waits for site, one in told.sites.items()}
        self._exact.move_up(self._exact.ready(told), told)
        waiting = [site for site in told.sites if site not in self._turn.done]
        self._turn.move_up(self._turn.ready(told) or waiting[:1], told)
        near = {site for site, way in moves.items() if _far(way) <= NEAR and not self.differs}
        self.fixed = self._turn.done | near

    @property
    def is_over(self) -> bool:
        """Whether that was the last pass."""
        if not self.tables or self._doubt:
            return False
        enough = self._enough + sum(self._costs.values()) + PATIENCE * self.is_recurrent
        return self.number >= (self.most or enough) or (self._settled and self.still <= TOLERANCE)

    def best(self) -> Mapping[Site, Tensor]:
        """If data differ: of statistics that depend on themselves, the tables that moved least in a pass."""
        return {} if self._best is None else self._best[1]


# --- how far tables move ---


def _moves(old: Mapping[Site, Tensor], new: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    return {site: move(old[site], new[site]) for site in new if site in old}


def _far(way: Tensor) -> float:
    return way.abs().max().item()


def _moved(
    old: Mapping[Site, Tensor], new: Mapping[Site, Tensor], among: Container[Site], told: Told
) -> tuple[Site, float] | None:
    """The first site in ``among`` whose table moved by more than rounding, and how far; None: there is none."""
    for site, way in _moves(old, new).items():
        tiny = torch.finfo(way.dtype).tiny
        size = max(1.0, _far(new[site][0] / new[site][1].clamp_min(tiny)))  # of the rounded values, in sigmas
        if site in among and not _far(way) <= max(TOLERANCE, told.rounding[site] * size):
            return site, _far(way)
    return None


def move(old: Tensor, new: Tensor) -> Tensor:
    """How far statistics have moved: means in sigmas, sigmas as the logarithm of their ratio."""
    tiny = torch.finfo(new.dtype).tiny
    before, sigma = old[1].clamp_min(tiny), new[1].clamp_min(tiny)
    return torch.stack([(new[0] - old[0]) / sigma, (sigma / before).log()])


def _share(share: float, last: Tensor | None, move: Tensor) -> float:
    """The relaxation factor for the next move of statistics that depend on themselves: less if they oscillate, more if
    they converge slowly (Irons and Tuck 1969), from the last factor and the moves of the last two passes."""
    turn = None if last is None or last.shape != move.shape else move - last
    if last is None or turn is None or not turn.any():
        return share
    return min(max(-share * (last @ turn / (turn @ turn)).item(), 0.1), 2.0)


def _on_the_way(old: Tensor, new: Tensor, share: float) -> Tensor:
    """The statistics ``share`` of the way from old to new: means linearly, sigmas by their ratio."""
    tiny = torch.finfo(new.dtype).tiny
    before, sigma = old[1].clamp_min(tiny), new[1].clamp_min(tiny)
    return torch.stack([old[0].lerp(new[0], share), before * (sigma / before) ** share])
