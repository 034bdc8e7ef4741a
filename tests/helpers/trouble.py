"""What goes wrong where several processes train together, or looks as if it might; what each process has in the end."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import torch
from replicas import Shards, inputs, loss_of, network, optimizer_of, picture
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn

Buffers = dict[str, Tensor]


def buffers(model: nn.Module) -> Buffers:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, *arguments: Any) -> Tensor:
    """One weight update; the output."""
    optimizer.zero_grad()
    y = model(x, *arguments)
    loss_of(y).backward()
    optimizer.step()
    return y


class Gated(nn.Module):
    """A network whose last layer is not always called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = network(), sn.StreamingNorm(2).double()

    def forward(self, x: Tensor, is_whole: bool) -> Tensor:
        y = self.first(x)
        return self.last(y) if is_whole else y


def uncalled(rank: int, size: int, data: list[Shards]) -> Buffers:
    """The last layer is called in the first process alone."""
    model = Gated()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of(ddp)
    for shards in data:
        step(ddp, optimizer, shards[rank][0], rank == 0)
    return buffers(model)


def frozen(rank: int, size: int, data: list[Shards], where: tuple[int, ...]) -> list[Buffers]:
    """A layer is frozen, in the processes ``where``, after the first update."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    seen = []
    for update, shards in enumerate(data):
        step(ddp, optimizer, shards[rank][0])
        if update == 0 and rank in where:
            sn.freeze(model[1])
        seen.append(buffers(model))
    return seen


def busy(rank: int, size: int, data: list[Shards]) -> tuple[list[Any], list[str]]:
    """The first process has copies of its own, which it averages, trains and tests; what each update makes, and what
    it warns of."""
    model = network()
    DistributedDataParallel(model)  # an earlier wrapper, which is gone
    gc.collect()
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    teacher, trained = copy.deepcopy(model), copy.deepcopy(model)
    other = optimizer_of(trained)
    if rank == 0:
        sn.attach(teacher, optimizer)
    seen = []
    with warnings.catch_warnings(record=True, action="always") as caught:
        for shards in data:
            x = shards[rank][0]
            if rank == 0:
                teacher(x)
                step(trained, other, x)
                for one in (ddp, model, average):
                    one.eval()(x)
                    one.train()
            y = step(ddp, optimizer, x)
            average.update_parameters(model)
            seen.append(picture(model, [y]))
    return seen, [str(one.message) for one in caught if "eval mode" not in str(one.message)]


def quiet(rank: int, size: int, x: Tensor) -> int:
    """The number of warnings of a copy that was said to be alone."""
    model = network()
    DistributedDataParallel(model)
    alone = sn.synchronize(copy.deepcopy(model), None).model
    with warnings.catch_warnings(record=True, action="always") as caught:
        if rank == 0:
            step(alone, optimizer_of(alone), x)
    return len(caught)


def copied_wrapper(rank: int, size: int, data: list[Shards]) -> Buffers:
    """A copy of the wrapper goes on."""
    ddp = DistributedDataParallel(network())
    optimizer = optimizer_of(ddp)
    for shards in data:
        step(ddp, optimizer, shards[rank][0])
        ddp = copy.deepcopy(ddp)
        optimizer = optimizer_of(ddp)
    return buffers(ddp.module)


def compiled(rank: int, size: int, data: list[Shards]) -> list[Any]:
    """The wrapper is compiled."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer, called = optimizer_of(ddp), torch.compile(ddp, backend="eager")
    return [picture(model, [step(called, optimizer, shards[rank][0])]) for shards in data]


def apart(rank: int, size: int, data: list[Shards]) -> list[Any]:
    """Each process has statistics of its own."""
    model = network()
    sn.synchronize(model, None)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    return [picture(model, [step(ddp, optimizer, shards[rank][0])]) for shards in data]


def scaled(rank: int, size: int, data: list[Shards]) -> Buffers:
    """A scaler says to a fused optimizer that the second step overflowed, in the first process alone."""
    model = network().float()
    ddp = DistributedDataParallel(model)
    optimizer: Any = torch.optim.SGD(ddp.parameters(), lr=0.05, fused=True)
    optimizer.grad_scale = torch.tensor(1.0)
    for update, shards in enumerate(data):
        optimizer.found_inf = torch.tensor(float(update == 1 and rank == 0))
        step(ddp, optimizer, shards[rank][0].float())
    return buffers(model)


def left_out(rank: int, size: int, data: list[Shards]) -> str:
    """The first process makes no step where the other makes one, and ends; what the other is told."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    for update, shards in enumerate(data):
        loss_of(ddp(shards[rank][0])).backward()
        if rank == 0 and update == len(data) - 1:
            break
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        optimizer.zero_grad()
    return ""


def without_parameters(rank: int, size: int) -> Buffers:
    """Layers without gain in a process that has no data at first, beside an optimizer of something else."""
    model = network("no gain")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    else_ = nn.Parameter(torch.ones(1))
    other = torch.optim.SGD([else_], 0.1)
    for update, shards in enumerate(inputs(size, 3)):
        step(ddp, optimizer, shards[rank][0][: 0 if rank == update == 0 else None])
        else_.sum().backward()
        other.step()
    return buffers(model)
