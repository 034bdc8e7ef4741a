"""Accelerate: a prepared model and optimizer in its loop, with accumulation, and its saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import RATE, expect_same, folds, loader, network, plain

accelerate: Any = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(every: int = 1) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every)
    model = network()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader())


def train(accelerator: Any, model: Any, optimizer: Any, batches: Any) -> None:
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("every", [1, 2])
def test_its_loop_is_a_loop(every: int) -> None:
    accelerator, model, optimizer, batches = prepared(every)
    train(accelerator, model, optimizer, batches)
    expect_same(accelerator.unwrap_model(model).state_dict(), plain(loader(), every).state_dict())
    assert folds(model) == {8 // every}


def test_its_saved_state_goes_on(tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepared()
    train(accelerator, model, optimizer, batches)
    accelerator.save_state(str(tmp_path))
    accelerator, model, optimizer, batches = prepared()
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, batches)
    expect_same(accelerator.unwrap_model(model).state_dict(), plain([*loader(), *loader()]).state_dict())
