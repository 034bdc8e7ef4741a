"""``synchronize``: which processes share the statistics of a model, and when they merge them. Imports the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from streamnorm.nn.norm import Norm, norms
from streamnorm.nn.replicas import Replicas, Sync, expect_shareable, joining, merge, settled


class Synchronized(Joinable):
    """What ``synchronize`` returns: beside a ``DistributedDataParallel`` in ``Join([model, synchronized])`` it lets
    processes that have run out of data take part in merging."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for layer in norms(model):
            found = None if layer.replicas is None or layer.replicas.wrapper is None else layer.replicas.wrapper()
            if found is not None:
                joining[found] = self

    @property
    def layers(self) -> list[Norm]:
        """The layers that are merged at each weight update."""
        return [layer for layer in norms(self.model) if layer.replicas is not None and layer.replicas.merges]

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def join_process_group(self) -> Any:
        layer = next(norms(self.model), None)
        group = None if layer is None or layer.replicas is None else layer.replicas.group
        return dist.group.WORLD if group is None else group


class _Shadow(JoinHook):
    """What a process without data does while others go on."""

    def __init__(self, of: Synchronized) -> None:
        self.of = of

    def main_hook(self) -> None:
        for layer, happened in merge(self.of.layers):
            layer.fold_alone(happened)


def synchronize(model: nn.Module, sync: Sync = "update", group: Any = None) -> Synchronized:
    """Say when the processes that train ``model`` together share its statistics, and which processes these are.

    Under ``DistributedDataParallel`` and ``fully_shard`` it is found by itself: ``"update"``. Call it for other ways to
    train together, such as gradients that are summed by hand, before the wrapper if there is one::

        "update"    each process normalizes with the memory of all up to the latest weight update, and with its own
                    arrivals since; at the update what all have seen is merged, in one collective for all layers
        "batch"     statistics and their gradients are those of the batches of all processes together, three
                    collectives a layer
        None        each process for itself

    What is merged are means weighted by samples (by arrivals for the paper's rule), so batches may be of different
    sizes, and a process may have none. What a layer has seen before is taken to be the same in all.

    Args:
        model: contains the layers, the same in all processes.
        sync: when.
        group: the process group of ``torch.distributed``; None: all processes.

    Returns:
        For ``torch.distributed.algorithms.Join``, beside the wrapped model; otherwise leave it.

    Raises:
        ValueError: for another sync, a model without such layers, and layers that cannot be merged.
        NotImplementedError: for a rule of one's own without ``collects``.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), StreamingNorm(3))
    >>> handle = synchronize(model, "update")
    >>> model[1].replicas.sync, model[1].replicas.size
    ('update', 1)
    """
    layers = list(norms(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of streamnorm whose statistics could be shared")
    replicas = Replicas(sync, group)
    for layer in layers:
        expect_shareable(layer, replicas)
    for layer in layers:
        found = layer.replicas
        is_known = found is not None and not found.is_copy and group is None
        layer.replicas = replace(found, sync=sync) if found is not None and is_known else replicas
        if found is None or found.sync != "update":
            settled(layer)
    return Synchronized(model)
