"""A run in several processes, as torchrun starts them: what the share of each is, and what they tell each other.

Each process computes its share of every mini-batch with the statistics of all, and the gradients are averaged. So the
run is that of one process, to rounding, and may go on with another number of them. The first alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamnorm.nn.norm import norms
from streamnorm.train.synchronize import synchronize


@dataclass(frozen=True)
class Share:
    """The part of a process in a run.

    Attributes:
        rank, size: of so many processes this is which.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def samples(self, m: int) -> int:
        """How many of the m samples of a mini-batch are this process's.

        Raises:
            ValueError: if they cannot be shared evenly.
        """
        if m % self.size:
            raise ValueError(
                f"{self.size} processes share each mini-batch, so --samples-per-batch is a multiple of {self.size}, "
                f"got {m}"
            )
        return m // self.size

    def of(self, index: Tensor, m: int) -> Tensor:
        """This process's part of a cycle of mini-batches of m samples.

        >>> Share(1, 2).of(torch.arange(8), 4)
        tensor([2, 3, 6, 7])
        """
        mine = self.samples(m)
        return index.reshape(-1, m)[:, self.rank * mine : (self.rank + 1) * mine].flatten()

    def synchronize(self, model: nn.Module) -> None:
        """Take the statistics of every mini-batch from all processes.

        Raises:
            ValueError: for a layer that cannot.
        """
        if self.size > 1 and any(norms(model)):
            synchronize(model, "batch")

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their means over all processes, in one collective."""
        gradients = [p.grad for p in parameters if p.grad is not None] if self.size > 1 else []
        if not gradients:
            return
        total = torch.cat([gradient.flatten() for gradient in gradients]) / self.size
        dist.all_reduce(total)
        for gradient, mean in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.reshape(gradient.shape))

    def begin_alike(self, trainer: Any) -> None:
        """Bring a trainer to where the first process has it.

        Raises:
            ValueError: if the first process has ended.
        """
        if self.size == 1:
            return
        told = [trainer.state() if self.is_first else None]
        with _waiting():
            dist.broadcast_object_list(told, src=0)
        if not self.is_first:
            trainer.restore(told[0])

    @contextmanager
    def after_the_first(self) -> Iterator[None]:
        """Inside is the first process, and when it has left, all others.

        Raises:
            ValueError: if the first process has ended.
        """
        if not self.is_first:
            with _waiting():
                dist.barrier()
        yield
        if self.is_first and self.size > 1:
            dist.barrier()


ALONE = Share()
"""A run in one process."""


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError("the first process has ended, and says why") from error


def launched() -> Share:
    """What torchrun says of this process; ``ALONE`` without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def joined() -> Iterator[Share]:
    """Inside, the processes that torchrun has started can tell each other."""
    share = launched()
    if share.size == 1:
        yield share
        return
    dist.init_process_group("gloo")
    try:
        yield share
    finally:
        dist.destroy_process_group()
