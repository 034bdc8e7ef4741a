"""A norm with constant statistics as part of the linear map or convolution before it. Imports the layers.

Legend: ``c`` output features of the map, which the norm normalizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from streamnorm.conversion.targets import inner
from streamnorm.conversion.tree import called, places
from streamnorm.definition.operation import Scale, Standardize
from streamnorm.nn.affine import Affine
from streamnorm.nn.arranged import Arranged
from streamnorm.nn.norm import Norm
from streamnorm.ops.fused import is_hooked

TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
MAPS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED
Pairs = Sequence[tuple[str, str]]


def fold_into(model: nn.Module, pairs: Pairs | None = None) -> nn.Module:
    """Put norms with constant statistics into the linear maps or convolutions before them, in place.

    ::

        y = weight (W x + b - mu_hat) / sigma_hat + bias  =  W' x + b'
        W' = weight / sigma_hat W                            b' = weight (b - mu_hat) / sigma_hat + bias

    The norm becomes ``nn.Identity``, and y in evaluation stays the same. The weight stays the same parameter, with new
    values; a bias is added where there is none. A norm after ``nn.Linear`` is for rows ``(n, c)``: its features are on
    axis 1, and those of a linear map on the last.

    Args:
        model: in evaluation, or with frozen norms.
        pairs: names of each map and of the norm that alone takes its output, as for
            ``torch.ao.quantization.fuse_modules``: ``[("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1")]``. None:
            all norms with a memory that directly follow one in an ``nn.Sequential``.

    Returns:
        The model.

    Raises:
        ValueError: with the names, for a norm in training, without statistics, without a memory (``SampleNorm``), with
            statistics for every place, or with a forward of its own; for a map or a norm that stands in several places,
            shares its weight or has hooks; for widths that differ; and if there is nothing to fold. Nothing has
            changed then.
        TypeError: for a pair of other modules.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3), StreamingNorm(3), nn.ReLU())
    >>> x = torch.randn(8, 4)
    >>> y = model(x)
    >>> before = model.eval()(x)
    >>> fold_into(model)
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): Identity()
      (2): ReLU()
    )
    >>> torch.allclose(model(x), before, atol=1e-6)
    True
    """
    found = list(_chained(model) if pairs is None else _named(model, pairs))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no norm with a memory that directly follows a linear map or convolution in an "
            'nn.Sequential; give their names: pairs=[("conv1", "bn1")]'
        )
    names = places(model)
    for _, (name, map_), (other, layer) in found:
        why = _why_not_map(model, map_, names) or _why_not_norm(layer, map_, names)
        if why is not None:
            raise ValueError(f"{called(other, layer)} cannot be folded into {called(name, map_)}: {why}")
    involved = [module for _, (_, map_), (_, layer) in found for module in (map_, layer)]
    if len(set(involved)) < len(involved):
        raise ValueError(f"each map and each norm belongs to one pair, got {pairs}")
    for parent, (_, map_), (name, layer) in found:
        _fold(map_, layer)
        identity = nn.Identity()
        identity.training = layer.training
        parent._modules[name.rpartition(".")[2]] = identity
    return model


Found = tuple[nn.Module, tuple[str, nn.Module], tuple[str, nn.Module]]
"""The parent of a norm; name and module of the map, and of the norm."""


def _chained(model: nn.Module) -> Iterator[Found]:
    for name, parent in model.named_modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        dot = f"{name}." if name else ""
        chain = [(dot + key, child) for key, child in parent._modules.items() if child is not None]
        for (first, map_), (second, layer) in pairwise(chain):
            if type(map_) in MAPS and isinstance(layer, (Norm, Arranged)) and inner(layer).H1 is not None:
                yield parent, (first, map_), (second, layer)


def _named(model: nn.Module, pairs: Pairs) -> Iterator[Found]:
    known = dict(model.named_modules(remove_duplicate=False))
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise TypeError(
                f'a pair is the name of a map and that of the norm after it, ("conv1", "bn1"), got {pair!r}'
            )
        for name in pair:
            if name not in known or not name:
                raise ValueError(
                    f"{type(model).__name__} has no module {name!r}; model.named_modules() tells all names"
                )
        map_, layer = (known[name] for name in pair)
        if type(map_) not in MAPS or not isinstance(layer, (Norm, Arranged)):
            raise TypeError(
                f"a pair is an nn.Linear, nn.Conv1d to 3d or nn.ConvTranspose1d to 3d, and a norm of streamnorm, got "
                f"{called(pair[0], map_)} and {called(pair[1], layer)}"
            )
        yield known[pair[1].rpartition(".")[0]], (pair[0], map_), (pair[1], layer)


def _why_not_map(model: nn.Module, map_: nn.Module, names: dict[nn.Module, list[str]]) -> str | None:
    if len(names[map_]) > 1:
        return f"the map stands in {len(names[map_])} places"
    if is_hooked(map_) or parametrize.is_parametrized(map_):
        return "the map has hooks or a parametrization, or its forward was replaced; remove them first"
    own = {id(parameter) for parameter in map_.parameters()}
    for module in names:
        if module is not map_ and any(id(parameter) in own for parameter in module.parameters(recurse=False)):
            return f"the map shares its weight with {called(names[module][0], module)}"
    return None


def _why_not_norm(layer: nn.Module, map_: nn.Module, names: dict[nn.Module, list[str]]) -> str | None:
    norm, memory = inner(layer), inner(layer).H1
    linear = isinstance(map_, nn.Linear)
    c = map_.out_features if isinstance(map_, nn.Linear) else map_.out_channels
    if len(names[layer]) > 1:
        return f"the norm stands in {len(names[layer])} places"
    if memory is None:
        return "it normalizes each sample with its own statistics, which are no constants"
    if norm.training:
        return "it is in training, where its statistics change; call model.eval(), or streamnorm.freeze(model)"
    if not memory.shaped or not memory.known:
        return "it has no statistics yet; train it, or load a state_dict"
    if norm.num_features != c:
        return f"it normalizes {norm.num_features} features, and the map has {c}"
    if memory.estimate.ndim > 2:
        return f"it keeps statistics for every place ({norm.ref!r}), and the map has one weight for all places"
    if isinstance(layer, Arranged) and (layer.last != (c,) or not linear):
        return "it takes its features from other axes than the map gives them"
    affine = norm.affine
    modules = [module for module in (layer, norm, affine) if module is not None]
    if any(map(is_hooked, modules)):
        return "it has hooks, or its forward was replaced; remove them first"
    plain = type(norm).forward is Norm.forward and (affine is None or type(affine) is Affine)
    if not plain or type(norm.definition.op) not in (Standardize, Scale) or not norm.ref.is_built_in:
        return "it does more than to subtract, divide, multiply and add constants, or has a reference of its own"
    return None


@torch.no_grad()
def _fold(map_: nn.Module, layer: nn.Module) -> None:
    norm = inner(layer)
    assert norm.H1 is not None
    parameters: dict[str, Any] = map_._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    mu, sigma = _wide(norm.H1.estimate.repeat_interleave(norm.num_features // norm.H1.estimate.shape[1], 1)).unbind(0)
    if type(norm.definition.op) is Scale:
        mu = torch.zeros_like(mu)
    scale = (1 if norm.weight is None else _wide(norm.weight).flatten()) / sigma
    shift = -mu * scale + (0 if norm.bias is None else _wide(norm.bias).flatten())
    if isinstance(map_, TRANSPOSED):  # (inputs, outputs of a group, ...), groups along the inputs
        groups: Any = map_.groups
        split = _wide(weight).unflatten(0, (groups, -1))
        scaled = (split * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
    else:
        scaled = _wide(weight) * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if bias is not None:
        shift = shift + _wide(bias) * scale
    weight.copy_(scaled)
    if bias is None:
        parameters["bias"] = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(shift)


def _wide(value: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return value.float() if value.device.type == "mps" else value.double()
