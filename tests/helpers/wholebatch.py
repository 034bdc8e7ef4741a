"""Several processes whose statistics are those of all their batches together, and one process with these batches."""

from __future__ import annotations

from typing import Any

import torch
from replicas import Shards, network, optimizer_of, picture
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn


def in_batches(rank: int, size: int, kind: str, data: list[Shards]) -> list[Any]:
    """A process whose statistics are those of the batches of all."""
    model = network(kind)
    sn.synchronize(model, "batch")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    seen = []
    for shards in data:
        outputs, inputs_ = [], []
        for call in range(len(shards[rank])):
            x = shards[rank][call].clone().requires_grad_()
            everyone = sum(len(shard[call]) for shard in shards)
            y = ddp(x)
            (total_of(y) * size / everyone).backward()
            outputs.append(y)
            inputs_.append(x.grad / size)
        optimizer.step()
        seen.append({**picture(model, outputs), "inputs": inputs_})
        optimizer.zero_grad()
    return seen


def whole(kind: str, data: list[Shards]) -> list[Any]:
    """One process with the batches of all."""
    model = network(kind)
    optimizer = optimizer_of(model)
    seen = []
    for shards in data:
        outputs, inputs_ = [], []
        for batch in zip(*shards, strict=True):
            x = torch.cat(list(batch)).requires_grad_()
            y = model(x)
            (total_of(y) / len(x)).backward()
            sizes = [len(part) for part in batch]
            outputs.append(y.split(sizes))
            inputs_.append(x.grad.split(sizes))
        optimizer.step()
        seen.append({**picture(model, []), "outputs": outputs, "inputs": inputs_})
        optimizer.zero_grad()
    return seen


def total_of(y: Tensor) -> Tensor:
    return (y.square() + y).flatten(1).mean(1).sum()
