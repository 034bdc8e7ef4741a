"""A run of any kind, opened again: its network, how it is tested, and the data that its statistics are taken of.

What differs between the kinds stands in ``KINDS``, a function for each. Imports their loops.

Legend: ``n`` streams of a text, ``T`` time steps of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.calibration.recalibrate import Call
from streamnorm.lab.runs.autoencoder import loop as autoencoder_loop
from streamnorm.lab.runs.autoencoder import model as autoencoder
from streamnorm.lab.runs.autoencoder.data import load_documents, same_documents
from streamnorm.lab.runs.checkpoint import said_of
from streamnorm.lab.runs.classifier import loop
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.runs.classifier.loop import Trainer, reloop
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import expect_trained, kind
from streamnorm.lab.runs.language import loop as language_loop
from streamnorm.lab.runs.language import model as language
from streamnorm.lab.runs.language.data import load_text
from streamnorm.lab.runs.language.model import bits
from streamnorm.lab.runs.underway import description


@dataclass(frozen=True, eq=False)
class Source:
    """Data that go through a network for its statistics.

    Attributes:
        name: of the data.
        unit, count: how many of what there are, such as 1437 samples.
        batches: all of them, in an order drawn from the run's seed.
        call: runs the network on a batch; None: it takes a batch as it is.
    """

    name: str
    unit: str
    count: int
    batches: Sequence[Any]
    call: Call | None = None


@dataclass(frozen=True, eq=False)
class Reopened:
    """A run that was trained, whatever its kind.

    Attributes:
        label: what a table calls it.
        setting: the data that it was trained on, and what else a line about it names.
        model: the network as its checkpoint has it.
        updates: how many there are to do; ``state["done"]`` are done.
        state: all of the checkpoint.
        description: what its ``run.json`` says.
        test: tests the network and says what came out.
        source: (data or None for those of the run, how many or None for all, how many in a batch) -> a ``Source``.
        others: other ways to test it, by their flag: numbers -> a line for each.
    """

    label: str
    setting: str
    model: nn.Module
    updates: int
    state: dict[str, Any]
    description: dict[str, Any]
    test: Callable[[], str]
    source: Callable[[str | None, int | None, int], Source]
    others: Mapping[str, Callable[[tuple[int, ...]], list[str]]] = field(default_factory=dict)


def reopen(path: Path, state: dict[str, Any], data_root: Path | None = None) -> Reopened:
    """The run of the checkpoint ``state``, which lies at ``path``, with its data.

    Raises:
        FileNotFoundError: for data whose file is not there.
        CheckpointError: if its weights are not those of its run.
        ValueError: for a run that could not train, or data that are not those of its training.
    """
    held = kind_at(path, state)
    expect_trained(state, path)
    with said_of(path):
        return KINDS[held].open(path, state, data_root)


def kind_at(path: Path, state: dict[str, Any]) -> str:
    """The kind of run in ``KINDS`` that the checkpoint ``state``, which lies at ``path``, is of.

    Raises:
        ValueError: for what was learned from a stream: each row was a test already, and there are no others.
    """
    held = kind(state["run"])
    if held not in KINDS:
        raise ValueError(
            f"{path} holds {held}, which was tested on each row before it learned from it: see report.html there; "
            "streamnorm learn goes on with it"
        )
    return held


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def classifier(path: Path, state: dict[str, Any], root: Path | None) -> Reopened:
    """A classifier and its samples."""
    run = Run.from_json(state["run"])
    data = load(run.data, root, train_limit=run.train_limit, test_limit=run.test_limit)
    trainer = Trainer(run, data)
    trainer.restore(state)

    def test(model: nn.Module = trainer.model) -> str:
        loss, error = loop.evaluate(model, data.test_x, data.test_y)
        return f"test loss {loss:.4f} nats, error {error:.2%} of {len(data.test_x)}"

    def source(name: str | None, limit: int | None, size: int) -> Source:
        here = data if name is None else load(name, root)
        x = here.train_x[:limit]
        if x.shape[1:] != data.train_x.shape[1:]:
            raise ValueError(
                f"the network was trained on samples {tuple(data.train_x.shape[1:])} of {data.name}, those of "
                f"{here.name} are {tuple(x.shape[1:])}"
            )
        return Source(here.name, "samples", len(x), x[_shuffled(len(x), run.seed)].split(size))

    return Reopened(
        label=run.label,
        setting=f"{data.name}, architecture {run.network}",
        model=trainer.model,
        updates=trainer.updates,
        state=state,
        description=description(run, data),
        test=test,
        source=source,
        others={"loops": lambda loops: [f"with loops {' '.join(map(str, loops))}: {test(reloop(trainer, loops))}"]},
    )


def language_model(path: Path, state: dict[str, Any], root: Path | None) -> Reopened:
    """A language model and its text. A source is read as the test reads the validation text, not as training does: in
    streams that begin in a state of 0, which is carried through ``CARRIED_CHUNKS`` chunks of the trained length, or
    not at all where training did not; once for each of the trained lengths. What fills no stream is left out."""
    run, model = language_loop.rebuilt(state)
    vocabulary = state["data"]["vocabulary"]
    text = load_text(run.data, root, vocabulary=vocabulary, limit=run.limit)
    if text.source != state["data"]["text"]:
        raise ValueError(f"it was trained on another text: {state['data']['text']} there and {text.source} here")
    characters = len(text.validation) - 1

    def test() -> str:
        nats = language.validate(model, text.validation, run)
        return f"validation loss {nats:.4f} nats, {bits(nats):.4f} bits per character of {characters}"

    def source(name: str | None, limit: int | None, size: int) -> Source:
        here = text if name is None else load_text(name, root, vocabulary=vocabulary)
        symbols = here.train[:limit]
        if len(symbols) < max(run.steps):
            raise ValueError(
                f"{len(symbols)} training characters of {here.name} are fewer than the {max(run.steps)} time steps "
                "that the model was trained with; give more"
            )
        chunks = language.CARRIED_CHUNKS if run.carry_state else 1
        read = [(_streams(symbols, steps, chunks, run.seed), steps) for steps in run.steps]
        batches = [(part, steps) for x, steps in read for part in x.tensor_split(-(-x.shape[1] // size), 1)]
        return Source(here.name, "characters", max(x.numel() for x, _ in read), batches, _through)

    def at_lengths(lengths: tuple[int, ...]) -> list[str]:
        if wrong := [length for length in lengths if not 1 <= length <= characters]:
            raise ValueError(f"a length is 1 to {characters} time steps, the whole validation text; got {wrong[0]}")
        losses = [(length, language.evaluate(model, text.validation, length)) for length in lengths]
        return [
            f"{length} time steps, each sequence from a state of 0: {nats:.4f} nats, {bits(nats):.4f} bits"
            for length, nats in losses
        ]

    return Reopened(
        label=run.label,
        setting=text.name,
        model=model,
        updates=state["updates"],
        state=state,
        description=description(run, text),
        test=test,
        source=source,
        others={"lengths": at_lengths},
    )


def _streams(symbols: Tensor, steps: int, chunks: int, seed: int) -> Tensor:
    """A text side by side ``(T, n)``, T whole chunks of ``steps``: ``chunks``, or as many as there are."""
    length = steps * min(chunks, len(symbols) // steps)
    n = len(symbols) // length
    return symbols[: n * length].view(n, length)[_shuffled(n, seed)].T


def _through(model: nn.Module, batch: tuple[Tensor, int]) -> None:
    """The streams ``(T, n)`` of a batch, chunk after chunk, from a state of 0 on."""
    x, steps = batch
    state: language.State = None
    for chunk in x.split(steps):
        _, state = model(chunk, state)


def auto_encoder(path: Path, state: dict[str, Any], root: Path | None) -> Reopened:
    """An auto-encoder and its documents, whose words its inputs are: others cannot be read."""
    run, model = autoencoder_loop.rebuilt(state)
    documents = load_documents(run.data, root, vocabulary=run.vocabulary, train_limit=run.train_limit)
    same_documents(documents, state["data"]["documents"], path)

    def test() -> str:
        nats = autoencoder.evaluate(model, documents.words, documents.tested)
        return (
            f"test cost {nats:.3f} nats a document, {nats / run.vocabulary:.5f} a word, of {len(documents.tested)}; "
            f"{autoencoder.cost_of_frequencies(documents):.3f} from how often each word occurs"
        )

    def source(name: str | None, limit: int | None, size: int) -> Source:
        if name not in (None, run.data):
            raise ValueError(
                f"the inputs of an auto-encoder are the words of its own documents, {run.data}, not of {name}; leave "
                "out --data"
            )
        index = _shuffled(len(range(documents.train)[:limit]), run.seed)
        batches = [documents.words.select(part) for part in index.split(size)]
        return Source(documents.name, "documents", len(index), batches, lambda model, bags: model(bags))

    return Reopened(
        label=run.label,
        setting=documents.name,
        model=model,
        updates=state["updates"],
        state=state,
        description=description(run, documents),
        test=test,
        source=source,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        open: (where its checkpoint lies, its state, the folder of the data files) -> the run.
        others: the keys of its ``Reopened.others``.
    """

    open: Callable[[Path, dict[str, Any], Path | None], Reopened]
    others: frozenset[str] = frozenset()


KINDS = {
    "a classifier": Kind(classifier, frozenset({"loops"})),
    "a language model": Kind(language_model, frozenset({"lengths"})),
    "an auto-encoder": Kind(auto_encoder),
}
"""Every kind of run, by what ``kind`` says of it."""
