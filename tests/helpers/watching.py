"""A small network, how it is trained, and a look at its hooks: what the tests of the monitor stand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm import StreamingNorm
from streamnorm.monitoring.monitor import monitor


def net(norm: Callable[[int], nn.Module] = StreamingNorm) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8, bias=False), norm(8), nn.Sigmoid(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, batches: int = 2, first: int = 0) -> Tensor:
    """The losses of so many updates, of mini-batches that depend on the number of the update alone."""
    losses = []
    for update in range(first, first + updates):
        generator = torch.Generator().manual_seed(update)
        for _ in range(batches):
            loss = model(torch.randn(16, 5, generator=generator)).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def watch_one(module: nn.Module, *inputs: Tensor, **options: Any) -> dict[str, Any]:
    """What is recorded of a module that is called with these."""
    with monitor(nn.Sequential(module), watch=module, every=1, **options) as watching:
        for x in inputs:
            module(x)
        watching.step()
    return watching.records[0]["preactivations"]["0"]
