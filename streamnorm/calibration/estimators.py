"""Estimators: the statistics of a whole data set from its mini-batches, in float64.

They define what recalibration accumulates. ``Pooled`` and ``Mean`` are exact, independent of the batching; ``Moving``
is the running average of a post-processing pass. Imports the definitions and the op's packing.

Legend: a table is ``(2, ...)``, row 0 the mean, row 1 sigma, shaped like an arrival of a memory; ``view`` is the
canonical view ``(1, m, G, q, *place)`` of a mini-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.ops.functional import pack, unpack_row

Across = Callable[[Tensor], Tensor]
"""The sum of a tensor over all replicas, the same on each."""
DECAY = 0.9
"""Weight of the old value in a moving average, as in "Batch Normalization: The Untold Story"."""


def alone(value: Tensor) -> Tensor:
    """``across`` for a single process."""
    return value


def table(view: Tensor, ref: NormRef, moment: Lp, about: Tensor | None) -> Tensor:
    """s of one mini-batch. Sigma is taken about the mean in the table ``about``, or (None) about the batch's own; in
    Setting C about 0."""
    mu = moment.mean(view, ref)
    center = mu if about is None else unpack_row(about[:1], mu)
    return pack(mu, moment.sigma(view, ref, center, center), ref)[0]


class Estimator(ABC):
    """Accumulates one set of statistics over mini-batches.

    Args:
        ref, moment: R and S of the layer.
        unbiased: divide the variance by the number of activations less one, as torch's running variance.
        about: a table whose mean is the center of sigma, if it must be known beforehand; None: use the batch's own mean
            instead.

    Attributes:
        arrivals: mini-batches.
        size: activations in a reference, of all mini-batches together.
        weight: of this replica among all: activations, samples, or mini-batches.
        is_degenerate: sigma was taken of a single activation about itself, which is always 0.
        initial_share: the remaining weight of the initial value.
    """

    def __init__(self, ref: NormRef, moment: Lp, unbiased: bool = False, about: Tensor | None = None) -> None:
        self.ref, self.moment, self.unbiased, self.about = ref, moment, unbiased, about
        self.arrivals = self.size = self.weight = 0
        self.is_degenerate = False
        self.initial_share = 0.0
        self.result: Tensor | None = None

    @staticmethod
    @abstractmethod
    def needs_center(moment: Lp) -> bool:
        """Whether sigma can be computed only once the mean of all data is known."""

    @property
    def waits(self) -> bool:
        """``needs_center`` of its own moment."""
        return self.needs_center(self.moment)

    def add(self, view: Tensor) -> Tensor:
        """Add a mini-batch, and return its own s, a table."""
        n = self.ref.size(view.shape)
        self.arrivals += 1
        self.size += n
        return self._add(view, n)

    @abstractmethod
    def _add(self, view: Tensor, n: int) -> Tensor: ...

    @abstractmethod
    def value(self, across: Across = alone) -> Tensor:
        """The table of all mini-batches, of all replicas."""

    def _told(self, across: Across) -> tuple[Tensor, Tensor]:
        """The table of this replica, and its share of the total weight."""
        assert self.result is not None
        return self.result, self.weight / across(self._number(self.weight))

    def _number(self, value: int) -> Tensor:
        assert self.result is not None
        return torch.tensor(float(value), dtype=torch.float64, device=self.result.device)


class Pooled(Estimator):
    """S of all data as one reference: exact, independent of the batching.

    ::

        n   = n_a + n_b                    mu = mu_a + (n_b / n) (mu_b - mu_a)
        M   = M_a + (n_b / n) (M_b - M_a) + (n_a n_b / n^2) (mu_b - mu_a)^2

    M is the mean of ``|x - c|^p``, and ``sigma = (M + eps^(p/2))^(1/p)``. The last term (Chan, Golub, LeVeque 1979) is
    for p = 2 about the mean only. About a fixed c moments of any p are averaged, so the mean must come first.
    """

    @staticmethod
    def needs_center(moment: Lp) -> bool:
        return moment.p != 2 and moment.center != "zero"

    def _add(self, view: Tensor, n: int) -> Tensor:
        new = table(view, self.ref, replace(self.moment, eps=0.0), self.about)
        new[1] **= self.moment.p
        self.weight += n
        if self.result is None:
            self.result = new.clone()
        else:
            share, step = n / self.weight, new - self.result
            self.result += share * step
            if self._moves:
                self.result[1] += share * (1 - share) * step[0] ** 2
        return self._table(new)

    @property
    def _moves(self) -> bool:
        """Whether the center of M is the running mean."""
        return self.moment.p == 2 and self.moment.center != "zero"

    def _table(self, moments: Tensor) -> Tensor:
        p = self.moment.p
        return torch.stack([moments[0], (moments[1] + self.moment.eps ** (p / 2)) ** (1 / p)])

    def value(self, across: Across = alone) -> Tensor:
        mine, share = self._told(across)
        mu = across(share * mine[0])
        M = across(share * (mine[1] + (mine[0] - mu) ** 2 if self._moves else mine[1]))
        n = across(self._number(self.size))
        self.is_degenerate = bool(n == 1) and self.moment.center != "zero"
        if self.unbiased:
            M = M * (n / (n - 1))
        return self._table(torch.stack([mu, M]))


class _Averaged(Estimator):
    """Base class for averages of the s of mini-batches."""

    @staticmethod
    def needs_center(moment: Lp) -> bool:
        return getattr(moment, "center", None) == "estimate"

    def _add(self, view: Tensor, n: int) -> Tensor:
        own = table(view, self.ref, self.moment, self.about)
        arrival = own.clone()
        if self.unbiased and n > 1:
            eps = self.moment.eps
            arrival[1] = ((own[1] ** 2 - eps).clamp_min(0) * (n / (n - 1)) + eps).sqrt()
        self._average(arrival, view.shape[1], n)
        return own

    @abstractmethod
    def _average(self, arrival: Tensor, samples: int, n: int) -> None: ...

    def value(self, across: Across = alone) -> Tensor:
        mine, share = self._told(across)
        return across(share * mine)


class Mean(_Averaged):
    """The mean of s over samples, for references inside one sample: exact, independent of the batching."""

    def _average(self, arrival: Tensor, samples: int, n: int) -> None:
        self.weight += samples
        self.result = arrival if self.result is None else self.result.lerp(arrival, samples / self.weight)


class Moving(_Averaged):
    """The running average of a post-processing pass ("Batch Normalization: The Untold Story").

    ``s <- decay s + (1 - decay) s_batch``, the mean from 0, sigma from 1; sigma itself is averaged, not its square.
    """

    def __init__(self, *args: Any, decay: float = DECAY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decay = decay

    def _average(self, arrival: Tensor, samples: int, n: int) -> None:
        self.is_degenerate |= n == 1 and self.about is None and getattr(self.moment, "center", None) != "zero"
        if self.result is None:
            self.result = self._initial(arrival)
        self.weight += 1
        self.result = torch.lerp(arrival, self.result, self.decay)
        self.initial_share *= self.decay

    def _initial(self, like: Tensor) -> Tensor:
        self.initial_share = 1.0
        return torch.stack([torch.zeros_like(like[0]), torch.ones_like(like[1])])


class Corrected(Moving):
    """``Moving`` with bias correction: from 0, and divided by ``1 - decay^k`` after k mini-batches."""

    def _initial(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def value(self, across: Across = alone) -> Tensor:
        mine, share = self._told(across)
        return across(share * mine / (1 - self.decay**self.weight))
