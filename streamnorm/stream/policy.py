"""Policies: the rules of H1 and H2, and what a layer normalizes with (paper, sections 3.1, 3.2, 3.3).

A policy is data: the rules F and G, and whether training normalizes with the mini-batch's own statistics s or with
F's estimate s_hat. It handles no tensors. Imports the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamnorm.stream import (
    Controlled,
    Exponential,
    GradientRule,
    Lagging,
    LongShort,
    Pooled,
    Renorm,
    RenormGradient,
    Residual,
    Rule,
)


class Policy:
    """A policy; subclass it to use an F and a G of your own in a layer.

    Attributes:
        F: the rule of H1, fed with statistics; None: no memory.
        G: the rule of H2, fed with the gradients of the statistics; None: they pass unchanged.
        uses_estimate: training normalizes with F's estimate (Algorithm 5) and not with the mini-batch's own statistics
            (Algorithms 1 and 3).
        caution: the gradients of gain and bias of a call of m samples are multiplied by m / (m + caution).

    >>> from streamnorm import BA1, Lp, Norm
    >>> class Slow(Policy):
    ...     F, uses_estimate = Exponential(0.01), True
    >>> Norm(8, BA1, Lp(2, "estimate"), Slow()).policy.trust(1)
    1.0
    """

    F: Rule | None = None
    G: Rule | GradientRule | None = None
    uses_estimate: bool = False
    caution: float = 0.0

    def trust(self, samples: int) -> float:
        """The factor on the gradients of gain and bias of a call of so many samples."""
        return samples / (samples + self.caution) if self.caution else 1.0


@dataclass(frozen=True)
class Sample(Policy):
    """Sample normalization: every sample by itself, training and testing alike (section 3.1, Algorithms 1 and 2).

    ``s_hat = s``, of each sample.

    >>> from streamnorm import Lp, Norm, SP2
    >>> Norm(8, SP2, Lp(2), Sample()).H1 is None
    True
    """


@dataclass(frozen=True)
class Batch(Policy):
    """General batch normalization: a mini-batch by itself in training, F's running estimate in testing
    (section 3.2, Algorithms 3 and 4).

    Args:
        rate: weight of the newest mini-batch in the running estimate of ``(mu, sigma)``.

    ``s_hat = s`` in training; ``s_hat = long``, ``long <- (1 - rate) long + rate s`` in testing.

    >>> Batch(rate=0.05).F
    Exponential(rate=0.05)
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        Exponential(self.rate)

    @property
    def F(self) -> Rule:  # type: ignore[override]
        return Exponential(self.rate)


@dataclass(frozen=True)
class Streaming(Policy):
    """Streaming normalization: F's estimate in training and testing, G's estimate of its gradients
    (section 3.3, Algorithms 5 and 6).

    ::

        s_hat = alpha1 long + alpha2 short             at a weight update: long <- kappa1 long + kappa2 short
        g_hat = beta1 long + beta2 short + beta3 g     at a weight update: long <- kappa3 long + kappa4 short

    Args:
        alpha: (alpha1, alpha2), of the statistics.
        beta: (beta1, beta2, beta3), of their gradients.
        kappa: (kappa1, ..., kappa4); None takes the paper's rule kappa1 = kappa3 = alpha1, kappa2 = kappa4 = alpha2
            (section 3.3.3).

    Raises:
        ValueError: for wrong lengths, values that are not finite, an alpha, kappa1 or kappa2 < 0, or alpha2 = 0
            without a kappa. Sums other than 1 are taken as they are.

    >>> Streaming(alpha=(0.5, 0.5)).F
    LongShort(mix=(0.5, 0.5, 0.0), keep=(0.5, 0.5))
    """

    alpha: tuple[float, ...] = (0.7, 0.3)
    beta: tuple[float, ...] = (0.7, 0.3, 0.0)
    kappa: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, length in (("alpha", 2), ("beta", 3), ("kappa", 4)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (tuple, list)) or len(value) != length:
                raise ValueError(f"{name} is a tuple of {length} numbers, got {value!r}")
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
                raise ValueError(f"{name} holds {length} finite numbers, got {value!r}")
            if name != "beta" and min(value[:2]) < 0:
                raise ValueError(f"{name}1 and {name}2 weigh sigmas too and are numbers >= 0, got {name}={value!r}")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if self.kappa is None and self.alpha[1] == 0:
            raise ValueError(
                f"alpha={self.alpha} leaves kappa2 = alpha2 = 0, so that long would stay what the first weight update "
                "made it; give kappa, for instance kappa=(0.9, 0.1, 0.9, 0.1)"
            )

    @property
    def _kappa(self) -> tuple[float, ...]:
        return self.kappa or (*self.alpha, *self.alpha)

    @property
    def F(self) -> Rule:  # type: ignore[override]
        return LongShort((self.alpha[0], self.alpha[1], 0.0), (self._kappa[0], self._kappa[1]))

    @property
    def G(self) -> Rule:  # type: ignore[override]
        return LongShort((self.beta[0], self.beta[1], self.beta[2]), (self._kappa[2], self._kappa[3]))

    uses_estimate = True


@dataclass(frozen=True)
class Evidence(Policy):
    """Streaming normalization with a memory counted in samples (Algorithms 5 and 6 with the F and G of ``Pooled`` and
    ``Residual``): from one sample and one weight update at a time to thousands of rows an update.

    Gain and bias learn with caution: their gradient from m samples is multiplied by m / (m + 4). No regression removes
    the mean of their gradient, as it does for the rest of a layer, and consecutive samples give them similar gradients:
    at a learning rate of 0.1 they switch off the units of a network on a stream of similar labels.

    Args:
        memory: length of the memory of statistics in samples, at least 4 weight updates; of gradients, a fifth of it.

    Raises:
        ValueError: unless memory is a number above 0.

    >>> Evidence(memory=50).F.memory, Evidence(memory=50).G.memory, Evidence().trust(4)
    (50, 10.0, 0.5)
    """

    memory: float = 100.0

    def __post_init__(self) -> None:
        Pooled(self.memory)

    @property
    def F(self) -> Rule:  # type: ignore[override]
        return Pooled(self.memory)

    @property
    def G(self) -> GradientRule:  # type: ignore[override]
        return Residual(self.memory / 5)

    uses_estimate = True
    caution = 4.0


@dataclass(frozen=True)
class OnlineNormalization(Policy):
    """Online Normalization (Chiley et al. 2019), for comparison: ``Lagging`` and ``Controlled``, with
    ``Lp(2, "estimate")``.

    An arrival is a mini-batch here, and all its samples are normalized with the state from before it. In their paper
    it is a sample: ``OnlineNorm`` is the layer that processes a mini-batch sample by sample.

    Args:
        alpha_forward: decay of the averages of mean and variance per arrival.
        alpha_backward: ``1 - alpha_backward`` is the share of the accumulated errors subtracted from a gradient.
    """

    alpha_forward: float = 0.999
    alpha_backward: float = 0.99

    def __post_init__(self) -> None:
        Lagging(self.alpha_forward)
        Controlled(self.alpha_backward)

    @property
    def F(self) -> Rule:  # type: ignore[override]
        return Lagging(self.alpha_forward)

    @property
    def G(self) -> GradientRule:  # type: ignore[override]
        return Controlled(self.alpha_backward)

    uses_estimate = True


@dataclass(frozen=True)
class BatchRenormalization(Policy):
    """Batch Renormalization (Ioffe 2017), for comparison: ``Renorm`` and ``RenormGradient``, in Setting A or C.

    Args:
        rate: weight of the newest mini-batch in the running averages.
        r_max, d_max, begin, r_end, d_end: of ``Renorm``, in weight updates.
    """

    rate: float = 0.01
    r_max: float = 3.0
    d_max: float = 5.0
    begin: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    def __post_init__(self) -> None:
        Renorm(self.rate, self.r_max, self.d_max, self.begin, self.r_end, self.d_end)

    @property
    def F(self) -> Rule:  # type: ignore[override]
        return Renorm(self.rate, self.r_max, self.d_max, self.begin, self.r_end, self.d_end)

    @property
    def G(self) -> GradientRule:  # type: ignore[override]
        return RenormGradient()

    uses_estimate = True
