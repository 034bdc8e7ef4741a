"""The training loop of a ``TextRun``: truncated backpropagation through time over parallel streams of one text.

The text is cut into m n streams. An update reads the next chunk of all of them: n mini-batches of m streams, one after
another, their gradients accumulated (paper, section 2), each with the state in which its streams stood (section 7.6:
100 steps). Before a test the weight update is still to come, and the last one of all is left undone: the weights that
are tested are those that the statistics were taken with (section 3.3.1). A folder holds one run, like those of
``loop``: ``run.json``, ``metrics.jsonl``, ``checkpoint.safetensors``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.checkpoint import said_of
from streamnorm.lab.runs.keeping import Tell, recorded, run_to_end, trained_state
from streamnorm.lab.runs.language.data import Text, chunk, streams
from streamnorm.lab.runs.language.manhattan import Manhattan
from streamnorm.lab.runs.language.model import LanguageModel, State, bits, build, detached, validate
from streamnorm.lab.runs.language.run import TextRun
from streamnorm.lab.runs.underway import LATE, UnderWay, description, load_model
from streamnorm.train.dau import take_mean
from streamnorm.train.warmup import Warmup

SMOOTHED = 50
"""Mini-batches in the moving average of the training loss (section 7.6)."""


def learning_rate(run: TextRun, update: int, updates: int) -> float:
    """The rate of weight update ``update`` of ``updates``: a tenth in the last third (section 7.6)."""
    return run.learning_rate * (1.0 if update < updates * 2 / 3 else 0.1)


class TextTrainer(UnderWay):
    """The run of a language model under way, with the states of all its streams."""

    PARTS = ("optimizer", "warmup")
    KEPT = ("states", "losses", "seconds")
    SHAPES = {"losses": [float, ...], "seconds": float}  # noqa: RUF012
    LINE = {  # noqa: RUF012
        **dict.fromkeys(("updates", "batches", "characters"), int),
        **dict.fromkeys(("epoch", "train_loss", "seconds"), float),
        **dict.fromkeys(("validation_loss", "validation_bits"), (float, None)),
        "train_losses": [float, ...],
    }
    WHY_EPOCHS = LATE
    run: TextRun
    model: LanguageModel

    def __init__(self, run: TextRun, text: Text) -> None:
        self.x, self.y = streams(text.train, run.samples_per_update)
        self.per_epoch = len(self.x) // sum(run.steps) * len(run.steps)
        if not self.per_epoch:
            raise ValueError(
                f"{text.name} has {len(text.train)} characters to train on: {run.samples_per_batch} S/B x "
                f"{run.batches_per_update} B/U are {run.samples_per_update} streams of {len(self.x)}, too short for "
                f"chunks of {' + '.join(map(str, run.steps))} time steps; ask for fewer streams or steps, or give a "
                "longer text"
            )
        model = build(run, len(text.vocabulary))
        optimizer = Manhattan(model.parameters(), lr=run.learning_rate)
        super().__init__(run, text, model, optimizer, self.per_epoch * run.epochs)
        self.text = text
        self.warmup = Warmup(model, optimizer, "auto" if run.warmup is None else run.warmup)
        self.states: list[State] = [None] * run.batches_per_update
        self.losses: list[float] = []
        self.seconds = 0.0

    def identity(self) -> dict[str, Any]:
        return {"text": self.text.source, "vocabulary": self.text.vocabulary}

    def _is_tested(self, done: int) -> bool:
        n, every = self.run.batches_per_update, self.run.validate_every
        return done == self.updates or done * n // every > (done - 1) * n // every

    def tested(self, done: int) -> list[int]:
        return [update for update in range(1, done + 1) if self._is_tested(update)]

    @property
    def characters(self) -> int:
        """How many have been trained on, those of earlier epochs again."""
        run = self.run
        epochs, update = divmod(self.done, self.per_epoch)
        rows = epochs * run.batches_per_update * (self.per_epoch // len(run.steps) * sum(run.steps))
        rows += sum(chunk(run.steps, update, j).start for j in range(run.batches_per_update))
        return rows * run.samples_per_batch

    @property
    def train_loss(self) -> float | None:
        """The mean over the latest mini-batches, ``SMOOTHED`` of them, in nats."""
        latest = self.losses[-SMOOTHED:]
        for line in reversed(self.metrics):
            if len(latest) == SMOOTHED:
                break
            latest = (line["train_losses"] + latest)[-SMOOTHED:]
        return sum(latest) / len(latest) if latest else None

    def step(self) -> None:
        """One cycle of mini-batches, a line of metrics where a validation is due, and the weight update, except after
        the last cycle. What cannot go on says why in ``failed``; a validation that is not finite is a result."""
        with self._timed():
            self._accumulate()
        if self.failed:
            return
        self.done += 1
        if self._is_tested(self.done):
            self._validate()
        if not self.finished:
            with self._timed():
                self._update_weights()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _accumulate(self) -> None:
        run, n = self.run, self.run.batches_per_update
        update = self.done % self.per_epoch
        if update == 0 or not run.carry_state:
            self.states = [None] * n
        for j in range(n):
            rows = chunk(run.steps, update, j)
            columns = slice(j * run.samples_per_batch, (j + 1) * run.samples_per_batch)
            try:
                logits, state = self.model(self.x[rows, columns], self.states[j])
            except DegenerateReferenceError as error:
                self.failed = str(error).split(";")[0]
                return
            loss = F.cross_entropy(logits.flatten(0, 1), self.y[rows, columns].flatten())
            nats = loss.item()
            if not math.isfinite(nats):
                self.failed = f"diverged: the loss became {nats} at update {self.done + 1}"
                return
            # Every character weighs alike, whatever the length of its chunk; and H2 keeps one unit.
            (loss * ((rows.stop - rows.start) * len(run.steps) / sum(run.steps))).backward()
            self.states[j] = detached(state)
            self.losses.append(nats)

    def _update_weights(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run, self.done - 1, self.updates)
        take_mean(self.optimizer, self.run.batches_per_update)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self) -> None:
        nats = validate(self.model, self.text.validation, self.run)
        self.metrics.append(
            {
                "epoch": self.done / self.per_epoch,
                "updates": self.done,
                "batches": self.done * self.run.batches_per_update,
                "characters": self.characters,
                "train_loss": self.train_loss,
                "train_losses": self.losses,
                **recorded("validation_loss", nats),
                "validation_bits": bits(nats) if math.isfinite(nats) else None,
                "seconds": self.seconds,
            }
        )
        self.losses = []

    def _expect(self, state: dict[str, Any]) -> None:
        super()._expect(state)
        run, weight = self.run, self.model.readout.weight
        h = weight.new_empty(run.layers, run.samples_per_batch, run.hidden)
        one = [h, h] if run.arch == "lstm" else h
        begun = state["done"] and not state["failed"]
        checkpoint.expect(state, {"states": [one if begun else (None, one)] * run.batches_per_update})

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        # Copies lie in memory as a layer's own results do: sums over it round alike, and the run goes on bit for bit.
        self.states = [copied(s) for s in state["states"]]


def copied(state: Any) -> State:
    """A state as the layer returned it, from what a checkpoint made of it: a tuple has become a list."""
    return (
        tuple(part.clone() for part in state) if isinstance(state, list) else None if state is None else state.clone()
    )


def train_text(
    run: TextRun,
    text: Text,
    folder: Path | None = None,
    progress: Callable[[TextTrainer], None] | None = None,
    begin: Callable[[bool], None] | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Train ``run`` to its end, from its last checkpoint if ``folder`` holds one.

    Args:
        folder: where the run is kept; None keeps nothing.
        progress: called with the trainer after each update.
        begin: called once nothing is refused any more, before anything is written, with whether nothing is left to do.
        tell: called with each line of metrics: first with those before its checkpoint, then with each as it comes.

    Returns:
        The record: what was run, on what, and a line of metrics for every validation. ``failed`` says in a sentence why
        a run could not go on, or is None.

    Raises:
        CheckpointError: if the folder holds another run, or a damaged checkpoint.
    """
    trainer = TextTrainer(run, text)
    show = (lambda: progress(trainer)) if progress else None
    run_to_end(trainer, folder, description(run, text), show, begin=begin, tell=tell)
    return trainer.record()


def trained(path: Path) -> tuple[TextRun, LanguageModel, dict[str, Any]]:
    """The run, the model and all else of the checkpoint at ``path``, or in the folder ``path``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged.
        ValueError: if it is of no language model, or of a run that could not train.
    """
    state = trained_state(path, "a language model")
    with said_of(path):
        return *rebuilt(state), state


def rebuilt(state: dict[str, Any]) -> tuple[TextRun, LanguageModel]:
    """The run and the model of a checkpoint.

    Raises:
        CheckpointError: if its weights are not those of its run.
    """
    checkpoint.expect(state, {"data": {"text": str, "vocabulary": str}})
    run = TextRun.from_json(state["run"])
    model = build(run, len(state["data"]["vocabulary"]))
    load_model(model, state["model"])
    return run, model
