"""The layers for users: ``Norm`` with the common arguments, by the names of the paper (section 3).

Imports the layer and what stands below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from streamnorm.definition.ref import BA1, SP2, NormRef
from streamnorm.definition.stats import Center, Lp
from streamnorm.nn.affine import Device
from streamnorm.nn.norm import Norm
from streamnorm.stream.policy import Batch, Evidence, Policy, Sample, Streaming

ALPHA, BETA = (0.7, 0.3), (0.7, 0.3, 0.0)
"""Defaults of the paper's rule if only some of it is given."""


class StreamingNorm(Norm):
    """Streaming normalization (section 3.3, Algorithms 5 and 6), for any batch size down to one sample.

    ::

        y = weight (x - mu_hat) / sigma_hat + bias          s = (mu, sigma), short the mean since the last weight update

    By default the memory is counted in samples (``Evidence``): N are in short, and long counts as M, the number of all
    earlier samples up to ``memory`` or 4 weight updates, whichever is more::

        s_hat = (M long + N short) / (M + N)
        g_hat = the part of the gradient that a regression on 1 and y, over the stream, removes

    With an alpha, beta or kappa it is the paper's rule (``Streaming``), which counts weight updates::

        s_hat = alpha1 long + alpha2 short
        g_hat = beta1 long + beta2 short + beta3 dE/ds_hat  in place of dE/ds in the backward pass

    Args:
        num_features: c.
        ref: the NormRef R.
        p, center, eps: of ``Lp``: the order of the moment, Setting A ``"batch"``, B ``"estimate"`` or C ``"zero"``.
        alpha, beta, kappa: of ``Streaming``; if any is given, alpha = (.7, .3) and beta = (.7, .3, 0) by default.
        affine: add a gain and a bias per feature.
        device, dtype: as torch's; statistics stay float32 or wider.
        memory: of ``Evidence``, in samples: how far back statistics reach, at least 4 weight updates.
            None: 100.
        place: of ``Norm``: the size of the map, for ``BA3 ... BA6`` and ``SP3 ... SP5``.

    Raises:
        ValueError: for a memory together with an alpha, beta or kappa, and for values out of range.

    Shapes: ``x (n, c, *place) -> y (n, c, *place)``, up to three place axes.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 2))
    >>> model(torch.randn(1, 4)).shape
    torch.Size([1, 2])
    >>> model[1]
    StreamingNorm(8)
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef = BA1,
        p: float = 2,
        center: Center = "estimate",
        alpha: tuple[float, ...] | None = None,
        beta: tuple[float, ...] | None = None,
        kappa: tuple[float, ...] | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        memory: float | None = None,
        place: Sequence[int] | None = None,
    ) -> None:
        policy = streaming_policy(alpha, beta, kappa, memory)
        super().__init__(num_features, ref, Lp(p, center, eps), policy, affine, None, device, dtype, place)

    def __repr__(self) -> str:
        policy = self.policy
        rule: dict[str, tuple[Any, Any]] = {}
        if isinstance(policy, Streaming):
            rule = {"alpha": (policy.alpha, None), "beta": (policy.beta, BETA), "kappa": (policy.kappa, None)}
        elif isinstance(policy, Evidence):
            rule = {"memory": (policy.memory, Evidence().memory)}
        return call_of(
            self,
            ref=(self.ref, BA1),
            p=(self.moment.p, 2),
            center=(self.moment.center, "estimate"),
            eps=(self.moment.eps, 1e-5),
            affine=(self.affine is not None, True),
            **rule,
            place=(self.place, None),
        )


class BatchNorm(Norm):
    """General batch normalization (section 3.2, Algorithms 3 and 4); with the defaults, the original one.

    ``y = weight (x - mu) / sigma + bias`` with the mini-batch's own s in training, a running estimate in testing.

    Args:
        num_features: c.
        ref: one of ``BA1 ... BA6``.
        p, center, eps: of ``Lp``.
        rate: weight of the newest mini-batch in the running estimate, of mu and of sigma (torch averages the variance).
        affine: add a gain and a bias per feature.
        device, dtype: as torch's; statistics stay float32 or wider.
        place: of ``Norm``: the size of the map, for ``BA3 ... BA6``.

    >>> BatchNorm(8, rate=0.05)
    BatchNorm(8, rate=0.05)
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef = BA1,
        p: float = 2,
        center: Center = "batch",
        rate: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        place: Sequence[int] | None = None,
    ) -> None:
        super().__init__(num_features, ref, Lp(p, center, eps), Batch(rate), affine, None, device, dtype, place)

    def __repr__(self) -> str:
        policy = self.policy
        assert isinstance(policy, Batch)
        return call_of(
            self,
            ref=(self.ref, BA1),
            p=(self.moment.p, 2),
            center=(self.moment.center, "batch"),
            rate=(policy.rate, 0.1),
            eps=(self.moment.eps, 1e-5),
            affine=(self.affine is not None, True),
            place=(self.place, None),
        )


class SampleNorm(Norm):
    """Sample normalization (section 3.1, Algorithms 1 and 2); with the defaults, layer normalization.

    ``y = weight (x - mu) / sigma + bias`` with s from each sample by itself, training and testing alike.

    Args:
        num_features: c.
        ref: one of ``SP1 ... SP5`` or ``NormRef(groups, "all", "one")``.
        p, center, eps: of ``Lp``.
        affine: add a gain and a bias per feature.
        device, dtype: as torch's; statistics stay float32 or wider.

    >>> SampleNorm(8, ref=NormRef(2, "all", "one"))
    SampleNorm(8, ref=NormRef(features=2, place='all', samples='one'))
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef = SP2,
        p: float = 2,
        center: Center = "batch",
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, ref, Lp(p, center, eps), Sample(), affine, device=device, dtype=dtype)

    def __repr__(self) -> str:
        return call_of(
            self,
            ref=(self.ref, SP2),
            p=(self.moment.p, 2),
            center=(self.moment.center, "batch"),
            eps=(self.moment.eps, 1e-5),
            affine=(self.affine is not None, True),
        )


def streaming_policy(
    alpha: tuple[float, ...] | None = None,
    beta: tuple[float, ...] | None = None,
    kappa: tuple[float, ...] | None = None,
    memory: float | None = None,
) -> Policy:
    """The policy for these arguments of a streaming layer: memory counted in samples, or the paper's rule.

    Raises:
        ValueError: if arguments of both are given.
    """
    given = {name: value for name, value in (("alpha", alpha), ("beta", beta), ("kappa", kappa)) if value is not None}
    if not given:
        return Evidence() if memory is None else Evidence(memory)
    if memory is not None:
        raise ValueError(
            f"memory={memory!r} counts samples and {', '.join(given)} weigh weight updates (the paper's rule); give "
            "one or the other"
        )
    return Streaming(**{"alpha": ALPHA, "beta": BETA, **given})


def call_of(layer: Norm, **arguments: tuple[Any, Any]) -> str:
    """The constructor call of ``layer``, with every argument that is not at its default."""
    given = [f"{name}={value!r}" for name, (value, default) in arguments.items() if value != default]
    return f"{type(layer).__name__}({', '.join([str(layer.num_features), *given])})"
