"""One weight update a row: by compiled steps where they serve a network, by an ordinary loop where not.

Imports the online trainer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.train.online.trainer import Loss, OnlineTrainer


class Stepper(Protocol):
    """What learns from one row after the other."""

    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from the rows ``x (n, d)`` in their order, with an update for each.

        Returns:
            The losses ``(n,)`` and the outputs ``(n, k)``, each from before its own update.
        """
        ...


class Loop:
    """Forward, backward and update, row by row."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss_fn: Loss) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn

    @torch.enable_grad()
    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Stepper.steps``."""
        losses, outputs = [], []
        for i in range(len(x)):
            self.optimizer.zero_grad()
            output = self.model(x[i : i + 1])
            loss = self.loss_fn(output, targets[i : i + 1])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            outputs.append(output.detach())
        self.optimizer.zero_grad()
        return torch.stack(losses), torch.cat(outputs)


def stepper(model: nn.Module, optimizer: Any, loss_fn: Loss) -> Stepper:
    """The fastest that there is for this model and optimizer."""
    try:
        return OnlineTrainer(model, optimizer, loss_fn)
    except (TypeError, ValueError):  # says what it cannot serve, before anything is changed
        return Loop(model, optimizer, loss_fn)
