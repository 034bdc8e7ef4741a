"""The runs of the study ``shakespeare``: each one trained, then tested at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.language.data import Text
from streamnorm.lab.runs.language.loop import train_text, trained
from streamnorm.lab.runs.language.model import LanguageModel, build, losses, statistics_kept, tested
from streamnorm.lab.runs.language.run import TextRun
from streamnorm.lab.studies.study import Record, final

BETA = "streaming, beta 0 0 1"


@dataclass(frozen=True)
class Tier:
    """The size of a study: which text, how much of it, how large the networks and for how long.

    Attributes:
        mixed: time steps of the chunks where lengths vary.
        validate_every: updates between two validations.
        lengths: time steps of the sequences that are tested, the trained ones first.
        only: the names of the runs it is confined to; empty: all.
    """

    data: str
    limit: int | None
    hidden: int
    steps: int
    mixed: tuple[int, ...]
    streams: int
    epochs: int
    validate_every: int
    lengths: tuple[int, ...]
    only: tuple[str, ...] = ()


PAPER = tuple(f"{arch} {arm}" for arch in ("rnn", "gru") for arm in ("tsbn", "layer", "streaming", BETA))
TIERS = {
    "smoke": Tier("pydoc", 4_000, 8, 10, (5, 10, 15), 8, 1, 5, (10, 20, 40)),
    "reduced": Tier("tinyshakespeare", None, 100, 100, (50, 100, 150), 64, 3, 20, (100, 200, 400)),
    "full": Tier("shakespeare", None, 100, 100, (50, 100, 150), 64, 3, 20, (100, 200, 400), PAPER),
}
ARCHS: tuple[Literal["rnn", "gru"], ...] = ("rnn", "gru")
SETTINGS = ("streaming", BETA, "streaming, alpha .3 .7")
CELLS = ("streaming", "streaming, ReLU", "streaming, vertical")


def runs(tier: Tier) -> dict[str, TextRun]:
    """The runs of a tier by name: the arms of the two figures, and the variants that single claims ask for."""
    shared = TextRun(
        data=tier.data,
        limit=tier.limit,
        hidden=tier.hidden,
        steps=(tier.steps,),
        epochs=tier.epochs,
        samples_per_batch=tier.streams,
        batches_per_update=1,
        validate_every=tier.validate_every,
    )
    named: dict[str, TextRun] = {}
    for arch in ARCHS:
        whole = replace(shared, arch=arch)
        halves = in_batches(replace(whole, arm="streaming"), tier.streams // 2, 2)
        named |= {
            f"{arch} tsbn": replace(whole, arm="tsbn"),
            f"{arch} layer": replace(whole, arm="layer"),
            f"{arch} streaming": halves,
            f"{arch} {BETA}": replace(halves, beta=(0.0, 0.0, 1.0)),
            f"{arch} streaming, alpha .3 .7": replace(halves, alpha=(0.3, 0.7)),
            f"{arch} streaming, ReLU": replace(halves, nonlinearity="relu"),
            f"{arch} streaming, vertical": replace(halves, vertical=True),
        }
        if arch == "rnn":
            named |= {
                "rnn streaming, 1 B/U": replace(whole, arm="streaming"),
                "rnn streaming, latest statistics back": replace(halves, backward_stats="latest"),
                "rnn streaming, state reset": replace(halves, carry_state=False),
                "rnn tsbn, state reset": replace(whole, arm="tsbn", carry_state=False),
                "rnn batch": replace(whole, arm="batch"),
                "rnn batch, vertical": replace(whole, arm="batch", vertical=True),
            }
    for arm in ("tsbn", "layer", "streaming"):
        named[f"gru {arm}, weights x 5"] = replace(named[f"gru {arm}"], weight_scale=5.0)
    m, n = tier.streams // 2, len(tier.mixed)
    for arm in ("streaming", "layer"):
        mixed = replace(shared, arch="rnn", arm=arm, steps=tier.mixed, carry_state=False)
        named |= {
            f"rnn {arm}, mixed lengths, 1 B/U": in_batches(mixed, m * n, 1),
            f"rnn {arm}, mixed lengths, {n} B/U": in_batches(mixed, m, n),
        }
    return {name: named[name] for name in tier.only or named}


def in_batches(run: TextRun, m: int, n: int) -> TextRun:
    """``run`` with m S/B and n B/U, validated after as many updates as with one."""
    return replace(run, samples_per_batch=m, batches_per_update=n, validate_every=n * run.validate_every)


def carry_out(
    named: Mapping[str, TextRun],
    seeds: Sequence[int],
    text: Text,
    lengths: Sequence[int],
    out: Path,
    say: Callable[[str], None] = print,
) -> dict[str, list[Record]]:
    """Train every run with every seed, seed by seed, and test each at all lengths."""
    records: dict[str, list[Record]] = {name: [] for name in named}
    for seed in seeds:
        for name, run in named.items():
            folder = out / name.replace(",", "").replace("/", "").replace(" ", "-") / f"seed{seed}"
            record = {**train_text(replace(run, seed=seed), text, folder), "label": name}
            if not record["failed"]:
                record |= finite(examined(trained(folder)[1], text, max(run.steps), lengths))
            records[name].append(record)
            (loss,) = final({name: [record]}, name, "validation_loss")
            say(f"{name}, seed {seed}: " + (record["failed"] or f"validation loss {loss:.4f} nats"))
    return records


# --- What is asked of a trained model


def examined(model: LanguageModel, text: Text, steps: int, lengths: Sequence[int]) -> Record:
    """Its loss at each length, along the longest, and how the statistics of its hidden path drift over time."""
    at, along = {}, torch.zeros(0)
    for length in lengths:
        sums, counts = losses(model, text.validation, length)
        at[str(length)] = (sums.sum() / counts.sum()).item()
        along = sums / counts
    kept = {"lengths": at, "along": along.tolist(), "statistics": statistics_kept(model)}
    return kept | statistics_over_time(model, text, steps)


SHOWN_UNITS = 5
SEQUENCES = 1_000
"""So many sequences, at most, tell the statistics of a time step."""


def statistics_over_time(model: LanguageModel, text: Text, steps: int) -> Record:
    """mu_t and sigma_t of ``W_h h_{t-1}`` at the time steps t = 2, 3, ... of sequences of the training text.

    Each begins with a state of 0, which makes both 0 at t = 1.

    Returns:
        ``drift``, how far the means of a step are from those over time, in the units' sigma (root mean square over
        units); ``noise``, how far they would seem to be by chance, with so many sequences; of some units, from the one
        that moves least to the one that moves most, ``mu`` about its mean over time and ``sigma``, in the mean sigma.
    """
    n = min(SEQUENCES, len(text.train) // steps)
    cell = model.recurrent.cells["l0"]
    with tested(model):
        x = torch.nn.functional.one_hot(text.train[: n * steps].view(n, steps).T, model.symbols).float()
        h = model.recurrent(x)[0][:-1]
        a = h @ cell.weight_hh[-model.recurrent.hidden_size :].T  # type: ignore[index]  the rows of h_new come last
    sigma, mu = torch.std_mean(a.double(), dim=1)
    scale = sigma.mean(0).clamp(min=1e-12)
    moved = (mu - mu.mean(0)) / scale
    order = moved.square().sum(0).argsort()[torch.linspace(0, moved.shape[1] - 1, SHOWN_UNITS).long()]
    kept = {"drift": moved.square().mean(1).sqrt(), "mu": moved[:, order].T, "sigma": (sigma / scale)[:, order].T}
    return {name: of.tolist() for name, of in kept.items()} | {"noise": n**-0.5}


def kept_by_steps(record: Record) -> dict[int, int]:
    """How many numbers the statistics of a run are after sequences of the trained length, and of twice that."""
    run = TextRun.from_json(record["run"])
    kept = {}
    for steps in (max(run.steps), 2 * max(run.steps)):
        model = build(run, 5)
        model(torch.randint(5, (steps, 4), generator=torch.Generator().manual_seed(0)))
        kept[steps] = statistics_kept(model)
    return kept
