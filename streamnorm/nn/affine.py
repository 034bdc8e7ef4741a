"""The learnable gain and bias, which follow a normalization (paper, section 3.5). Imports the checks and torch.

Legend: ``n`` inputs, ``c`` features, ``place`` = x, y, z.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.inputs import expect_floating, expect_tensor
from streamnorm.ops.fused import is_hooked

Device = torch.device | str | int | None


class Affine(nn.Module):
    """The learnable gain and bias, a layer of its own after each normalization (section 3.5).

    ``y = weight x + bias``, one pair per feature; ``x (n, c, *place) -> y (n, c, *place)``.

    Args:
        num_features: c.
        device, dtype: as torch's.
        bias: False: the gain alone, ``y = weight x``; ``bias`` is None then.

    >>> Affine(3)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, num_features: int, device: Device = None, dtype: torch.dtype | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        zeros = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, trust: float = 1.0) -> Tensor:
        """``y``; the gradients of gain and bias are multiplied by ``trust``."""
        expect_tensor("the input", x)
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (n, {self.num_features}, ...), got {tuple(x.shape)}")
        expect_floating("the input", x)
        shape = (-1, *[1] * (x.ndim - 2))
        y = x * _scaled(self.weight, trust).reshape(shape)
        if self.bias is not None:
            y = y.add_(_scaled(self.bias, trust).reshape(shape))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + ("" if self.bias is not None else ", bias=False")


def _scaled(parameter: Tensor, trust: float) -> Tensor:
    """The same values, with gradients multiplied by ``trust``."""
    return parameter if trust == 1 else torch.lerp(parameter.detach(), parameter, trust)


def gains_of(affine: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Gain and bias of a plain ``Affine`` without hooks, one pair per feature on one device; None for anything else."""
    found = unwatched(affine)
    if found is None or affine is None:
        return None
    weight, bias = found
    return found if weight.shape == bias.shape == (affine.num_features,) and weight.is_cpu == bias.is_cpu else None


def unwatched(affine: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """``gains_of`` without checking shapes, for an operator, which does so itself."""
    if type(affine) is not Affine or is_hooked(affine):
        return None
    parameters: Any = affine._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    return None if bias is None else (weight, bias)


def trusting(affine: nn.Module, trust: float) -> Callable[[Tensor], Tensor]:
    """``affine`` with the gradients of its gain and bias multiplied by ``trust``; a module with its own ``forward`` is
    called unchanged."""
    return affine if trust == 1 else partial(_trusted, affine, trust)


def _trusted(affine: nn.Module, trust: float, y: Tensor) -> Tensor:
    # Checked at every call: its forward may be replaced between calls.
    takes_trust = (
        isinstance(affine, Affine) and type(affine).forward is Affine.forward and "forward" not in vars(affine)
    )
    return affine(y, trust=trust) if takes_trust else affine(y)
