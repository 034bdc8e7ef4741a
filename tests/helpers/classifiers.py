"""What a process does in the tests of classifiers that several train. In float64, so that rounding is small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import train
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import state_at
from streamnorm.lab.runs.processes import Share


class StoppedError(Exception):
    """Somebody stops a run."""


def digits() -> Data:
    data = load("digits", None, train_limit=64, test_limit=32)
    return replace(data, train_x=data.train_x.double(), test_x=data.test_x.double())


def trained(rank: int, size: int, run: Run, folder: Path, stop: int | None = None) -> list[dict[str, Any]]:
    """The metrics of a run, but for their seconds; with ``stop`` those before so many updates."""
    torch.set_default_dtype(torch.float64)
    lines: list[dict[str, Any]] = []

    def show(done: int, total: int) -> None:
        if done == stop:
            raise StoppedError

    try:
        train(run, digits(), folder, show, tell=lines.append, share=Share(rank, size))
    except StoppedError:
        pass
    finally:
        torch.set_default_dtype(torch.float32)
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def stopped_and_resumed(rank: int, size: int, run: Run, folder: Path, stop: int) -> list[dict[str, Any]]:
    """The metrics of a run that was stopped in an epoch after the first, then begun again."""
    before = trained(rank, size, run, folder, stop)
    assert before, "an epoch has closed"
    return trained(rank, size, run, folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has saved of its model."""
    return state_at(folder)["model"]
