"""References without the activations that a mask leaves out, such as the padding of sequences or maps. Imports the
references and the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamnorm.definition.layer import Definition
from streamnorm.definition.ref import NormRef


@dataclass(frozen=True, eq=False, repr=False)
class Masked(NormRef):
    """The reference of one call, without the activations where ``real (g, m, 1, 1, *place)`` is false::

        mean(x) = sum of real x / number of real x

    A reference without a real activation has mean 0.
    """

    real: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        real = self.real
        assert real is not None
        dims = self.dims(x.ndim)
        share = real.expand_as(x).to(x.dtype)
        share = share / share.sum(dims, keepdim=True).clamp_min(1)  # before sums, so that none overflows
        x = torch.where(real, x, 0)
        near = (x.detach() * share).sum(dims, keepdim=True)  # a large mean loses no precision
        return near + (torch.where(real, x - near, 0) * share).sum(dims, keepdim=True)


def masked(view: Tensor, mask: Tensor, definition: Definition) -> tuple[Tensor, Definition]:
    """The canonical ``view (g, m, G, q, *place)`` with 0 where ``mask (g m, *place)`` is false, and the definition
    that leaves these activations out."""
    g, m, _, _, *place = view.shape
    real = mask.reshape(g, m, 1, 1, *place)
    ref = definition.ref
    reals = Masked(ref.features, ref.place, ref.samples, ref.window, real)
    return torch.where(real, view, 0), Definition(reals, definition.moment, definition.op)


def expect_mask(mask: object, x: Tensor, ref: NormRef) -> None:
    """Raise for anything but a mask of ``x (n, c, *place)`` for this reference.

    Raises:
        TypeError, ValueError: with what came, and how to mend it.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"a mask is a tensor of torch.bool, true where x is real, got {kind}; write mask.bool()")
    wanted = (x.shape[0], *x.shape[2:])
    if mask.shape != wanted or mask.device != x.device:
        raise ValueError(
            f"the mask of an input {tuple(x.shape)} on {x.device} is {wanted}, without the feature axis, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    if not ref.is_built_in or (ref.place != "all" and (ref.place, ref.samples) != ("here", "one")):
        raise ValueError(
            f"{ref!r} has statistics for each place or of one's own, which a mask would leave without activations; use "
            "a reference over all places, such as BA1, BA2, SP1 or SP2, or SP5"
        )
