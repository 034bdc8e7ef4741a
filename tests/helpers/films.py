"""A small collection of documents in memory, and the run of an auto-encoder on it."""

from __future__ import annotations

from typing import Any

import torch

from streamnorm.lab.runs.autoencoder.data import Bags, Documents
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun

WORDS = 30


def collection(train: int = 40, test: int = 10, words: int = WORDS) -> Documents:
    """Documents of two kinds, each with words of its own half of the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(2, (train + test,), generator=generator)
    often = torch.where((torch.arange(words) * 2 // words)[None] == kinds[:, None], 0.3, 0.02)
    x = torch.rand(train + test, words, generator=generator) < often
    bags = Bags.of([row.nonzero()[:, 0].tolist() for row in x], words)
    titles = tuple(f"film {i}" for i in range(train + test))
    labels = Bags.of([[kind] for kind in kinds.tolist()], 2)
    names = tuple(f"word{i}" for i in range(words))
    return Documents("toy", "made by a test", titles, bags, names, labels, ("even", "odd"), train, train)


def small(**changes: Any) -> AutoencoderRun:
    defaults: dict[str, Any] = {"data": "toy", "vocabulary": WORDS, "hidden": (6,), "learning_rate": 0.05}
    return AutoencoderRun(**{**defaults, **changes})
