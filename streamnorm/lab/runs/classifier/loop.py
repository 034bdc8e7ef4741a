"""The training loop of a ``Run``: decoupled accumulation and update, records, checkpoints that resume bit for bit.

A folder holds one run: ``run.json`` (what it is, with versions), ``metrics.jsonl`` (a line an epoch) and
``checkpoint.safetensors``. A run killed at any moment goes on from its last checkpoint. Imports the rest of the room.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.models import build
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import Tell, recorded, run_to_end
from streamnorm.lab.runs.processes import ALONE, Share
from streamnorm.lab.runs.underway import LATE, UnderWay, description, load_model
from streamnorm.monitoring.monitor import monitor
from streamnorm.ops.functional import latest_statistics
from streamnorm.train.dau import DAU
from streamnorm.train.warmup import AUTO_WARMUP

Progress = Callable[[int, int], None]
EVALUATION_BATCH = 1000
MONITOR = "monitor.jsonl"


def learning_rate(run: Run, update: int, updates: int) -> float:
    """The rate of weight update ``update`` of ``updates``: a tenth in the last sixth (paper, section 7.1)."""
    return run.learning_rate * (1.0 if update < updates * 5 / 6 else 0.1)


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, samples: int) -> Tensor:
    """The order of the training data in an epoch: of the seed and the epoch alone, so every arm sees the same."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the error as a fraction, in eval mode; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        loss, wrong = 0.0, 0
        for a, b in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
            output = model(a)
            loss += F.cross_entropy(output, b, reduction="sum").item()
            wrong += int((output.argmax(1) != b).sum())
    finally:
        for module, training in modes:
            module.training = training
    return loss / len(x), wrong / len(x)


def expect_enough(run: Run, data: Data) -> None:
    """Refuse data that do not fill one update.

    Raises:
        ValueError: with both sizes.
    """
    if run.samples_per_update > len(data.train_x):
        raise ValueError(
            f"one update takes {run.samples_per_batch} S/B x {run.batches_per_update} B/U = {run.samples_per_update} "
            f"samples, {data.name} has {len(data.train_x)} to train on"
        )


class Trainer(UnderWay):
    """The run of a classifier under way. A study with a network of its own says so in ``network``."""

    KEPT = ("sums",)
    SHAPES = {"sums": {"loss": float, "wrong": int, "seconds": float}}  # noqa: RUF012
    LINE = {  # noqa: RUF012
        **dict.fromkeys(("epoch", "updates", "samples"), int),
        **dict.fromkeys(("train_loss", "train_error", "test_error", "seconds"), float),
        "test_loss": (float, None),
    }
    WHY_EPOCHS = LATE
    run: Run
    data: Data

    def __init__(self, run: Run, data: Data, share: Share = ALONE) -> None:
        expect_enough(run, data)
        samples = share.samples(run.samples_per_batch)
        model = self.network(run, data)
        share.synchronize(model)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
        )
        self.per_epoch = len(data.train_x) // run.samples_per_update
        super().__init__(run, data, model, optimizer, self.per_epoch * run.epochs)
        self.dau = DAU(
            self.model,
            self.optimizer,
            F.cross_entropy,
            samples_per_batch=samples,
            batches_per_update=run.batches_per_update,
            vectorize=not run.loops,  # in a loop mini-batches take turns at a layer
            warmup=0,
        )
        self.share = share
        self.sums = {"loss": 0.0, "wrong": 0, "seconds": 0.0}

    def network(self, run: Run, data: Data) -> nn.Module:
        """What is trained, with its first weights."""
        return build(run, data.train_x[0], data.classes)

    def identity(self) -> dict[str, Any]:
        sizes = {"training samples": len(self.data.train_x), "test samples": len(self.data.test_x)}
        return {"data set": self.data.name, **sizes}

    def tested(self, done: int) -> list[int]:
        return [*range(self.per_epoch, done + 1, self.per_epoch)]

    def step(self) -> None:
        """One cycle of mini-batches and its weight update; before that, at the end of an epoch, a test.

        What cannot go on says why in ``failed``; a test loss that is not finite is a result, with an error of 1. The
        weights that are tested are those with which the statistics were taken; so the last update of all is left undone
        (section 3.3.1).
        """
        start = time.perf_counter()
        try:
            if self.done == 0:
                self._warm_up()
            x, y = self._cycle(self.done)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.run, self.done, self.updates)
            with latest_statistics() if self.run.backward_stats == "latest" else nullcontext():
                loss, output = self.dau.cycle(x, y)
        except DegenerateReferenceError as error:
            self.failed = str(error).split(";")[0]
            return
        total, wrong = self.share.sum(loss.item(), int((output.argmax(1) != y).sum()))
        if not math.isfinite(total):
            self.failed = f"diverged: the loss became {total / self.share.size} at update {self.done + 1}"
            return
        self.done += 1
        self.sums["loss"] += total / self.share.size
        self.sums["wrong"] += int(wrong)
        self.sums["seconds"] += time.perf_counter() - start
        if self.done % self.per_epoch == 0:
            self._close_epoch()
        if not self.finished:
            start = time.perf_counter()
            self.share.average(self.model.parameters())
            self.dau.step()
            self.sums["seconds"] += time.perf_counter() - start

    def _warm_up(self) -> None:
        cycles = self.run.warmup
        if cycles is None:
            m = self.run.samples_per_batch
            mine = self.share.of(torch.arange(m), m)
            cycles = AUTO_WARMUP if self.dau.needs_warmup(self.data.train_x[mine]) else 0
        for cycle in range(cycles):
            self.dau.warm_up(self._cycle(cycle % self.per_epoch)[0])

    def _cycle(self, update: int) -> tuple[Tensor, Tensor]:
        epoch, step = divmod(update, self.per_epoch)
        size = self.run.samples_per_update
        index = order(self.run.seed, epoch, len(self.data.train_x))[step * size : (step + 1) * size]
        index = self.share.of(index, self.run.samples_per_batch)
        return self.data.train_x[index], self.data.train_y[index]

    def _close_epoch(self) -> None:
        samples = self.per_epoch * self.run.samples_per_update
        test_loss, test_error = evaluate(self.model, self.data.test_x, self.data.test_y)
        self.metrics.append(
            {
                "epoch": self.done // self.per_epoch,
                "updates": self.done,
                "samples": self.done * self.run.samples_per_update,
                "train_loss": self.sums["loss"] / self.per_epoch,
                "train_error": self.sums["wrong"] / samples,
                **recorded("test_loss", test_loss),
                "test_error": test_error if math.isfinite(test_loss) else 1.0,
                "seconds": self.sums["seconds"],
            }
        )
        self.sums = {"loss": 0.0, "wrong": 0, "seconds": 0.0}


def reloop(trainer: Trainer, loops: tuple[int, ...]) -> nn.Module:
    """The model of a run with other loops than it was trained with: the same weights, gains and statistics.

    Raises:
        ValueError: for loops that its architecture does not have.
    """
    run, data = replace(trainer.run, loops=loops), trainer.data
    model = build(run, data.train_x[0], data.classes)
    load_model(model, trainer.model.state_dict())
    return model


def train(
    run: Run,
    data: Data,
    folder: Path | None = None,
    progress: Progress | None = None,
    monitored: int | None = None,
    begin: Callable[[bool], None] | None = None,
    tell: Tell | None = None,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Train ``run`` to its end, from its last checkpoint if ``folder`` holds one.

    Args:
        folder: where the run is kept; None keeps nothing.
        progress: called with (updates done, updates in all).
        monitored: record pre-activations and memories every so many updates, in ``monitor.jsonl`` of the folder.
        begin: called once nothing is refused any more, before anything is written, with whether nothing is left to do.
        tell: called with the metrics of each epoch: first of those before its checkpoint, then of each as it closes.
        share: of this process, where several train it together; the first alone has the folder.

    Returns:
        The record: what was run, on what, and the metrics of every epoch. ``failed`` says in a sentence why a run
        could not go on, or is None.

    Raises:
        CheckpointError: if the folder holds another run, or a damaged checkpoint.
    """
    trainer = Trainer(run, data, share)
    show = (lambda: progress(trainer.done, trainer.updates)) if progress else None

    def within() -> AbstractContextManager[Any]:
        if monitored is None or folder is None or trainer.finished:
            return nullcontext()
        return monitor(trainer.model, trainer.optimizer, folder / MONITOR, every=monitored, start=trainer.done)

    def begin_alike(finished: bool) -> None:
        share.begin_alike(trainer)
        if begin:
            begin(trainer.finished)

    described = description(run, data) | ({} if share.size == 1 else {"processes": share.size})
    run_to_end(trainer, folder if share.is_first else None, described, show, within, begin_alike, tell)
    return trainer.record()
