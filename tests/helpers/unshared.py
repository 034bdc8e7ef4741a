"""What several processes cannot share, and copies, which share with nobody."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.distributed as dist
from replicas import Shards, loss_of, network, optimizer_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn
from streamnorm.nn.norm import Norm


class Largest(sn.Rule):
    """A rule that does not say how processes merge."""

    def empty(self, shape: Any) -> Any:
        return {"long": torch.zeros(*shape)}

    def step(self, state: Any, s: Tensor) -> Any:
        long = torch.maximum(state["long"], s)
        return {"long": long}, long


class Largests(sn.Policy):
    F, uses_estimate = Largest(), True


def refused(rank: int, size: int) -> list[str]:
    """What cannot be shared; what cannot be merged is trained alone."""
    said = []
    model = nn.Sequential(nn.Linear(3, 3), Norm(3, sn.BA1, sn.Lp(2), Largests()))
    for make in (
        lambda: DistributedDataParallel(model),
        lambda: sn.synchronize(nn.Sequential(sn.StreamingNorm(3, ref=sn.SP2)), "batch"),
        lambda: sn.synchronize(nn.Sequential(sn.StreamingNorm(3, ref=sn.BA3)), "batch"),
        lambda: DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), sn.TimeSpecific(sn.BatchNorm)(3))),
    ):
        try:
            make()
        except (ValueError, NotImplementedError) as error:
            said.append(f"{type(error).__name__}: {error}")
    sn.synchronize(model, None)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    ddp(torch.ones(2, 3) * (rank + 1)).sum().backward()
    optimizer.step()
    shared = nn.Sequential(sn.StreamingNorm(3))
    sn.synchronize(shared, "batch")
    x = torch.randn(4, 3)
    for make in (
        lambda: shared[0](x, mask=torch.ones(4, dtype=torch.bool)),
        lambda: torch.compile(shared, backend="eager", fullgraph=True)(x),
    ):
        try:
            make()
        except Exception as error:  # a compiler wraps ours
            said.append(f"{type(error).__name__}: {error}")
    return said


def copied(rank: int, size: int, data: list[Shards]) -> list[bool]:
    """A copy, a pickled one and the model alone: do they still learn, and do the processes agree?"""
    model = network()
    ddp = DistributedDataParallel(model)
    loss_of(ddp(data[0][rank][0])).backward()
    optimizer_of(ddp).step()
    twin, told = copy.deepcopy(model), copy.deepcopy(model)
    sn.synchronize(told)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    agree = []
    for one in (twin, loaded, told):
        one.zero_grad()
        optimizer = torch.optim.SGD(one.parameters(), 0.0)
        loss_of(one(data[1][rank][0])).backward()
        optimizer.step()
        mine = one[1].H1.estimate.clone()
        mean = mine.clone()
        dist.all_reduce(mean)
        agree.append(torch.equal(mine * size, mean))
    return agree
