"""One weight update a sample: by compiled steps where they serve a network, by an ordinary loop where not.

Imports the online trainer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.train.online.trainer import Loss, OnlineTrainer


class Stepper(Protocol):
    """What learns from one sample after the other.

    Attributes:
        skipped: number of samples that were not finite; they change nothing.
    """

    skipped: int

    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from the samples ``x (n, d)`` in their order, with an update for each.

        Returns:
            The losses ``(n,)`` and the outputs ``(n, k)``, each from before its own update; NaN for what was skipped.
        """
        ...


class Loop:
    """Forward, backward and update, sample by sample. One whose input, target, loss or gradient is not finite is
    skipped: weights, optimizer and buffers stay as they were."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss_fn: Loss) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.skipped = 0

    @torch.enable_grad()
    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Stepper.steps``."""
        losses, outputs = [], []
        for one, target in zip(x.split(1), targets.split(1), strict=True):
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            self.optimizer.zero_grad()
            output = self.model(one)
            loss = self.loss_fn(output, target)
            loss.backward()
            if _is_finite(loss, one, target) and all(map(_is_finite, self._gradients())):
                self.optimizer.step()
            else:
                self.skipped += 1
                loss, output = loss * torch.nan, output * torch.nan
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)
            losses.append(loss.detach())
            outputs.append(output.detach())
        self.optimizer.zero_grad()
        return torch.stack(losses), torch.cat(outputs)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def _is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def stepper(model: nn.Module, optimizer: Any, loss_fn: Loss) -> Stepper:
    """The fastest that there is for this model and optimizer."""
    try:
        return OnlineTrainer(model, optimizer, loss_fn)
    except (TypeError, ValueError):  # says what it cannot serve, before anything is changed
        return Loop(model, optimizer, loss_fn)
