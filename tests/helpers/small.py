"""A small network with streaming normalization, its data, and the plain loop that other libraries are held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from streamnorm import StreamingNorm

RATE = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 3))


def samples(n: int = 32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=made) + 1, torch.randint(3, (n,), generator=made)


def loader(n: int = 32, size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*samples(n)), batch_size=size)


def plain(batches: Iterable[tuple[Tensor, Tensor]], every: int = 1) -> nn.Sequential:
    """A network after a loop over mini-batches, with a weight update after ``every`` of them."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for i, (x, y) in enumerate(batches):
        (F.cross_entropy(model(x), y) / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def folds(model: nn.Module) -> set[int]:
    """How many weight updates the layers have heard of."""
    return {layer.follows.folds for layer in model.modules() if isinstance(layer, StreamingNorm)}


def expect_same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same operations in the same order: equal up to the rounding of a loss that is divided before or after."""
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)
