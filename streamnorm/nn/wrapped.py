"""Layers in a model that ``DistributedDataParallel`` wraps: the processes that share their statistics are found by
itself. Imports the replicas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from streamnorm.nn.replicas import Replicas, expect_shareable, memories
from streamnorm.stream.buffers import Buffers


def is_shared(module: Any) -> bool:
    """Whether a module has memories that processes can share."""
    return hasattr(module, "replicas")


def watch() -> None:
    """Find the layers of every model that is wrapped from here on."""
    if dist.is_available() and not _watched:
        _watched.append(register_module_module_registration_hook(_wrapped))


_watched: list[Any] = []


def _wrapped(wrapper: nn.Module, name: str, module: Any) -> None:
    if isinstance(wrapper, DistributedDataParallel) and name == "module":
        adopt(wrapper, module)


def _in_wrapper(named: Replicas | None, found: Replicas) -> Replicas:
    """The replicas of a layer in a wrapper, for which some may be ``named``, or found in an earlier wrapper."""
    if named is None or named.is_copy:
        return found
    return replace(found, sync=named.sync, group=found.group if named.wrapper is not None else named.group)


@torch.no_grad()
def adopt(wrapper: Any, module: nn.Module) -> None:
    """Let the layers in a model that is being wrapped share their statistics, begin as those of the first process, and
    take their buffers out of what is broadcast before each forward pass.

    Raises:
        NotImplementedError, ValueError: for memories that cannot be merged.
    """
    layers: list[Any] = [layer for layer in module.modules() if is_shared(layer)]
    found = Replicas("update", wrapper.process_group, ref(wrapper))
    sharing = [_in_wrapper(layer.replicas, found) for layer in layers]
    for layer, replicas in zip(layers, sharing, strict=True):
        expect_shareable(layer, replicas)
    for layer, replicas in zip(layers, sharing, strict=True):
        layer.replicas = replicas
    kept = {name: part for name, part in module.named_modules() if isinstance(part, Buffers)}
    for name, part in kept.items() if layers else ():
        for buffer_name, buffer in part._buffers.items():
            if buffer is not None and buffer.numel():
                source = dist.get_global_rank(wrapper.process_group, 0)
                dist.broadcast(buffer, source, group=wrapper.process_group)
            wrapper.parameters_to_ignore.add(f"{name}.{buffer_name}" if name else buffer_name)
    for layer in layers:
        for memory in memories(layer):
            memory.merged = memory.counts.clone()
