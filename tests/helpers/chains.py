"""Chains of layers with statistics, and pictures of a model: what the tests of recalibration stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm import BatchNorm, Norm, StreamingNorm
from streamnorm.calibration.postproc import layers

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm": BatchNorm,
    "StreamingNorm": StreamingNorm,
    "torch": nn.BatchNorm1d,
    "torch sync": nn.SyncBatchNorm,
}


def deep(norm: Callable[[int], nn.Module], width: int = 6, depth: int = 3) -> nn.Sequential:
    """Layers whose features have means and deviations of their own, none of them standardized already."""
    made = nn.Sequential()
    for _ in range(depth):
        made += nn.Sequential(nn.Linear(width, width), norm(width), nn.ReLU())
    for weight in (p for m in made for p in m.parameters()):
        nn.init.normal_(weight)
    return made.append(nn.Linear(width, 2))


def stored(model: nn.Module) -> list[Tensor]:
    """What testing uses in every layer, mean and sigma."""
    return [table for layer in layers(model) for site in layer.sites if (table := site.stored()) is not None]


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that recalibration could leave changed."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        seen[name] = module.training, hooks, getattr(module, "momentum", None), getattr(module, "steps", None)
        for own, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            seen[f"{name}.{own}"] = value.clone(), value.requires_grad, value.data_ptr()
        if isinstance(module, Norm) and module.H1 is not None:
            seen[f"{name}: known"] = module.H1.known, module.H1.shaped
    return seen


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value[0], Tensor):
            assert now[name][0].equal(value[0]), name
            assert now[name][1] == value[1], name
            assert now[name][2] == value[2] or not value[0].numel(), f"{name} lies elsewhere"
        else:
            assert now[name] == value, name


def failing(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(4)
    raise RuntimeError("the disk is lost")
