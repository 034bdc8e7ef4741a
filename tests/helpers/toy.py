"""A made-up data set of small images, a small run on it and its steps: what the tests of training stand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run


def toy(train: int = 52, test: int = 20, place: int = 4) -> Data:
    """Three classes, each a random image with noise over it; 52 do not divide into cycles of 12."""
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(3, 1, place, place, generator=generator)
    y = torch.randint(3, (train + test,), generator=generator)
    x = means[y] + torch.randn(train + test, 1, place, place, generator=generator)
    return Data("toy", x[:train], y[:train], x[train:], y[train:], 3, "made by tests/helpers/toy.py")


def small(**changes: Any) -> Run:
    """Two epochs of four updates of 3 S/B x 4 B/U on the toy data, with momentum; ``changes`` on top."""
    defaults: dict[str, Any] = {
        "data": "toy",
        "width": 8,
        "samples_per_batch": 3,
        "batches_per_update": 4,
        "epochs": 2,
        "learning_rate": 0.05,
    }
    return Run(**{**defaults, **changes})


def steps(trainer: Trainer, count: int) -> Trainer:
    for _ in range(count):
        assert not trainer.finished
        trainer.step()
    return trainer


def to_the_end(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def flat(model: nn.Module) -> Tensor:
    """The weights and all that the memories hold, end to end."""
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])
