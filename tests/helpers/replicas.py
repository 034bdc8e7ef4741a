"""What each of several processes does in the tests of synchronized statistics, and the same in one process.

Everything is in float64: what differs then by more than rounding differs by design.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn
from streamnorm.nn.norm import Norm, norms
from streamnorm.stream.policy import OnlineNormalization

Shards = Sequence[Sequence[Tensor]]
"""For each process the inputs of its calls in one weight update."""

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "samples": sn.StreamingNorm,
    "paper": lambda c: sn.StreamingNorm(c, alpha=(0.7, 0.3), beta=(0.6, 0.3, 0.1)),
    "setting A": lambda c: sn.StreamingNorm(c, center="batch"),
    "batch": sn.BatchNorm,
    "renorm": lambda c: sn.BatchRenorm(c, begin=1, r_end=3, d_end=3),
    "online": lambda c: Norm(c, sn.BA1, sn.Lp(2, "estimate"), OnlineNormalization(), affine=True),
    "p = 1": lambda c: sn.StreamingNorm(c, p=1),
    "p = 3, setting A": lambda c: sn.StreamingNorm(c, p=3, center="batch"),
    "p = 1, setting C": lambda c: sn.StreamingNorm(c, p=1, center="zero"),
    "every place": lambda c: sn.StreamingNorm(c, ref=sn.BA6),
    "groups": lambda c: sn.StreamingNorm(c, ref=sn.BA2),
    "no gain": lambda c: sn.StreamingNorm(c, affine=False),
}


def network(kind: str = "samples") -> nn.Module:
    """Two normalized layers on inputs (n, 3, x)."""
    torch.manual_seed(3)
    make = LAYERS[kind]
    layers = [nn.Conv1d(3, 4, 1, bias=False), make(4), nn.Tanh(), nn.Conv1d(4, 5, 1, bias=False), make(5), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv1d(5, 2, 1)).double()


def inputs(size: int, updates: int, calls: int = 1, samples: Sequence[int] = (3,), seed: int = 0) -> list[Shards]:
    """For each update the shards; process r has ``samples[r % len]`` samples a call."""
    made = torch.Generator().manual_seed(seed)
    return [
        [
            [
                torch.randn(samples[r % len(samples)], 3, 2, generator=made, dtype=torch.float64) * (1 + r) + r
                for _ in range(calls)
            ]
            for r in range(size)
        ]
        for _ in range(updates)
    ]


def loss_of(y: Tensor) -> Tensor:
    return (y.square() + y).flatten(1).mean(1).sum() / max(1, len(y))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def picture(model: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Any]:
    """Everything that an update is about."""
    return {
        "outputs": [y.detach().clone() for y in outputs],
        "gradients": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "state": {n: v.clone() for n, v in model.state_dict().items()},
    }


def trained(
    rank: int,
    size: int,
    kind: str,
    data: list[Shards],
    how: str = "",
    options: dict[str, Any] | None = None,
    start: Any = None,
) -> list[Any]:
    """A process under DistributedDataParallel; what it sees at each update."""
    model = network(kind)
    if start is not None:
        model.load_state_dict(start)
    if rank:  # the wrapper has to make them one
        for parameter in model.parameters():
            parameter.data += 1
    ddp = DistributedDataParallel(model, **(options or {}))
    optimizer = optimizer_of(ddp)
    seen = []
    for shards in data:
        outputs = []
        mine = shards[rank]
        if how == "two forwards":
            outputs = [ddp(x) for x in mine]
            sum(map(loss_of, outputs)).backward()  # type: ignore[union-attr]
        else:
            for call, x in enumerate(mine):
                quiet = how == "no_sync" and call + 1 < len(mine)
                with ddp.no_sync() if quiet else torch.enable_grad():
                    y = ddp(x)
                    loss_of(y).backward()
                outputs.append(y)
        optimizer.step()
        seen.append(picture(model, outputs))
        optimizer.zero_grad()
    return seen


def together(
    size: int, kind: str, data: list[Shards], how: str = "", start: Any = None, merges: bool = True
) -> list[list[Any]]:
    """The same in one process: a copy of the model for each, whose gradients and memories are merged by hand."""
    first = network(kind)
    if start is not None:
        first.load_state_dict(start)
    models = [first, *(copy.deepcopy(first) for _ in range(size - 1))]
    optimizers = [optimizer_of(model) for model in models]
    seen = []
    for shards in data:
        before = [merged_members(layer) for layer in norms(first)]
        made: list[list[Tensor]] = []
        for model, mine in zip(models, shards, strict=True):
            outputs = []
            if how == "two forwards":
                outputs = [model(x) for x in mine]
                sum(map(loss_of, outputs)).backward()  # type: ignore[union-attr]
            else:
                for x in mine:
                    y = model(x)
                    loss_of(y).backward()
                    outputs.append(y)
            made.append(outputs)
        for same in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in same) / size
            for p in same:
                p.grad = mean.clone()
        for start, *layers in zip(before, *(norms(model) for model in models), strict=True):
            if merges:
                merge_by_hand(start, layers)
        for optimizer in optimizers:
            optimizer.step()
        seen.append([picture(model, outputs) for model, outputs in zip(models, made, strict=True)])
        for optimizer in optimizers:
            optimizer.zero_grad()
    return seen


def merged_members(layer: Norm) -> list[dict[str, Tensor]]:
    return [{n: v.clone() for n, v in m.members().items()} for m in (layer.H1, layer.H2) if m is not None]


WEIGHTS = {
    "Pooled": "count",
    "LongShort": "count",
    "Residual": "held",
    "Exponential": "count",
    "Renorm": "count",
}
"""The counter of what a memory has seen; the others count arrivals."""


def merge_by_hand(before: list[dict[str, Tensor]], layers: Sequence[Norm]) -> None:
    """Every table becomes the mean over the processes, weighted by what each has seen; counters add up."""
    for place, start in enumerate(before):
        of = [[m for m in (layer.H1, layer.H2) if m is not None][place] for layer in layers]
        rule = of[0].rule
        counter = WEIGHTS.get(type(rule).__name__, "seen")
        members = [{n: v.clone() for n, v in m.members().items()} for m in of]
        seen = [int(member[counter] - start[counter]) for member in members]
        if not sum(seen):
            continue
        new: dict[str, Tensor] = {}
        for name, was in start.items():
            if was.ndim:
                new[name] = sum(n * member[name] for n, member in zip(seen, members, strict=True)) / sum(seen)
            else:
                new[name] = was + sum(member[name] - was for member in members)
        if isinstance(rule, sn.Pooled):
            if not int(new["held"]):  # the prior of sigma is that of all processes
                mu, sigma = new["short"]
                wide = ((mu - mu.mean()).square() + sigma.square()).mean().sqrt()
                new["long"] = torch.stack([mu, wide.expand_as(sigma)])
            n, held = new["count"], new["held"]
            M = torch.stack([held.double(), torch.maximum((held + rule.prior).clamp_max(rule.memory), held.double())])
            M = M.reshape(2, *[1] * (new["short"].ndim - 1))
            new["estimate"] = (M * new["long"] + n * new["short"]) / (M + n)
        elif isinstance(rule, sn.LongShort):
            long = new["long"] if int(new["updates"]) else new["short"]
            new["estimate"] = rule.mix[0] * long + (rule.mix[1] + rule.mix[2]) * new["short"]
        elif type(rule).__name__ in ("Exponential", "Renorm"):
            new["estimate"] = new["long"]
        elif type(rule).__name__ == "Lagging":
            mu, var = new["moments"]
            new["estimate"] = torch.stack([mu, var.sqrt()])
        for memory in of:
            for name, value in new.items():
                setattr(memory, name, value)
