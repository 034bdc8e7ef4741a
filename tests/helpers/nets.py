"""Two small normalized networks, data for them, and a look at all that an update changes: what the tests of update
cycles stand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.nn.norm import Norm

CLASSES = 3
FEATURES = 6

MakeNorm = Callable[[int], nn.Module]


def streaming(c: int) -> Norm:
    return sn.StreamingNorm(c)


def connected(norm: MakeNorm) -> nn.Module:
    """Two normalized layers on inputs (n, 5)."""
    return nn.Sequential(
        nn.Linear(5, FEATURES, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, FEATURES, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, CLASSES),
    )


def convolutional(norm: MakeNorm) -> nn.Module:
    """Two normalized layers on inputs (n, 2, 4, 4)."""
    return nn.Sequential(
        nn.Conv2d(2, FEATURES, 3, padding=1, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Conv2d(FEATURES, FEATURES, 3, stride=2, padding=1, bias=False),
        norm(FEATURES),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * FEATURES, CLASSES),
    )


NETS: dict[str, tuple[Callable[[MakeNorm], nn.Module], tuple[int, ...]]] = {
    "FC": (connected, (5,)),
    "conv": (convolutional, (2, 4, 4)),
}


def net(kind: str, norm: MakeNorm = streaming, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[kind][0](norm).double()


def batch(kind: str, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + torch.randn(samples, *NETS[kind][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def paper(c: int) -> Norm:
    """The paper's rule, whose memories count weight updates, and which may need a warm-up."""
    return sn.StreamingNorm(c, alpha=(0.7, 0.3))


RULES = pytest.mark.parametrize("norm", [streaming, paper], ids=lambda f: f.__name__)
"""Both rules of a memory."""


def sgd(model: nn.Module, **changes: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **changes})


def dau(model: nn.Module, m: int, n: int, **changes: Any) -> sn.DAU:
    optimizer = changes.pop("optimizer", None) or sgd(model)
    loss = nn.functional.cross_entropy
    return sn.DAU(model, optimizer, loss, samples_per_batch=m, batches_per_update=n, **{"warmup": 0, **changes})


def everything(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and all that memories hold."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved(before: list[Tensor], model: nn.Module) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def memories(model: nn.Module) -> list[Norm]:
    return [m for m in model.modules() if isinstance(m, Norm) and m.policy.uses_estimate]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, m: int, steps: range) -> None:
    for step in steps:
        x, y = batch(kind, m, step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
