"""Layers that mix samples say so to what trains with differential privacy (opacus). Imports torch.

There a sample's gradient has to be its own, and a layer that normalizes with other samples makes it depend on them.
The validator of opacus looks at the types of modules that hold parameters: of our layers, at the gain and bias. So
these are marked, and known to the validator where opacus is imported first. Whatever was validated, a training call is
refused once opacus records gradients of single samples. Nothing here imports opacus.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

RECORDS = "grad_sample"
"""The attribute in which opacus keeps a parameter's gradients of single samples."""
WHY = (
    "normalizes a sample with others, so that its gradient is not its own and training is not private; use SampleNorm, "
    "or streamnorm.freeze(model) for constant statistics"
)


def mark(gains: nn.Module) -> None:
    """Gain and bias belong to a layer that mixes samples."""
    gains.mixes_samples = True  # type: ignore[assignment]
    announce(type(gains))


def announce(kind: type[nn.Module]) -> None:
    """Let the validator of opacus ask about modules of this type, if it is there."""
    validators: Any = sys.modules.get("opacus.validators")
    if hasattr(validators, "ModuleValidator"):
        validators.ModuleValidator.VALIDATORS.setdefault(kind, _validate)


def _validate(gains: nn.Module) -> list[Exception]:
    """What opacus asks: the errors of a module."""
    if not getattr(gains, "mixes_samples", False):
        return []
    errors: Any = sys.modules["opacus.validators.errors"]
    return [errors.ShouldReplaceModuleError(f"a layer with {gains!r} {WHY}")]


def refuse_private(layer: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raise if gradients of single samples are recorded of any of these parameters.

    Raises:
        RuntimeError: with the layer and what to do.
    """
    if any(hasattr(parameter, RECORDS) for parameter in parameters):
        raise RuntimeError(f"{layer!r} {WHY}")
