"""ema-pytorch and timm's averages: a teacher's statistics follow the student's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import RATE, folds, loader, network
from torch import nn

from streamnorm import StreamingNorm

pytestmark = pytest.mark.filterwarnings("ignore")


def train(model: nn.Module, update: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        update()
    assert folds(model) == {8}


def expect_average(teacher: nn.Module, student: nn.Module) -> None:
    """A teacher that averages with weight 0 is its student, in eval mode too."""
    for name, value in student.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 4) * 3
    torch.testing.assert_close(teacher.eval()(x), student.eval()(x), rtol=1e-5, atol=1e-5)


def test_ema_pytorch() -> None:
    ema_pytorch: Any = pytest.importorskip("ema_pytorch")
    student = network()
    ema = ema_pytorch.EMA(student, beta=0.5, update_every=1, update_after_step=0)
    train(student, ema.update)
    sigma = ema.ema_model[1].H1.estimate[1]
    assert (sigma / student[1].H1.estimate[1] - 1).abs().max() < 0.5  # an average of estimates of 8 updates
    copied = ema_pytorch.EMA(student, beta=0.0, update_every=1, update_after_step=0, include_online_model=False)
    copied.update()
    copied.copy_params_from_model_to_ema()
    expect_average(copied.ema_model, student)


def test_timm() -> None:
    timm_utils: Any = pytest.importorskip("timm.utils")
    student = network()
    ema = timm_utils.ModelEmaV3(student, decay=0.0)
    train(student, lambda: ema.update(student))
    expect_average(ema.module, student)


def test_torch() -> None:
    from torch.optim.swa_utils import AveragedModel

    student = network()
    ema = AveragedModel(
        student,
        multi_avg_fn=lambda mine, theirs, n: [m.copy_(t) for m, t in zip(mine, theirs, strict=True)],
        use_buffers=True,
    )
    train(student, lambda: ema.update_parameters(student))
    expect_average(ema.module, student)


def test_a_network_of_timm_learns_with_our_layers() -> None:
    timm: Any = pytest.importorskip("timm")
    from streamnorm import convert

    torch.manual_seed(0)
    model = convert(timm.create_model("resnet10t", num_classes=3), to=StreamingNorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert folds(model) == {6}
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
