"""Auto-encoders of sparse binary documents: the network, its cost, and its training loop (seeds 000 and 003).

A document is the set of its words and enters as the sum of their rows of W; only those rows have a gradient, so that a
step of plain SGD moves no others. Imports the layers and the rest of the room.

Legend: ``n`` documents, ``V`` words, ``h`` units of a hidden layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.train.dau import attach, vectorized
from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.lab.runs.classifier.architectures import NormFactory, norm_factory
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.checkpoint import expect, said_of
from streamnorm.lab.runs.autoencoder.documents import Bags, Documents
from streamnorm.lab.runs.keeping import Tell, recorded, run_to_end, trained_state
from streamnorm.lab.runs.language.model import tested
from streamnorm.lab.runs.classifier.loop import order
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.underway import UnderWay, description, load_model

EVALUATION_BATCH = 500


class WordSum(nn.Module):
    """A linear layer for bags of words: ``y = sum of W[j] over the words j``, plus a bias if wanted.

    It is ``x W`` for the binary rows x, without making x. The gradient of W is sparse.

    Shapes: ``bags`` of n documents ``-> y (n, h)``; ``weight (V, h)``, ``bias (h)``.

    >>> layer = WordSum(3, 2)
    >>> layer(Bags.of([[0, 2], []], 3)).shape
    torch.Size([2, 2])
    """

    def __init__(self, words: int, units: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, units))
        self.bias = nn.Parameter(torch.zeros(units)) if bias else None
        nn.init.kaiming_normal_(self.weight, mode="fan_out")  # of (V, h), whose first axis is the input

    def forward(self, bags: Bags) -> Tensor:
        y = F.embedding_bag(bags.members, self.weight, bags.offsets, mode="sum", sparse=True, include_last_offset=True)
        return y if self.bias is None else y + self.bias


class Autoencoder(nn.Module):
    """Bags of words -> hidden layers -> a logit for each word.

    ::

        g = W x,  h = (g - mu) / sigma,  f = max(0, a h + b)        a layer with a norm: W has no bias (seed 003)
        f = max(0, W x + b)                                         a layer without

    Args:
        words: V.
        hidden: units of each hidden layer.
        norm: ``c -> layer`` for the normalized layers; None: no layer is.
        on_hidden, on_top: which layers are normalized.
        nonlinearity: of the hidden layers; the top layer's sigmoid is part of the cost.
        dropout: share of hidden units left out in training; the others are scaled up for it.

    Shapes: ``bags`` of n documents ``-> logits (n, V)``.

    >>> from streamnorm import SampleNorm
    >>> model = Autoencoder(5, (3,), SampleNorm)
    >>> model(Bags.of([[0, 4], [1]], 5)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        words: int,
        hidden: tuple[int, ...],
        norm: NormFactory | None,
        on_hidden: bool = True,
        on_top: bool = False,
        nonlinearity: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.nonlinearity, self.dropout = nonlinearity, dropout
        normalized = [norm is not None and on for on in (*[on_hidden] * len(hidden), on_top)]
        self.read = WordSum(words, hidden[0], bias=not normalized[0])
        self.linears = nn.ModuleList(
            _linear(before, after, bias=not on)
            for (before, after), on in zip(pairwise([*hidden, words]), normalized[1:], strict=True)
        )
        self.norms = nn.ModuleList(
            norm(c) if norm is not None and on else nn.Identity()
            for c, on in zip((*hidden, words), normalized, strict=True)
        )

    def layers(self, bags: Bags, random: torch.Generator | None = None) -> list[Tensor]:
        """The activations ``(n, h)`` of each hidden layer, then the logits ``(n, V)``.

        Args:
            random: what dropout draws from; None: torch's own generator.
        """
        x = self.read(bags)
        found = []
        for linear, norm in zip(self.linears, self.norms, strict=False):
            found.append(self.nonlinearity(norm(x)))
            x = linear(self._dropped(found[-1], random))
        return [*found, self.norms[-1](x)]

    def forward(self, bags: Bags, random: torch.Generator | None = None) -> Tensor:
        return self.layers(bags, random)[-1]

    def top_bias(self) -> Tensor:
        """What is added to the logits last ``(V,)``."""
        top = self.linears[-1] if isinstance(self.norms[-1], nn.Identity) else self.norms[-1]
        return top.bias  # type: ignore[return-value]

    def _dropped(self, h: Tensor, random: torch.Generator | None) -> Tensor:
        if not (self.training and self.dropout):
            return h
        kept = 1 - self.dropout
        return h * torch.empty_like(h).bernoulli_(kept, generator=random).div_(kept)


def _linear(before: int, after: int, bias: bool) -> nn.Module:
    # A layer's own initialization would draw its bias too, and weights that come later would depend on who has one.
    linear = nn.utils.skip_init(nn.Linear, before, after, bias=bias)
    nn.init.kaiming_normal_(linear.get_parameter("weight"))
    if bias:
        nn.init.zeros_(linear.get_parameter("bias"))
    return linear


def build(run: AutoencoderRun, words: int) -> Autoencoder:
    """The network of a run, its weights drawn from the run's seed: the same ones for every arm.

    Raises:
        ValueError: for an unknown arm.
    """
    norm = None
    if run.arm != "none":
        shared = {name: getattr(run, name) for name in ("arm", "p", "center", "alpha", "beta", "kappa")}
        norm = norm_factory(Run(**shared))
    options = {"on_hidden": run.normalized != "top", "on_top": run.normalized != "hidden"}
    nonlinearity = {"relu": torch.relu, "sigmoid": torch.sigmoid}[run.nonlinearity]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return Autoencoder(words, run.hidden, norm, **options, nonlinearity=nonlinearity, dropout=run.dropout)


def cost(logits: Tensor, bags: Bags) -> Tensor:
    """Cross-entropy between each document and its reconstruction, summed over the words: nats ``(n,)``.

    ``- sum_j x_j log sigmoid(z_j) + (1 - x_j) log(1 - sigmoid(z_j))``
    """
    x = bags.dense(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def in_batches(bags: Bags, index: Tensor) -> list[Bags]:
    """The documents ``index``, cut into batches for testing."""
    return [bags.select(part) for part in index.split(EVALUATION_BATCH)]


def evaluate(model: Autoencoder, bags: Bags, index: Tensor) -> float:
    """The mean cost of the documents ``index`` in eval mode, in nats a document."""
    with tested(model):
        return sum(cost(model(batch), batch).sum().item() for batch in in_batches(bags, index)) / len(index)


def log_odds(documents: Documents) -> Tensor:
    """``log(p / (1 - p))`` of each word ``(V,)``, float64, p the share of training documents that have it.

    Half a document with and half a one without it are added, so that a word of none or of all has odds, too.
    """
    training = documents.words.select(torch.arange(documents.train))
    counts = torch.bincount(training.members, minlength=training.size).double()
    return torch.logit((counts + 0.5) / (documents.train + 1))


def cost_of_frequencies(documents: Documents) -> float:
    """The mean cost of the documents that test, for a reconstruction that knows how often each word occurs, no more."""
    logits = log_odds(documents).expand(EVALUATION_BATCH, -1)
    batches = in_batches(documents.words, documents.tested)
    return sum(cost(logits[: len(batch)], batch).sum().item() for batch in batches) / len(documents.tested)


class AutoencoderTrainer(UnderWay):
    """The run of an auto-encoder under way."""

    PARTS = ("optimizer", "link")
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
        self.link = attach(model, optimizer, "auto" if run.warmup is None else run.warmup)
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
    begin: Callable[[], None] | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Train ``run`` to its end, from its last checkpoint if ``folder`` holds one.

    Args:
        folder: where the run is kept; None keeps nothing.
        progress: called with the trainer after each update.
        begin: called once nothing is refused any more, before anything is written.
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
