"""Decoupled accumulation and update (paper, section 2). Imports the layers.

Gradients accumulate over n mini-batches of m samples; the weights are updated once for all of them.

Legend: m samples per batch (S/B), n batches per update (B/U); one cycle is n mini-batches and one weight update.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.checks import expect_whole
from streamnorm.nn.norm import norms
from streamnorm.train.vectorized import vectorized
from streamnorm.train.warmup import Updates, Warmup, has_tiny_references


class DAU:
    """Decoupled accumulation and update: gradients over n mini-batches of m samples, then one update (section 2).

    The update uses the mean of the n mini-batch gradients; the gradients are cleared after it; n = 1 is conventional
    training. Clip gradients in an
    ``optimizer.register_step_pre_hook``: they are the mean by then. Step a scheduler after ``update``, or after
    ``accumulate`` when ``accumulated`` is 0. For a gradient scaler, write your own loop. To test with the
    weights that the statistics were taken with (section 3.3.1), test between ``cycle`` and ``step``.

    Args:
        model, optimizer: as in any loop.
        loss_fn: ``loss_fn(output, target)``, a mean over samples.
        samples_per_batch: m >= 1.
        batches_per_update: n >= 1.
        vectorize: run a whole cycle in one call, equal to the loop and faster, but with memory for m n samples. The
            loop (False) needs memory for m samples.
        warmup: first updates that gather statistics and leave the weights alone, for the paper's rule (``Warmup``).

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> dau = DAU(model, optimizer, nn.functional.cross_entropy, samples_per_batch=1, batches_per_update=16)
    >>> loss, output = dau.update(torch.randn(16, 4), torch.randint(3, (16,)))
    >>> output.shape
    torch.Size([16, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        samples_per_batch: int = 1,
        batches_per_update: int = 1,
        vectorize: bool = True,
        warmup: Updates = 0,
    ) -> None:
        for name, value in (("samples_per_batch", samples_per_batch), ("batches_per_update", batches_per_update)):
            expect_whole(name, value)
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.m = samples_per_batch
        self.n = batches_per_update
        self.vectorize = vectorize
        self.warmup = Warmup(model, optimizer, warmup)
        self.accumulated = 0
        self._is_mean = False  # gradients are already the mean: a vectorized cycle uses the mean loss

    def accumulate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Process one mini-batch ``x (m, ...)``; the n-th since the last update triggers the weight update.

        Returns:
            Its mean loss and the model's output, detached.

        Raises:
            ValueError: for a number of samples other than m.
        """
        if len(x) != self.m or len(y) != self.m:
            raise ValueError(f"a mini-batch is {self.m} samples, got {len(x)} inputs and {len(y)} targets")
        if self.accumulated == self.n:
            raise ValueError(f"all {self.n} mini-batches of this cycle are accumulated; call step() first")
        results = self._one(x, y)
        if self.accumulated == self.n:
            self.step()
        return results

    def _one(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(x)
        loss = self.loss_fn(output, y)
        loss.backward()
        self.accumulated += 1
        return loss.detach(), output.detach()

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One whole cycle ``x (n m, ...)`` in order of arrival, then the weight update: ``cycle`` and ``step``; see
        there."""
        results = self.cycle(x, y)
        self.step()
        return results

    def cycle(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One whole cycle ``x (n m, ...)`` in order of arrival, without the weight update.

        Returns:
            The mean loss of the cycle and the model's outputs ``(n m, ...)``, detached.

        Raises:
            ValueError: for another number of samples, or if the previous cycle has not had its ``step``.
        """
        if len(x) != self.m * self.n or len(y) != len(x):
            raise ValueError(
                f"a cycle is {self.n} mini-batches of {self.m} samples, {self.m * self.n} in all; "
                f"got {len(x)} inputs and {len(y)} targets; leave out an unfilled last cycle (drop_last=True)"
            )
        if self.accumulated:
            raise ValueError(
                f"{self.accumulated} of {self.n} mini-batches are accumulated; finish that cycle and its step first"
            )
        if not self.vectorize or self.n == 1:
            results = [self._one(a, b) for a, b in zip(x.split(self.m), y.split(self.m), strict=True)]
            return torch.stack([loss for loss, _ in results]).mean(), torch.cat([output for _, output in results])
        with vectorized(self.model, self.n, averaged=True):
            output = self.model(x)
        loss = self.loss_fn(output, y)
        loss.backward()
        self.accumulated, self._is_mean = self.n, True
        return loss.detach(), output.detach()

    @torch.no_grad()
    def warm_up(self, x: Tensor) -> None:
        """A cycle that only updates statistics: training-mode forward passes over ``x (n m, ...)`` and a fold, no
        weight update."""
        was_training = self.model.training
        self.model.train()
        try:
            if self.vectorize:
                with vectorized(self.model, self.n):
                    self.model(x)
            else:
                for part in x.split(self.m):
                    self.model(part)
        finally:
            self.model.train(was_training)
        for layer in norms(self.model):
            layer.fold()

    @torch.no_grad()
    def needs_warmup(self, x: Tensor) -> bool:
        """Whether mini-batches like ``x (m, ...)`` lead to tiny references; tried on a copy of the model."""
        copy = deepcopy(self.model).train()
        copy(x)
        return has_tiny_references(norms(copy))

    def step(self) -> None:
        """The weight update at the end of a ``cycle``, with the mean of its gradients.

        Raises:
            ValueError: in the middle of a cycle.
        """
        if self.accumulated != self.n:
            raise ValueError(
                f"{self.accumulated} of {self.n} mini-batches are accumulated; the weights are updated after {self.n}"
            )
        if not self._is_mean:
            take_mean(self.optimizer, self.n)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulated, self._is_mean = 0, False


def take_mean(optimizer: Optimizer, n: int) -> None:
    """Divide the gradients accumulated over n mini-batches by n, in place."""
    if n > 1:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(n)
