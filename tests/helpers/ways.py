"""Ways to train in several processes: wrappers, optimizers, warm-up, processes without data."""

from __future__ import annotations

from typing import Any

import torch
from replicas import Shards, loss_of, network, optimizer_of, picture
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn
from streamnorm.nn.norm import Norm


def joined(rank: int, size: int, kind: str, data: list[Shards]) -> list[Any]:
    """Process r has data for the first len(data) - r updates alone."""
    model = network(kind)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    seen = []
    with Join([ddp, sn.synchronize(ddp)], divide_by_initial_world_size=False):
        for shards in data[: len(data) - rank]:
            y = ddp(shards[rank][0])
            loss_of(y).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(picture(model, [y]))
    return [*seen, picture(model, [])]


def joined_alone(rank: int, size: int) -> str:
    """The error of a ``Join`` that does not name the statistics; the others wait, so nobody has data twice."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with Join([ddp]):
        y = ddp(torch.ones(3, 3, 2, dtype=torch.float64))
        before = {n: b.clone() for n, b in model.named_buffers()}
        loss_of(y).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert all(torch.equal(before[n], b) for n, b in model.named_buffers() if ".H1." in n)
            return str(error)
    return ""


def partitioned(rank: int, size: int, kind: str, data: list[Shards]) -> list[Any]:
    """An optimizer that holds a part of the parameters in each process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    model = network(kind)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.05)
    seen = []
    for shards in data:
        y = ddp(shards[rank][0])
        loss_of(y).backward()
        optimizer.step()
        seen.append(picture(model, [y]))
        optimizer.zero_grad()
    return seen


def sharded(rank: int, size: int, kind: str, data: list[Shards]) -> list[Any]:
    """``trained`` under ``fully_shard``."""
    model = network(kind)
    for part in list(model):
        if next(part.parameters(), None) is not None:
            fully_shard(part)
    fully_shard(model)
    optimizer = optimizer_of(model)
    seen = []
    for shards in data:
        y = model(shards[rank][0])
        loss_of(y).backward()
        optimizer.step()
        whole = {n: p.full_tensor() for n, p in model.named_parameters()}
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        seen.append({"outputs": [y.detach()], "gradients": gradients, "weights": whole, "buffers": buffers})
        optimizer.zero_grad()
    return seen


def sharded_in_bfloat16(rank: int, size: int, data: list[Shards]) -> dict[str, Any]:
    """Mixed precision: the types of what is remembered, and the memories after each update."""
    model = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    optimizer = optimizer_of(model)
    for shards in data:
        y = model(shards[rank][0].float())
        loss_of(y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"output": y.dtype, "buffers": {n: b.clone() for n, b in model.named_buffers()}}


def accumulated(rank: int, size: int, data: Tensor) -> list[dict[str, Tensor]]:
    """A layer of the paper's rule in Setting A on its part of ``data (updates, size, n, c)``."""
    layer = accumulating()
    ddp = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.0)
    seen = []
    for cycle in data:
        ddp(cycle[rank]).sum().backward()
        optimizer.step()
        seen.append({n: v.clone() for n, v in layer.H1.members().items() if n != "estimate"})
    return seen


def accumulating() -> Norm:
    return sn.StreamingNorm(3, center="batch", alpha=(0.6, 0.4)).double()


def warmed(rank: int, size: int) -> tuple[list[Tensor], int]:
    """One process has tiny references, one has no data in the first update; which weights each step moves."""
    model = network("paper")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    warmup = sn.Warmup(ddp, optimizer)
    seen = []
    for update in range(6):
        n = (0 if update == 0 else 3, 1)[rank]
        loss_of(ddp(torch.ones(n, 3, 1, dtype=torch.float64) * (update + rank + 1))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(model[0].weight.detach().clone())
    return seen, warmup.updates


def shapes_from_the_first_input(rank: int, size: int) -> dict[str, Tensor]:
    """A layer that keeps statistics of every place; the first process has no data until the second update."""
    model = network("every place")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    for n in ((0, 2), (3, 2)):
        loss_of(ddp(torch.randn(n[rank], 3, 2, dtype=torch.float64))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return picture(model, [])["buffers"]


def maps_of_two_sizes(rank: int, size: int) -> str:
    model = network("every place")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    loss_of(ddp(torch.randn(2, 3, 2 + rank, dtype=torch.float64))).backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def alike(rank: int, size: int, data: list[Shards]) -> list[dict[str, Any]]:
    """Buffers right after a forward pass of each call in one update, before which DDP broadcasts what it may."""
    model = nn.Sequential(network(), nn.BatchNorm1d(2)).double()
    ddp = DistributedDataParallel(model)
    seen = []
    for x in data[0][rank]:
        loss_of(ddp(x)).backward()
        seen.append({n: b.clone() for n, b in model.named_buffers()})
    return seen
