"""A small text, runs on it, and what tests of language models ask of a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.language.data import Text, encode
from streamnorm.lab.runs.language.loop import TextTrainer
from streamnorm.lab.runs.language.model import LanguageModel
from streamnorm.lab.runs.language.run import TextRun

WORDS = "the cat sat on the mat; a dog ran to the den.\n"


def tiny(characters: int = 1200) -> Text:
    """A made-up text of which 12 streams have 99 characters each."""
    generator = torch.Generator().manual_seed(7)
    words = WORDS.split(" ")
    order = torch.randint(len(words), (characters,), generator=generator).tolist()
    whole = " ".join(words[i] for i in order)[:characters]
    vocabulary = "".join(sorted(set(whole)))
    symbols = encode(whole, vocabulary)
    cut = characters * 99 // 100
    return Text("tiny", vocabulary, symbols[:cut], symbols[cut - 1 :], "made by tests/helpers/texts.py")


def small(**changes: Any) -> TextRun:
    defaults: dict[str, Any] = {
        "data": "tiny",
        "arch": "rnn",
        "hidden": 6,
        "samples_per_batch": 4,
        "batches_per_update": 2,
        "steps": (10,),
        "epochs": 2,
        "validate_every": 6,
    }
    return TextRun(**{**defaults, **changes})


def to_the_end(trainer: TextTrainer) -> TextTrainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def snapshot(trainer: TextTrainer, path: Path) -> dict[str, Any]:
    """The state as a file keeps it."""
    checkpoint.save(path, trainer.state())
    return checkpoint.load(path)


def seen_by(trainer: TextTrainer) -> list[tuple[Tensor, Any]]:
    """The inputs and the states of every training call of the model from now on."""
    calls: list[tuple[Tensor, Any]] = []

    def keep(model: LanguageModel, inputs: tuple[Any, ...]) -> None:
        if model.training:
            calls.append((inputs[0].clone(), inputs[1]))

    trainer.model.register_forward_pre_hook(keep)
    return calls
