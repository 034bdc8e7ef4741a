"""Character-level language models: the network, its arms, its loss on a text, and text from it (paper, section 7.6).

Imports the recurrent layers. Losses are in nats per character; ``bits`` makes bits of them.

Legend: ``T`` time steps, ``n`` streams side by side, ``V`` symbols.
"""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.lab.runs.language.data import decode, encode
from streamnorm.lab.runs.language.run import TextRun
from streamnorm.nn.affine import Affine
from streamnorm.nn.layers import BatchNorm, SampleNorm, StreamingNorm
from streamnorm.nn.norm import Norm
from streamnorm.nn.recurrent.layers import NormGRU, NormLSTM, NormRNN, Recurrent
from streamnorm.nn.timespecific import TimeSpecific, TimeSpecificNorm

State = Tensor | tuple[Tensor, ...] | None
"""What a recurrent layer carries on: h, of an LSTM (h, c); None is 0."""
NormFactory = Callable[[int], nn.Module]
CELLS: dict[str, Callable[..., Recurrent]] = {"rnn": NormRNN, "gru": NormGRU, "lstm": NormLSTM}
EVALUATION_STREAMS = 256
CARRIED_CHUNKS = 10
"""Chunks of a validation stream where the state is carried: 1,000 characters of the paper's 100 steps."""


def _batch(run: TextRun) -> NormFactory:
    return partial(BatchNorm, p=run.p, center=run.center or "batch")


def _streaming(run: TextRun) -> NormFactory:
    options: dict[str, Any] = {"center": run.center or "estimate", "alpha": run.alpha, "beta": run.beta}
    return partial(StreamingNorm, p=run.p, kappa=run.kappa, **options)


ARMS: dict[str, Callable[[TextRun], NormFactory]] = {
    "none": lambda run: Affine,
    "layer": lambda run: partial(SampleNorm, p=run.p, center=run.center or "batch"),
    "batch": _batch,
    "tsbn": lambda run: TimeSpecific(_batch(run)),
    "streaming": _streaming,
    "default": lambda run: partial(StreamingNorm, p=run.p, center=run.center or "estimate"),
}
"""Every arm: what stands after each matrix of a recurrent layer, with its gain and bias. Gain and bias of ``tsbn`` are
shared by the time steps; ``batch`` is the paper's original BN, whose running estimate all steps share; ``streaming`` is
the paper's rule, ``default`` counts its memory in samples."""


class LanguageModel(nn.Module):
    """One-hot characters -> a normalized recurrent layer -> a linear read-out with bias.

    ``x (T, n)`` of symbols, state -> logits ``(T, n, V)``, state

    >>> model = LanguageModel(27, NormGRU(27, 8))
    >>> logits, h = model(torch.zeros(5, 2, dtype=torch.int64))
    >>> logits.shape, h.shape
    (torch.Size([5, 2, 27]), torch.Size([1, 2, 8]))
    """

    def __init__(self, symbols: int, recurrent: Recurrent) -> None:
        super().__init__()
        self.symbols = symbols
        self.recurrent = recurrent
        self.readout = nn.Linear(recurrent.hidden_size, symbols)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        one_hot = F.one_hot(x, self.symbols).to(self.readout.weight.dtype)
        output, state = self.recurrent(one_hot, state)
        return self.readout(output), state


def build(run: TextRun, symbols: int) -> LanguageModel:
    """The network of a run, its weights drawn from the run's seed: the same ones for every arm.

    Raises:
        ValueError: for an unknown arm.
    """
    if run.arm not in ARMS:
        near = difflib.get_close_matches(run.arm, ARMS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown arm {run.arm!r} of a language model; {hint}the arms are {', '.join(ARMS)}")
    options: dict[str, Any] = {"num_layers": run.layers, "norm": ARMS[run.arm](run)}
    options |= {"backward_stats": run.backward_stats, "norm_h": None if run.vertical else "same"}
    if run.arch != "lstm":
        options["nonlinearity"] = run.nonlinearity
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = LanguageModel(symbols, CELLS[run.arch](symbols, run.hidden, **options))
    with torch.no_grad():
        for name, weight in model.recurrent.named_parameters():
            if name.endswith(("weight_ih", "weight_hh")):
                weight.mul_(run.weight_scale)
    return model


def bits(nats: float) -> float:
    """Bits per character.

    >>> bits(math.log(8))
    3.0
    """
    return nats / math.log(2)


def detached(state: State) -> State:
    """The state without the graph that made it: where truncated backpropagation ends."""
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return None if state is None else state.detach()


@contextmanager
def tested(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode and keeps no graph; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def losses(model: LanguageModel, symbols: Tensor, steps: int, chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats at each time step of a chunk, summed, and of how many characters: float64, int64 ``(T,)``.

    Every symbol but the first is predicted once. The text is cut into streams of ``chunks`` chunks of ``steps`` steps,
    each stream from a state of 0, which is carried from chunk to chunk; the last stream may be shorter.
    """
    predicted = len(symbols) - 1
    length = min(steps * chunks, predicted)
    n = -(-predicted // length)
    padding = n * length - predicted
    x = F.pad(symbols[:-1], (0, padding)).view(n, length).T
    y = F.pad(symbols[1:], (0, padding), value=-100).view(n, length).T  # -100 is cross_entropy's ignore_index
    sums, counts = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.int64)
    with tested(model):
        for some in range(0, n, EVALUATION_STREAMS):
            state: State = None
            columns = slice(some, some + EVALUATION_STREAMS)
            for start in range(0, length, steps):
                targets = y[start : start + steps, columns]
                logits, state = model(x[start : start + steps, columns], state)
                nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
                sums[: len(targets)] += nats.double().sum(1)
                counts[: len(targets)] += (targets >= 0).sum(1)
    return sums, counts


def evaluate(model: LanguageModel, symbols: Tensor, steps: int, chunks: int = 1) -> float:
    """The mean of ``losses`` over all characters, in nats."""
    sums, counts = losses(model, symbols, steps, chunks)
    return (sums.sum() / counts.sum()).item()


def validate(model: LanguageModel, symbols: Tensor, run: TextRun) -> float:
    """The loss in nats, tested as ``run`` trains: with the state carried or not, at each of its lengths, the mean."""
    chunks = CARRIED_CHUNKS if run.carry_state else 1
    return statistics.fmean(evaluate(model, symbols, steps, chunks) for steps in run.steps)


def sample(
    model: LanguageModel,
    vocabulary: str,
    prompt: str,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
    steps: int = 100,
) -> str:
    """Text that goes on after ``prompt``, ``length`` characters of it.

    Args:
        temperature: the logits are divided by it; 0 always takes the likeliest character.
        seed: the same seed, the same text.
        steps: time steps that the model was trained with. Where statistics are kept for each time step, the time starts
            anew after so many, as it did in training.

    Raises:
        ValueError: for an empty prompt or one with characters that the vocabulary does not have, and for a length or a
            temperature below 0.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character, for instance a line break")
    if length < 0:
        raise ValueError(f"length is a number of characters >= 0, got {length}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is a finite number >= 0, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    window = steps if any(isinstance(module, TimeSpecificNorm) for module in model.modules()) else 1
    state: State = None
    since: list[int] = []  # symbols after ``state``, fewer than a window
    text = encode(prompt, vocabulary).tolist()
    with tested(model):
        for i in range(len(text) + length - 1):
            since.append(text[i])
            last = i == len(text) - 1
            if not last and len(since) < window:
                continue
            logits, after = model(torch.tensor(since)[:, None], state)
            if len(since) == window:
                state, since = after, []
            if last:
                text.append(_draw(logits[-1, 0].double(), temperature, generator))
    return decode(torch.tensor(text[len(prompt) :], dtype=torch.int64), vocabulary)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def statistics_kept(model: nn.Module) -> int:
    """Numbers that the normalization layers of a model remember beside its weights (H1 and H2, section 4.3)."""
    memories = [memory for module in model.modules() if isinstance(module, Norm) for memory in (module.H1, module.H2)]
    return sum(memory.tables.numel() + memory.counts.numel() for memory in memories if memory is not None)
