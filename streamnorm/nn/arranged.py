"""A norm for inputs that are arranged otherwise than ``(n, c, *place)``: features last, or without a sample axis.

What torch's layer and instance normalizations take. Imports the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_sizes, expect_whole, is_whole
from streamnorm.inputs import expect_tensor
from streamnorm.nn.checkpoints import GAINS, STATISTICS
from streamnorm.nn.norm import Norm


class Arranged(nn.Module):
    """A ``Norm`` that takes its input as a layer of torch's does; ``convert`` makes it of those.

    Args:
        norm: the norm of c features.
        last: the size of the last axes, c in all, as ``normalized_shape`` of ``nn.LayerNorm``: they are the features,
            and every position in the axes before them is a sample of its own.
        dims: number of place axes, as of ``nn.InstanceNorm1d`` to ``3d``, which also take one sample without its axis.

    Shapes: ``x (*, *last) -> y (*, *last)``, any number of axes before, also a nested tensor of these; or
    ``(n, c, *place)`` and ``(c, *place)``.

    Raises:
        ValueError: unless exactly one of last and dims is given; for a last that does not hold c features, and for an
            input of another shape.

    >>> import torch
    >>> from streamnorm import SampleNorm
    >>> x = torch.randn(2, 7, 5)
    >>> torch.allclose(Arranged(SampleNorm(5), last=(5,))(x), nn.LayerNorm(5)(x), atol=1e-6)
    True
    """

    def __init__(self, norm: Norm, last: Sequence[int] | None = None, dims: int | None = None) -> None:
        super().__init__()
        if not isinstance(norm, Norm):
            raise TypeError(f"norm is a Norm, got {norm!r}")
        if (last is None) == (dims is None):
            raise ValueError(f"give the last axes or the number of place axes, one of both, got {last=} and {dims=}")
        if last is not None:
            last = tuple(last)
            if not all(map(is_whole, last)) or math.prod(last) != norm.num_features:
                raise ValueError(f"the last axes hold the {norm.num_features} features of the norm, got last={last}")
        if dims is not None:
            expect_whole("dims", dims)
            expect_sizes("the place axes", (1,) * dims)
        self.last, self.dims = last, dims
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        expect_tensor("the input", x)
        c = self.norm.num_features
        if self.last is not None:
            return self._nested(x, self.last) if x.is_nested else self._rows(x, self.last)
        assert self.dims is not None
        if x.ndim - self.dims not in (1, 2):
            raise ValueError(
                f"expected (n, {c}, *place) or (n = 1 left out) ({c}, *place) with {self.dims} place axes, got "
                f"{tuple(x.shape)}"
            )
        return self.norm(x.unsqueeze(0)).squeeze(0) if x.ndim == self.dims + 1 else self.norm(x)

    def _rows(self, x: Tensor, last: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[-len(last) :]) != last:
            raise ValueError(f"features come last here: expected (*, {str(last)[1:]}, got {tuple(x.shape)}")
        rows = math.prod(x.shape[: -len(last)])
        return self.norm(x.reshape(rows, self.norm.num_features)).reshape(x.shape)

    def _nested(self, x: Tensor, last: tuple[int, ...]) -> Tensor:
        """Of sequences of several lengths, as ``nn.TransformerEncoder`` makes of padded ones in evaluation."""
        parts = [part.flatten(0, -1 - len(last)) for part in x.unbind()]
        rows = self._rows(torch.cat(parts), last).split([len(part) for part in parts])
        made = [y.reshape(part.shape) for y, part in zip(rows, x.unbind(), strict=True)]
        return torch.nested.as_nested_tensor(made)

    @property
    def weight(self) -> nn.Parameter | None:
        """The gain of the norm, or None."""
        return self.norm.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the norm, or None."""
        return self.norm.bias

    @property
    def eps(self) -> float:
        """NaN: in evaluation ``nn.TransformerEncoderLayer`` would compute a layer normalization from eps, weight and
        bias, without a call of this layer; it does not where the eps of its two norms differ."""
        return math.nan

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in (*GAINS, *STATISTICS):
            if prefix + name in state_dict:
                state_dict.setdefault(f"{prefix}norm.{name}", state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return f"Arranged({self.norm!r}, " + (f"last={self.last})" if self.last is not None else f"dims={self.dims})")
