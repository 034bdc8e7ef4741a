"""What the study of auto-encoders asks of a trained model, beside its cost.

Imports the training room.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from streamnorm.lab.runs.autoencoder.data import Documents
from streamnorm.lab.runs.autoencoder.loop import AutoencoderTrainer
from streamnorm.lab.runs.autoencoder.model import Autoencoder
from streamnorm.lab.runs.autoencoder.neighbors import codes, nearest, precision
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.language.model import tested
from streamnorm.lab.studies.study import Record

NEIGHBORS = 10


def examined(model: Autoencoder, documents: Documents) -> Record:
    """What is asked of a trained model, on the documents that test."""
    queries = documents.tested
    words = documents.words.select(queries)
    with tested(model):
        hidden = model.layers(words)[:-1]
    activations = torch.cat([h.flatten() for h in hidden])
    return {
        "precision": precision(
            nearest(codes(model, documents.words), queries, NEIGHBORS)[0], queries, documents.labels
        ),
        "units_alike": correlation(hidden[0], hidden[0]),
        "units_and_words": correlation(hidden[0], words.dense()),
        "dead": statistics.fmean((h == 0).all(0).float().mean().item() for h in hidden),
        "unsaturated": ((activations > 0.05) & (activations < 0.95)).float().mean().item(),
    }


def correlation(a: Tensor, b: Tensor) -> float:
    """The mean absolute correlation between the columns of ``a (n, i)`` and those of ``b (n, j)``.

    Where a is b, a column's with itself is left out. A column that never changes has a correlation of 0.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])
    >>> round(correlation(x, x), 6)
    1.0
    """
    a, b = ((x.double() - x.double().mean(0)) for x in (a, b))
    a, b = (x / x.norm(dim=0).clamp_min(1e-30) for x in (a, b))
    pairs = (a.T @ b).abs()
    if a.shape != b.shape or not torch.equal(a, b):
        return pairs.mean().item()
    return pairs.fill_diagonal_(0).sum().item() / (pairs.numel() - len(pairs))


def with_and_without_bias(run: AutoencoderRun, documents: Documents, updates: int = 100) -> tuple[float, float]:
    """Batch normalization after a projection with a bias and after one without, in float64 (C-47).

    Returns:
        The largest gradient that the bias ever had, and the largest difference of a logit at the end.
    """
    without, biased = AutoencoderTrainer(run, documents), AutoencoderTrainer(run, documents)
    for trainer in (without, biased):
        trainer.model.double()
    biased.model.read.bias = nn.Parameter(torch.zeros(run.hidden[0], dtype=torch.float64))
    biased.optimizer.add_param_group({"params": [biased.model.read.bias]})
    seen: list[float] = []
    biased.model.read.bias.register_hook(lambda gradient: seen.append(gradient.abs().max().item()))
    for _ in range(min(updates, without.updates)):
        without.step()
        biased.step()
    words = documents.words.select(documents.tested)
    with tested(without.model), tested(biased.model):
        difference = (without.model(words) - biased.model(words)).abs().max().item()
    return max(seen), difference
