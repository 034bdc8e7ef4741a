"""The definition of a layer for kernels: the paper's three concepts R, S and N; and the statistics of one call.

Imports the definitions alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamnorm.definition.operation import Scale, Standardize
from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp


@dataclass(frozen=True)
class Definition:
    """NormRef R, NormStats S and NormOP N of a layer (paper, section 3)."""

    ref: NormRef
    moment: Lp
    op: Standardize | Scale


@dataclass(frozen=True)
class Statistics:
    """The statistics of one call, each broadcastable against ``x (g, m, G, q, *place)``.

    Attributes:
        mu, sigma: s, the mini-batch's own.
        center: the estimate of the mean that sigma was taken about (Setting B), or None.
        mu_hat, sigma_hat: the statistics that N used.
    """

    mu: Tensor
    sigma: Tensor
    center: Tensor | None
    mu_hat: Tensor
    sigma_hat: Tensor
