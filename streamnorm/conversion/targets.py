"""Which layer of torch computes what a layer of ours does, and the values that it has. Imports the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.conversion.tree import called
from streamnorm.definition.layer import Definition
from streamnorm.definition.operation import Scale, Standardize
from streamnorm.definition.ref import SP2
from streamnorm.definition.stats import Lp
from streamnorm.nn.affine import Affine
from streamnorm.nn.arranged import Arranged
from streamnorm.nn.checkpoints import why_not_running
from streamnorm.nn.norm import Norm
from streamnorm.stream.policy import Batch, Evidence, Sample, Streaming

BATCH: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE: dict[int, type[nn.Module]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def inner(layer: nn.Module) -> Norm:
    """The norm of a layer that may be ``Arranged``."""
    norm = layer.norm if isinstance(layer, Arranged) else layer
    assert isinstance(norm, Norm)
    return norm


def why_none(layer: nn.Module) -> str | None:
    """Why no layer of torch computes what this one does; None: one does."""
    norm = inner(layer)
    d, ref = norm.definition, norm.ref
    last, dims = (layer.last, layer.dims) if isinstance(layer, Arranged) else (None, None)
    if type(norm).forward is not Norm.forward or "forward" in vars(norm):
        return "it has a forward of its own"
    if norm.affine is not None and type(norm.affine) is not Affine:
        return f"its gain and bias are {norm.affine!r}"
    if type(d.moment) is not Lp or d.moment.p != 2:
        return f"torch's layers divide by the deviation, p = 2, and it by that of {d.moment!r}"
    if type(norm.policy) is Sample:
        return _why_no_sample(d, last, dims)
    if type(norm.policy) not in (Batch, Evidence, Streaming):
        return f"it remembers by {norm.policy!r}"
    reason = why_not_running(norm.H1, d)
    if reason is not None:
        return f"torch's running statistics are not what it keeps: {reason}"
    if last is not None or (ref.samples == "batch") == (dims is not None):
        where = "last" if last is not None else "in a sample without its axis" if dims else "in maps of 1 to 3 axes"
        return f"torch has none with running statistics of {ref!r} for features that stand {where}"
    return None


def _why_no_sample(d: Definition, last: tuple[int, ...] | None, dims: int | None) -> str | None:
    divides = type(d.op) is Scale and d.moment.center == "zero"
    if d.ref.place != "all" or not d.ref.is_built_in:
        return f"torch has none with the reference {d.ref!r}"
    if not divides and (type(d.op) is not Standardize or d.moment.center != "batch"):
        return f"torch has none with {d.moment!r} and {d.op!r}"
    if last is not None and d.ref != SP2:
        return f"torch has none with the reference {d.ref!r} for features that stand last"
    if divides and last is None:
        return "nn.RMSNorm takes features that stand last"
    if dims is not None and d.ref.features != "own":
        return f"torch has none with the reference {d.ref!r} that also takes a sample without its axis"
    return None


def counterpart(name: str, layer: nn.Module, dims: int | None) -> nn.Module:
    """A layer of torch's that computes what this one does, on the meta device, with any values.

    Args:
        dims: number of place axes of ``nn.BatchNorm*``; None: not known.

    Raises:
        ValueError: if it is needed and not known.
    """
    norm = inner(layer)
    c, ref, eps, affine = norm.num_features, norm.ref, norm.moment.eps, norm.affine is not None
    options: dict[str, Any] = {"eps": eps, "device": "meta"}
    if isinstance(layer, Arranged) and layer.last is not None:
        kind = nn.RMSNorm if type(norm.definition.op) is Scale else nn.LayerNorm
        return kind(list(layer.last), elementwise_affine=affine, **options)
    options["affine"] = affine
    if isinstance(layer, Arranged) and layer.dims is not None:
        return INSTANCE[layer.dims](c, track_running_stats=norm.H1 is not None, **options)
    if norm.H1 is None:
        return nn.GroupNorm(ref.groups(c), c, **options)
    if dims not in BATCH:
        raise ValueError(
            f"{called(name, layer)} does not come from torch, so that it is not known whether nn.BatchNorm1d, 2d or 3d "
            f"takes its inputs; got dims={dims!r}, give 1, 2 or 3 for all such layers, or dims=lambda name, module: ..."
        )
    return BATCH[dims](c, **options)


@torch.no_grad()
def values(layer: nn.Module) -> dict[str, Tensor | None]:
    """Gain, bias and running statistics by torch's names; None: it has none."""
    norm = inner(layer)
    told: dict[str, Tensor | None] = {"weight": norm.weight, "bias": norm.bias}
    memory = norm.H1
    if memory is None:
        return told
    mean, sigma = memory.estimate.unbind(0)
    has = memory.has_estimate()
    var = (sigma.square() - norm.moment.eps).clamp_min(0)
    told["running_mean"] = torch.where(has, mean, 0)
    told["running_var"] = torch.where(has, var, 1)
    told["num_batches_tracked"] = memory.seen.clone()
    return told
