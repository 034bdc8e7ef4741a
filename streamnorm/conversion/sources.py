"""What torch's normalization layers are, in our terms; and those that cannot be read. Imports the definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from streamnorm.conversion.tree import called
from streamnorm.definition.ref import BA1, SP1, SP2, NormRef
from streamnorm.nn.checkpoints import GAINS, STATISTICS

KINDS = _BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
FORWARDS = {kind.forward for kind in (*KINDS, nn.SyncBatchNorm)}


@dataclass(frozen=True)
class Source:
    """A normalization layer of torch's.

    Attributes:
        module: the layer.
        name: in the model.
        num_features: c.
        ref: R, of training.
        eps: of the variance.
        divides: it is ``x / sigma`` about 0 (``nn.RMSNorm``).
        last: the axes of its features, if they come last.
        dims: the number of place axes, if there may be no sample axis.
    """

    module: nn.Module
    name: str
    num_features: int
    ref: NormRef
    eps: float
    divides: bool = False
    last: tuple[int, ...] | None = None
    dims: int | None = None

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Running mean and variance and the number of mini-batches, or None."""
        mean, var, batches = (self.module._buffers.get(name) for name in STATISTICS)
        return None if mean is None or var is None else (mean, var, batches)

    @property
    def gains(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Gain and bias."""
        weight, bias = (self.module._parameters.get(name) for name in GAINS)
        return weight, bias

    def refuse(self, why: str) -> ValueError:
        """The error that it cannot be converted."""
        return ValueError(
            f"{called(self.name, self.module)} cannot be converted: {why}; or leave it as it is with "
            f"where=lambda name, module: name != {self.name!r}"
        )


def is_source(module: nn.Module) -> bool:
    """Whether it is a normalization layer of torch's."""
    return isinstance(module, KINDS)


def read(name: str, module: nn.Module) -> Source:
    """The layer in our terms.

    Raises:
        ValueError: for one that does something else or more: with a forward of its own, lazy, parametrized, or with
            other parameters, buffers or modules.
    """
    given: dict[str, Any] = {"ref": BA1, "eps": 0.0}
    match module:
        case _BatchNorm():
            given = {"ref": BA1, "eps": module.eps}
        case _InstanceNorm():
            given = {"ref": SP1, "eps": module.eps, "dims": module._get_no_batch_dim() - 1}
        case nn.GroupNorm(num_groups=groups, num_channels=c):
            given = {"ref": _grouped(groups, c), "eps": module.eps}
        case nn.LayerNorm():
            given = {"ref": SP2, "eps": module.eps, "last": tuple(module.normalized_shape)}
        case nn.RMSNorm():
            given = {"ref": SP2, "eps": _rms_eps(module), "divides": True, "last": tuple(module.normalized_shape)}
    c = math.prod(given["last"]) if "last" in given else getattr(module, "num_features", None)
    source = Source(module, name, getattr(module, "num_channels", 0) if c is None else c, **given)
    _expect_plain(source)
    return source


def _grouped(groups: int, num_features: int) -> NormRef:
    if groups == 1:
        return SP2
    return SP1 if groups == num_features else NormRef(groups, "all", "one")


def _rms_eps(module: nn.RMSNorm) -> float:
    """Of eps=None: that of torch's computation, which is in float32 or wider."""
    if module.eps is not None:
        return module.eps
    dtype = torch.get_default_dtype() if module.weight is None else module.weight.dtype
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _expect_plain(source: Source) -> None:
    module = source.module
    tensors = {**module._parameters, **module._buffers}
    if any(is_lazy(value) for value in tensors.values()):
        raise source.refuse("it is lazy and has no shape yet; run one batch through the model first")
    if type(module).forward not in FORWARDS or "forward" in vars(module):
        raise source.refuse("it has a forward of its own, which may do more than torch's; exchange it by hand")
    if strange := sorted((set(tensors) | set(module._modules)) - {*GAINS, *STATISTICS}):
        raise source.refuse(
            f"it holds {', '.join(strange)}, which torch's layer does not, as of a parametrization; remove that first"
        )
    weight, bias = source.gains
    if weight is None and bias is not None:
        raise source.refuse("it has a bias and no gain; give it a weight of ones")
    if isinstance(module, nn.SyncBatchNorm) and _is_distributed():
        raise source.refuse(
            "it shares statistics among processes, and each process keeps its own here; make it an nn.BatchNorm first "
            "if that is meant"
        )


def _is_distributed() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
