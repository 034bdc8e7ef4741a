"""Which documents an auto-encoder finds alike: nearest neighbors of their codes, and how often they share a label.

Imports the auto-encoders.

Legend: ``n`` documents, ``q`` of them asked for, ``h`` units of the code, ``k`` neighbors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.lab.runs.autoencoder.data import Bags, Documents, load_documents, same_documents
from streamnorm.lab.runs.autoencoder.loop import trained
from streamnorm.lab.runs.autoencoder.model import Autoencoder, in_batches
from streamnorm.lab.runs.language.model import tested

QUERIES = 500
"""Documents whose similarities to all others are held at a time."""


def codes(model: Autoencoder, bags: Bags) -> Tensor:
    """The activations of the hidden layer in the middle, in eval mode: ``(n, h)``."""
    with tested(model):
        batches = in_batches(bags, torch.arange(len(bags)))
        middle = len(model.linears) // 2
        return torch.cat([model.layers(batch)[middle] for batch in batches])


def nearest(code: Tensor, asked: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k documents whose codes have the largest cosine with those of ``asked (q)``, themselves left out.

    Returns:
        Their numbers and their cosines ``(q, k)``, the largest first.

    Raises:
        ValueError: for more neighbors than there are other documents.

    >>> nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([0]), 2)[0]
    tensor([[2, 1]])
    """
    if not 1 <= k < len(code):
        raise ValueError(f"k is a number of neighbors from 1 to {len(code) - 1}, all other documents; got {k}")
    directions = F.normalize(code)
    found = []
    for some in asked.split(QUERIES):
        cosines = directions[some] @ directions.T
        cosines[torch.arange(len(some)), some] = -torch.inf
        found.append(cosines.topk(k))
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def precision(neighbors: Tensor, asked: Tensor, labels: Bags) -> float:
    """Precision at k: the share of ``neighbors (q, k)`` that have a label in common with the document ``asked (q)``."""
    shares = [
        _shared(labels, some).gather(1, near).float().mean(1)
        for some, near in zip(asked.split(QUERIES), neighbors.split(QUERIES), strict=True)
    ]
    return torch.cat(shares).mean().item()


def precision_by_chance(asked: Tensor, labels: Bags) -> float:
    """``precision`` of neighbors drawn at random from all other documents."""
    shares = []
    for some in asked.split(QUERIES):
        shared = _shared(labels, some)
        shared[torch.arange(len(some)), some] = False
        shares.append(shared.sum(1) / (len(labels) - 1))
    return torch.cat(shares).mean().item()


def _shared(labels: Bags, asked: Tensor) -> Tensor:
    """Which documents share a label with those asked for: bool ``(q, n)``."""
    return labels.select(asked).dense() @ labels.dense().T > 0


def codes_of(paths: Sequence[Path], data_root: Path | None = None) -> tuple[Documents, dict[str, Tensor]]:
    """The documents of some checkpoints, and for each checkpoint, by its run's label and its path, their codes.

    Raises:
        ValueError: if a checkpoint is of other documents than the first one, or than those that are here now.
    """
    documents: Documents | None = None
    found = {}
    for path in paths:
        run, model, state = trained(path)
        if documents is None:
            documents = load_documents(run.data, data_root, vocabulary=run.vocabulary)
        same_documents(documents, state["data"]["documents"], path)
        found[f"{run.label}\n{path}"] = codes(model, documents.words)
    if documents is None:
        raise ValueError("no checkpoint was given")
    return documents, found


def side_by_side(documents: Documents, i: int, columns: Mapping[str, Tensor], k: int) -> list[list[str]]:
    """The k nearest neighbors of document i, a row for each rank and a cell for each of the codes in ``columns``.

    A cell is a title, the cosine, and the labels that it shares.
    """
    own = set(documents.labels_of(i))
    cells = []
    for code in columns.values():
        numbers, cosines = (found[0].tolist() for found in nearest(code, torch.tensor([i]), k))
        shared = [", ".join(["", *(label for label in documents.labels_of(j) if label in own)]) for j in numbers]
        parts = zip(numbers, cosines, shared, strict=True)
        cells.append([f"{documents.titles[j]} {cosine:.2f}{both}" for j, cosine, both in parts])
    return [list(row) for row in zip(*cells, strict=True)]
