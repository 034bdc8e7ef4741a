"""Auto-encoders of sparse binary documents: the network and its cost (seeds 000 and 003).

A document is the set of its words and enters as the sum of their rows of W; only those rows have a gradient, so that a
step of plain SGD moves no others. Imports the layers and the rest of the room.

Legend: ``n`` documents, ``V`` words, ``h`` units of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.lab.runs.autoencoder.data import Bags, Documents
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.classifier.models import NormFactory, norm_factory
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.language.model import tested

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
