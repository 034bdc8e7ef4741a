"""The runs of the study ``autoencoder``: each one trained, and then examined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from streamnorm.lab.runs.autoencoder.data import Documents, load_documents
from streamnorm.lab.runs.autoencoder.loop import train_autoencoder, trained
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.studies.autoencoder.measures import examined
from streamnorm.lab.studies.study import Record, final, folder_of

DROPOUTS = (0.0, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Tier:
    """The size of a study.

    Attributes:
        rates: learning rates of the arms without a norm and with layer normalization, one document at a time.
        rate: of streaming normalization there, one of ``rates``.
        batch: documents of a mini-batch, and ``batch_rate`` the learning rate with them.
        limit: train on so many documents in the first part, and on ``few`` of them for ``epochs`` in the second.
        titles: documents whose neighbors are shown.
    """

    data: str
    vocabulary: int
    hidden: int
    deep: tuple[int, int, int]
    rates: tuple[float, ...]
    rate: float
    batch: int
    batch_rate: float
    limit: int | None
    few: int
    epochs: int
    titles: tuple[str, ...]


FILMS = ("Toy Story", "Casablanca", "Alien (1979)", "The Godfather", "Rear Window (1954)")
TIERS = {
    "smoke": Tier("pydoc", 200, 8, (12, 8, 12), (0.005, 0.02), 0.005, 8, 0.1, 64, 32, 2, ("lambda",)),
    "reduced": Tier("movies", 1992, 128, (256, 128, 256), (0.001, 0.003, 0.01), 0.003, 64, 0.1, None, 4500, 40, FILMS),
}
TIERS["full"] = replace(TIERS["reduced"], rates=(3e-4, 0.001, 0.003, 0.01, 0.03), few=9000, epochs=80)


def runs(tier: Tier) -> dict[str, AutoencoderRun]:
    """Every run of the study by name."""
    base = AutoencoderRun(data=tier.data, vocabulary=tier.vocabulary, hidden=(tier.hidden,), train_limit=tier.limit)
    online = replace(base, learning_rate=tier.rate)
    named = {
        f"{arm} online, rate {rate}": replace(online, arm=arm, learning_rate=rate)
        for rate in tier.rates
        for arm in ("none", "layer")
    }
    longer = {"alpha": (0.9, 0.1), "beta": (0.9, 0.1, 0.0), "warmup": min(100, tier.few)}
    named |= {
        "batch online": replace(online, arm="batch"),
        "streaming online": replace(online, arm="streaming"),
        "streaming online, longer memory": replace(online, arm="streaming", **longer),
    }
    batches = replace(base, samples_per_batch=tier.batch, learning_rate=tier.batch_rate)
    for start, top_bias in (("", "frequencies"), (", biases from zero", "zero")):
        for arm in ("none", "layer", "batch", "streaming"):
            named[f"{arm} in batches{start}"] = replace(batches, arm=arm, top_bias=top_bias)  # type: ignore[arg-type]
    one_by_one = {"samples_per_batch": 1, "batches_per_update": tier.batch}
    cycles = replace(batches, arm="streaming", **one_by_one)
    named |= {"streaming in cycles": cycles, "streaming in cycles, beta 0 1 0": replace(cycles, beta=(0.0, 1.0, 0.0))}
    for depth, hidden in (("", (tier.hidden,)), ("deep ", tier.deep)):
        for arm in ("none", "batch"):
            named[f"{depth}sigmoid {arm}"] = replace(batches, arm=arm, hidden=hidden, nonlinearity="sigmoid")
    few = replace(batches, train_limit=tier.few, epochs=tier.epochs)
    named |= {f"{arm}, dropout {x}": replace(few, arm=arm, dropout=x) for arm in ("none", "batch") for x in DROPOUTS}
    places: tuple[Literal["top", "all"], ...] = ("top", "all")
    return named | {f"batch on {place}": replace(few, arm="batch", normalized=place) for place in places}


def carry_out(
    named: Mapping[str, AutoencoderRun],
    seeds: Sequence[int],
    data_root: Path | None,
    out: Path,
    say: Callable[[str], None] = print,
) -> dict[str, list[Record]]:
    """Train every run with every seed, seed by seed, and examine each."""
    records: dict[str, list[Record]] = {name: [] for name in named}
    loaded: dict[int | None, Documents] = {}
    for seed in seeds:
        for name, run in named.items():
            limit = run.train_limit
            if limit not in loaded:
                loaded[limit] = load_documents(run.data, data_root, vocabulary=run.vocabulary, train_limit=limit)
            folder = folder_of(out, name.replace(",", ""), seed)
            record = {**train_autoencoder(replace(run, seed=seed), loaded[limit], folder), "label": name}
            if not record["failed"]:
                record |= finite(examined(trained(folder)[1], loaded[limit]))
            records[name].append(record)
            (cost,) = final({name: [record]}, name, "test_cost")
            say(f"{name}, seed {seed}: " + (record["failed"] or f"test cost {cost:.3f} nats a document"))
    return records
