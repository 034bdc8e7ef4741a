"""The training loop of an ``AutoencoderRun``: passes over the documents of a collection, tested after each.

Before a test the weight update is still to come, and the last one of all is left undone: the weights that are tested
are those that the statistics were taken with (paper, section 3.3.1). Imports the network and the rest of the room.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.lab.runs.autoencoder.data import Bags, Documents
from streamnorm.lab.runs.autoencoder.model import Autoencoder, build, cost, evaluate, log_odds
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.checkpoint import expect, said_of
from streamnorm.lab.runs.classifier.loop import order
from streamnorm.lab.runs.keeping import Tell, recorded, run_to_end, trained_state
from streamnorm.lab.runs.underway import UnderWay, description, load_model
from streamnorm.train.vectorized import vectorized
from streamnorm.train.warmup import Warmup


class AutoencoderTrainer(UnderWay):
    """The run of an auto-encoder under way."""

    PARTS = ("optimizer", "warmup")
    KEPT = ("sums",)
    SHAPES = {"sums": {"cost": float, "seconds": float}}  # noqa: RUF012
    LINE = {  # noqa: RUF012
        **dict.fromkeys(("epoch", "updates", "documents"), int),
        **dict.fromkeys(("train_cost", "norm", "top_norm", "seconds"), float),
        "test_cost": (float, None),
    }
    run: AutoencoderRun
    model: Autoencoder

    def __init__(self, run: AutoencoderRun, documents: Documents) -> None:
        size = run.samples_per_update
        if size > documents.train:
            raise ValueError(
                f"one update takes {run.samples_per_batch} S/B x {run.batches_per_update} B/U = {size} documents, "
                f"{documents.name} has {documents.train} to train on"
            )
        model = build(run, documents.words.size)
        if run.top_bias == "frequencies":
            model.top_bias().data.copy_(log_odds(documents))
        optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
        self.per_epoch = documents.train // size
        super().__init__(run, documents, model, optimizer, self.per_epoch * run.epochs)
        self.documents = documents
        self.warmup = Warmup(model, optimizer, "auto" if run.warmup is None else run.warmup)
        self.random = torch.Generator().manual_seed(run.seed)
        self.sums = {"cost": 0.0, "seconds": 0.0}

    def identity(self) -> dict[str, Any]:
        return {"documents": self.documents.source}

    def tested(self, done: int) -> list[int]:
        return [*range(self.per_epoch, done + 1, self.per_epoch)]

    def step(self) -> None:
        """One cycle of mini-batches and its weight update; before that, at the end of an epoch, a test.

        What cannot go on says why in ``failed``; a test cost that is not finite is a result. The weights that are
        tested are those with which the statistics were taken; so the last update of all is left undone (paper, section
        3.3.1).
        """
        start, n = time.perf_counter(), self.run.batches_per_update
        bags = self._cycle()
        try:
            with vectorized(self.model, n, averaged=True) if n > 1 else nullcontext():
                logits = self.model(bags, self.random)
        except DegenerateReferenceError as error:
            self.failed = str(error).split(";")[0]
            return
        loss = cost(logits, bags).mean()
        nats = loss.item()
        if not math.isfinite(nats):
            self.failed = f"diverged: the cost became {nats} at update {self.done + 1}"
            return
        loss.backward()
        self.done += 1
        self.sums["cost"] += nats
        self.sums["seconds"] += time.perf_counter() - start
        if self.done % self.per_epoch == 0:
            self._close_epoch()
        if not self.finished:
            start = time.perf_counter()
            self._update_weights()
            self.sums["seconds"] += time.perf_counter() - start

    def _cycle(self) -> Bags:
        epoch, place = divmod(self.done, self.per_epoch)
        size = self.run.samples_per_update
        index = order(self.run.seed, epoch, self.documents.train)[place * size : (place + 1) * size]
        return self.documents.words.select(index)

    def _update_weights(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _close_epoch(self) -> None:
        documents, model = self.documents, self.model
        test_cost = evaluate(model, documents.words, documents.tested)
        self.metrics.append(
            {
                "epoch": self.done // self.per_epoch,
                "updates": self.done,
                "documents": self.done * self.run.samples_per_update,
                "train_cost": self.sums["cost"] / self.per_epoch,
                **recorded("test_cost", test_cost),
                "norm": model.read.weight.norm().item(),
                "top_norm": model.linears[-1].weight.norm().item(),  # type: ignore[union-attr]
                "seconds": self.sums["seconds"],
            }
        )
        self.sums = {"cost": 0.0, "seconds": 0.0}


def train_autoencoder(
    run: AutoencoderRun,
    documents: Documents,
    folder: Path | None = None,
    progress: Callable[[AutoencoderTrainer], None] | None = None,
    begin: Callable[[bool], None] | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Train ``run`` to its end, from its last checkpoint if ``folder`` holds one.

    Args:
        folder: where the run is kept; None keeps nothing.
        progress: called with the trainer after each update.
        begin: called once nothing is refused any more, before anything is written, with whether nothing is left to do.
        tell: called with the metrics of each epoch: first of those before its checkpoint, then of each as it closes.

    Returns:
        The record: what was run, on what, and the metrics of every epoch. ``failed`` says in a sentence why a run
        could not go on, or is None.

    Raises:
        CheckpointError: if the folder holds another run, or a damaged checkpoint.
    """
    trainer = AutoencoderTrainer(run, documents)
    show = (lambda: progress(trainer)) if progress else None
    run_to_end(trainer, folder, description(run, documents), show, begin=begin, tell=tell)
    return trainer.record()


def trained(path: Path) -> tuple[AutoencoderRun, Autoencoder, dict[str, Any]]:
    """The run, the model and all else of the checkpoint at ``path``, or in the folder ``path``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged.
        ValueError: if it is of no auto-encoder, or of a run that could not train.
    """
    state = trained_state(path, "an auto-encoder")
    with said_of(path):
        return *rebuilt(state), state


def rebuilt(state: dict[str, Any]) -> tuple[AutoencoderRun, Autoencoder]:
    """The run and the model of a checkpoint.

    Raises:
        CheckpointError: if its weights are not those of its run.
    """
    expect(state, {"data": {"documents": str}})
    run = AutoencoderRun.from_json(state["run"])
    model = build(run, run.vocabulary)
    load_model(model, state["model"])
    return run, model
