"""Whole networks: compiled ones, the residual one, and the memory of a step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from streamnorm import StreamingNorm
from streamnorm.lab.bench import compiled, device, layers, resnet
from streamnorm.lab.bench.case import WrongError


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that only trace, one layer a network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled, "DEPTH", 1)
    torch._dynamo.reset()


@pytest.mark.usefixtures("quickly")
def test_peers_are_compiled_too() -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    for make in (nn.BatchNorm2d, lambda c: nn.Sequential(nn.BatchNorm2d(c))):
        graphs.clear()
        layers.whole(make(3))(torch.randn(2, 3, 4, 4))
        assert graphs["unique_graphs"] == 1


class OffCompiled(StreamingNorm):
    """Wrong where a compiler sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * torch.compiler.is_compiling())


@pytest.mark.usefixtures("quickly")
def test_a_compiled_network_that_is_not_the_plain_one_is_refused() -> None:
    network = compiled.Network(nn.Tanh, "contiguous", 1, 4)
    network.check(StreamingNorm, "cpu")
    with pytest.raises(WrongError, match=r"update 0 in torch\.float32, y: off by"):
        network.check(OffCompiled, "cpu")


def test_the_residual_network_has_the_shape_of_resnet18() -> None:
    with torch.device("meta"):
        model = resnet.resnet(nn.BatchNorm2d, 1000)
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
        assert model[:-3](torch.empty(8, 3, 64, 64)).shape == (8, 512, 2, 2)
        assert model(torch.empty(8, 3, 64, 64)).shape == (8, 1000)


@pytest.mark.filterwarnings("ignore")
def test_peak_memory_is_counted_to_the_byte() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        both = torch.empty(1 << 19), torch.empty(1 << 18)
        kept.clear()  # what the step before has left
        kept.append(both[0])

    step()
    kept.clear()
    assert device.peak(step, "cpu") == (2 + 2 + 1) << 20


def test_a_step_of_ours_holds_hardly_more_than_batch_normalization() -> None:
    """Beside the maps, statistics of each layer, which these small maps do not make negligible."""
    training = resnet.Training("cpu", 2, 16, 4, (4, 8), 1)
    ours, peer = (training.peak(norm, False) for norm in (StreamingNorm, nn.BatchNorm2d))
    assert peer < ours * 1.05
    assert ours < peer * 1.05
