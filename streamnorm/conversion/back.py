"""From our layers to torch's, in place, and as a checkpoint with torch's names. Imports the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from streamnorm.conversion.convert import ORIGIN
from streamnorm.conversion.targets import BATCH, counterpart, inner, values, why_none
from streamnorm.conversion.tree import Where, called, emptied, exchange, places, selected
from streamnorm.nn.arranged import Arranged
from streamnorm.nn.checkpoints import GAINS
from streamnorm.nn.norm import Norm
from streamnorm.nn.timespecific import TimeSpecificNorm
from streamnorm.stream.policy import Batch

Dims = int | Callable[[str, nn.Module], int] | None


def to_torch(model: nn.Module, dims: Dims = None, where: Where | None = None) -> nn.Module:
    """Exchange our layers in a model for those of torch that compute the same, in place.

    ::

        running_mean = mu_hat, running_var = sigma_hat^2 - eps       of the estimate that testing uses

    A layer that ``convert`` made becomes what it was, unless it computes something else by now: converted and back is
    the same in outputs, state and hooks. Others: ``BA1`` with a memory ``nn.BatchNorm1d`` to ``3d``, ``SampleNorm``
    ``nn.GroupNorm`` of 1 (``SP2``), c (``SP1``) or several groups, ``Arranged`` ones ``nn.LayerNorm``, ``nn.RMSNorm``
    and ``nn.InstanceNorm*``. Gain and bias stay the same parameters.

    ``y`` in evaluation is the same. A variance comes back as exactly as sigma tells it, to about 1e-7 of itself plus
    eps in float32. It is not multiplied by n / (n - 1), which torch's training does to what it averages: the n of our
    arrivals is not kept. A streaming layer becomes a batch normalization: it trains differently. A frozen layer becomes
    one in evaluation mode, which the next ``train()`` ends.

    Args:
        model: any module; if it is such a layer itself, the new layer is returned.
        dims: number of place axes, 1 to 3, of ``BA1`` layers that do not come from torch, ``nn.BatchNorm1d`` to ``3d``
            (1 for ``(n, c)`` too); or ``dims(name, module)``.
        where: ``where(name, module)`` selects layers; None: all.

    Returns:
        The model.

    Raises:
        ValueError: with the name of the layer, if torch has none such (p other than 2, other references, statistics
            for every time step), or for dims that are needed and not given; for a model without such layers. Nothing
            has changed then.

    >>> import torch
    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3), StreamingNorm(3))
    >>> y = model(torch.randn(8, 4))
    >>> to_torch(model, dims=1)[1]
    BatchNorm1d(3, eps=1e-05, momentum=0.1, ...)
    """
    new: dict[nn.Module, nn.Module] = {}
    for name, names, layer in _layers(model):
        if selected(names, layer, where):
            new[layer] = _made(name, layer, dims)
    if not new:
        chosen = "" if where is None else " that where() selects"
        raise ValueError(f"{type(model).__name__} has no layer of streamnorm{chosen}")
    return exchange(model, new)


def torch_state_dict(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of a model with torch's names in place of ours: ``weight``, ``bias``, ``running_mean``,
    ``running_var``, ``num_batches_tracked``. It loads into the same model with torch's layers, which then computes the
    same in evaluation, and back into this one.

    Raises:
        ValueError: for a layer that ``to_torch`` refuses.

    >>> from streamnorm import BatchNorm
    >>> list(torch_state_dict(nn.Sequential(nn.Linear(4, 3, bias=False), BatchNorm(3))))
    ['0.weight', '1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    told: dict[str, Any] = dict(model.state_dict())
    for name, names, layer in _layers(model):
        _expect_one(name, layer)
        mine = {key: value.detach() for key, value in values(layer).items() if value is not None}
        for each in names:
            prefix = f"{each}." if each else ""
            known = list(told)
            first = next((i for i, key in enumerate(known) if key.startswith(prefix)), len(known))
            kept = [(key, told[key]) for key in known if not key.startswith(prefix)]
            kept[first:first] = [(prefix + key, value) for key, value in mine.items()]
            told = dict(kept)
    return told


def _layers(model: nn.Module) -> Iterator[tuple[str, list[str], nn.Module]]:
    """Our layers, those inside an ``Arranged`` left out; the first of their names, all of them, and the layer."""
    found = places(model)
    inside = {layer.norm for layer in found if isinstance(layer, Arranged)}
    for layer, names in found.items():
        if isinstance(layer, TimeSpecificNorm):
            inside |= set(layer.times)  # type: ignore[arg-type]
            yield names[0], names, layer
        elif isinstance(layer, (Norm, Arranged)) and layer not in inside:
            yield names[0], names, layer


def _expect_one(name: str, layer: nn.Module) -> None:
    """Raise unless torch has a layer that computes the same."""
    timed = "it keeps statistics for every time step"
    why = timed if isinstance(layer, TimeSpecificNorm) else why_none(layer)
    if why is not None:
        raise ValueError(
            f"{called(name, layer)}, {layer!r}, has no counterpart in torch: {why}; leave it as it is with "
            f"where=lambda name, module: name != {name!r}"
        )


def _made(name: str, layer: nn.Module, dims: Dims) -> nn.Module:
    _expect_one(name, layer)
    origin: nn.Module | None = vars(layer).get(ORIGIN)
    norm = inner(layer)
    known = next((i for i, kind in BATCH.items() if isinstance(origin, kind)), None)
    if isinstance(origin, nn.SyncBatchNorm) and origin.track_running_stats:
        known = 1  # it takes the place of what is made here, whatever that is
    if known is None and norm.H1 is not None:
        known = dims(name, layer) if callable(dims) else dims
    made = counterpart(name, layer, known)
    if origin is None or not _is_that(origin, made):
        origin = None
    else:
        made = emptied(origin)
    if getattr(made, "eps", 0.0) is not None:  # of RMSNorm None stays
        vars(made)["eps"] = norm.moment.eps
    if isinstance(norm.policy, Batch):
        vars(made)["momentum"] = norm.policy.rate
    parameters: dict[str, Any] = made._parameters
    for key, value in values(layer).items():
        if key in GAINS:
            if key in parameters:
                parameters[key] = value
        elif value is not None and value.is_floating_point():
            made._buffers[key] = value.to(_dtype(value, norm, origin and origin._buffers[key], origin))
        else:
            made._buffers[key] = value
    return made


def _dtype(value: Tensor, norm: Norm, before: Tensor | None, origin: nn.Module | None) -> torch.dtype:
    """Of a running statistic: as it was before, unless the layer has been cast since; else that of the gain."""
    weight = None if origin is None else origin._parameters.get("weight")
    now = value.dtype if norm.weight is None else norm.weight.dtype
    if before is None:
        return now
    then = torch.promote_types(before.dtype, torch.float32) if weight is None else weight.dtype
    return before.dtype if then == now else now


def _is_that(origin: nn.Module, made: nn.Module) -> bool:
    """Whether a layer that was converted still computes what it did: of the same kind, with the same settings."""
    if isinstance(made, _BatchNorm):
        return isinstance(origin, _BatchNorm) and origin.track_running_stats
    settings = "normalized_shape", "num_groups", "num_channels", "num_features", "track_running_stats"
    return isinstance(origin, type(made)) and all(
        getattr(origin, name, None) == getattr(made, name, None) for name in settings
    )
