"""Transformers: its trainer is the plain loop and resumes, and its ResNet takes our layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import RATE, expect_same, folds, loader, network, plain, samples
from torch import Tensor, nn

from streamnorm import StreamingNorm, convert

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        said = self.network(x)
        return {"loss": F.cross_entropy(said, labels), "logits": said}


def trained(folder: Path, epochs: int, every: int = 1, resume: bool = False) -> Model:
    model = Model()
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=every, num_train_epochs=epochs,
        use_cpu=True, report_to=[], save_strategy="epoch", disable_tqdm=True, max_grad_norm=0.0,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", learning_rate=RATE,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(*samples(), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("every", [1, 2])
def test_its_trainer_is_a_loop(every: int, tmp_path: Path) -> None:
    model = trained(tmp_path, 2, every)
    expect_same(model.network.state_dict(), plain([*loader(), *loader()], every).state_dict())
    assert folds(model) == {16 // every}


def test_it_resumes_exactly(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    model = trained(tmp_path, 2, resume=True)
    expect_same(model.network.state_dict(), plain([*loader(), *loader()]).state_dict())


def test_its_resnet_learns_with_our_layers() -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = convert(transformers.ResNetForImageClassification(config), to=StreamingNorm)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    losses = []
    for _ in range(10):
        loss = model(x, labels=y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert folds(model) == {10}
