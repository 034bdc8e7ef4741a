"""Models in several threads: one that is evaluated in all of them, one that is trained in each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from close import same
from torch import nn

import streamnorm as sn
from streamnorm.ops import backends


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16, bias=False), sn.StreamingNorm(16), nn.ReLU(), nn.Linear(16, 3))


def samples(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=made) + seed, torch.randint(3, (n,), generator=made)


def trained(model: nn.Sequential, seed: int, how: str) -> dict[str, torch.Tensor]:
    """The state of a model after 60 updates, by compiled steps or by a loop on a backend."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = samples(seed, 60)
    if how == "online":
        sn.OnlineTrainer(model, optimizer).steps(x, y)
        return model.state_dict()
    sn.attach(model, optimizer)
    with backends.using(how):
        for one, label in zip(x.split(1), y.split(1), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(one), label).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("how", ["cpu", "eager", "online"])
def test_models_trained_in_threads_are_those_trained_one_after_another(how: str) -> None:
    alone = [trained(network(seed), seed, how) for seed in range(4)]
    networks = [network(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(trained, networks, range(4), [how] * 4))
    assert all(same(dict(a), dict(b)) for a, b in zip(alone, together, strict=True))


def test_a_model_is_evaluated_in_many_threads_at_once() -> None:
    model = network(0)
    sn.OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.05)).steps(*samples(0, 60))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = [samples(seed, 1 + seed % 5)[0] for seed in range(200)]
    with torch.no_grad():
        want = [model(x) for x in inputs]

    def outputs(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(outputs, inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert same(dict(model.state_dict()), before)
