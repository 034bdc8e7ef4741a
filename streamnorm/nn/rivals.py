"""Other authors' layers for streams and small mini-batches, as policies of ours, for comparison with streaming.

Imports the layers and what stands below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_choice, expect_finite
from streamnorm.definition.ref import BA1, NormRef
from streamnorm.definition.stats import Lp
from streamnorm.nn.affine import Device
from streamnorm.nn.layers import call_of
from streamnorm.nn.norm import Norm
from streamnorm.stream.policy import BatchRenormalization, OnlineNormalization

Bound = Literal["clamp", "scale", "none"]


class OnlineNorm(Norm):
    """Online Normalization (Chiley et al. 2019, arXiv 1905.05894): sample by sample, for any mini-batch size.

    ::

        y = weight (x - mu_{t-1}) / sigma_{t-1} + bias      mu, sigma: exponential averages of earlier samples
        y' = dy - (1 - alpha_backward) e_y y                e_y <- e_y + mean(y' y)
        dx = y' / sigma_{t-1} - (1 - alpha_backward) e_1    e_1 <- e_1 + mean(dx)

    Samples arrive in order, forward and backward. Then the outputs are bounded, in training and testing:
    clamped, or each sample scaled by the root of its mean square.

    Args:
        num_features: c.
        ref: the NormRef R.
        alpha_forward, alpha_backward: of ``OnlineNormalization``, for each sample.
        bound: "clamp" to ``+- limit``, "scale", or "none".
        limit: where outputs are clamped.
        eps: part of every variance.
        affine: a gain and a bias per feature, before the bound.
        device, dtype: as torch's; statistics stay float32 or wider.
        place: of ``Norm``: the size of the map.

    >>> OnlineNorm(8, bound="scale")
    OnlineNorm(8, bound='scale')
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef = BA1,
        alpha_forward: float = 0.999,
        alpha_backward: float = 0.99,
        bound: Bound = "clamp",
        limit: float = 5.0,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        place: Sequence[int] | None = None,
    ) -> None:
        expect_choice("bound", bound, ("clamp", "scale", "none"))
        expect_finite("limit", limit, above=True)
        policy = OnlineNormalization(alpha_forward, alpha_backward)
        super().__init__(num_features, ref, Lp(2, "estimate", eps), policy, affine, None, device, dtype, place)
        self.bound, self.limit = bound, limit

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError("OnlineNorm takes no mask; crop or pack its input")
        y = super().forward(x)
        if self.bound == "clamp":
            return y.clamp(-self.limit, self.limit)
        if self.bound == "scale" and y.numel():
            return y * (y.square().mean(tuple(range(1, y.ndim)), keepdim=True) + self.moment.eps).rsqrt()
        return y

    def _composed(self, x: Tensor, affine: nn.Module | None, mask: Tensor | None = None) -> Tensor:
        steps, self.steps = self.steps, max(1, len(self._view(x, 1)[0]))
        try:
            return super()._composed(x, affine, mask)
        finally:
            self.steps = steps

    def __repr__(self) -> str:
        policy = self.policy
        assert isinstance(policy, OnlineNormalization)
        return call_of(
            self,
            ref=(self.ref, BA1),
            alpha_forward=(policy.alpha_forward, 0.999),
            alpha_backward=(policy.alpha_backward, 0.99),
            bound=(self.bound, "clamp"),
            limit=(self.limit, 5.0),
            eps=(self.moment.eps, 1e-5),
            affine=(self.affine is not None, True),
            place=(self.place, None),
        )


class BatchRenorm(Norm):
    """Batch Renormalization (Ioffe 2017, arXiv 1702.03275).

    ::

        y = weight ((x - mu_B) / sigma_B r + d) + bias      r, d: towards running averages, constant in the gradient

    Raises for one sample per call on fully connected input: there mu_B = x and sigma_B = sqrt(eps), so that y would be
    d alone, and the gradient of x 0.

    Args:
        num_features: c.
        ref: one of ``BA1 ... BA6``.
        rate: weight of the newest mini-batch in the running averages.
        r_max, d_max: the bounds of r and d, which rise from 1 and 0.
        begin, r_end, d_end: weight updates before the bounds start to rise, and until they are reached.
        eps: part of every variance.
        affine: add a gain and a bias per feature.
        device, dtype: as torch's; statistics stay float32 or wider.
        place: of ``Norm``: the size of the map.

    >>> BatchRenorm(8, r_max=2.0)
    BatchRenorm(8, r_max=2.0)
    """

    def __init__(
        self,
        num_features: int,
        ref: NormRef = BA1,
        rate: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        begin: int = 5_000,
        r_end: int = 40_000,
        d_end: int = 25_000,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        place: Sequence[int] | None = None,
    ) -> None:
        policy = BatchRenormalization(rate, r_max, d_max, begin, r_end, d_end)
        super().__init__(num_features, ref, Lp(2, "batch", eps), policy, affine, None, device, dtype, place)

    def __repr__(self) -> str:
        policy = self.policy
        assert isinstance(policy, BatchRenormalization)
        default = BatchRenormalization()
        names = ("rate", "r_max", "d_max", "begin", "r_end", "d_end")
        return call_of(
            self,
            ref=(self.ref, BA1),
            **{name: (getattr(policy, name), getattr(default, name)) for name in names},
            eps=(self.moment.eps, 1e-5),
            affine=(self.affine is not None, True),
            place=(self.place, None),
        )
