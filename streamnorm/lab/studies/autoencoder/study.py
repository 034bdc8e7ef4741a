"""Auto-encoders of sparse text on a stream, and two questions about batch normalization in them (seeds 000 and 003).

    streamnorm reproduce autoencoder --data-root DATA --tier reduced

Films, 1,992 words, 128 ReLU units, plain SGD at a constant rate, two epochs: one document at a time, and mini-batches
of 64. Dropout and the place of batch normalization are studied where there is something to overfit: on fewer documents,
for more epochs. For a seed every arm has the same weights and order of documents. A stopped study goes on with the same
command.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from streamnorm.lab.runs.autoencoder.documents import Documents, load_documents
from streamnorm.lab.runs.autoencoder.model import cost_of_frequencies, train_autoencoder, trained
from streamnorm.lab.runs.autoencoder.neighbors import codes, precision_by_chance, side_by_side
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.autoencoder.figures import picture
from streamnorm.lab.studies.autoencoder.measures import NEIGHBORS, examined, with_and_without_bias
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    below,
    final,
    folder_of,
    judge,
    lowest,
    mean,
    number,
    spread,
    together,
    with_failures,
)

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


# --- Claims


def figure(records: Records, name: str, key: str) -> list[float]:
    """What ``examined`` found for each seed; nan for a run that failed."""
    return [number(r.get(key, math.nan)) for r in records[name]]


def pairs_of(records: Records) -> dict[str, tuple[str, str]]:
    """Every learning rate and kind of mini-batch at which there are both arms of seed 000: without a norm, layer."""
    found = {
        name.removeprefix("none "): name for name in records if name.startswith("none ") and " dropout" not in name
    }
    return {what: (name, f"layer {what}") for what, name in found.items() if f"layer {what}" in records}


def ratios(records: Records, none: str, layer: str, key: str = "train_cost") -> list[float]:
    """Layer over none at each epoch, the means over the seeds."""
    both = []
    for name in (none, layer):
        if any(r["failed"] for r in records[name]):
            return [math.nan]
        both.append(
            [mean(column) for column in zip(*([m[key] for m in r["metrics"]] for r in records[name]), strict=True)]
        )
    return [b / a for a, b in zip(*both, strict=True)]


def _c38(records: Records) -> tuple[Verdict, str]:
    found = {what: ratios(records, *names) for what, names in pairs_of(records).items()}
    online = {what: both for what, both in found.items() if what.startswith("online")}
    strong = all(ratio <= 0.75 for both in online.values() for ratio in both)
    weak = any(all(ratio < 1 for ratio in both) for both in online.values())
    ends = [[mean(final(records, pairs_of(records)[what][i], "train_cost")) for what in online] for i in (0, 1)]
    best = [min((end for end in own if end == end), default=math.nan) for own in ends]  # a run that failed is nan
    figures = "; ".join(f"{what} " + ", ".join(f"{ratio:.3f}" for ratio in both) for what, both in found.items())
    figures += f"; online, each at its best rate {best[1] / best[0]:.3f}"
    return ("reproduced" if strong else "partly" if weak else "contradicted"), f"layer / none by epoch: {figures}"


def _c39(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for what, (none, layer) in pairs_of(records).items():
        if not what.startswith("online"):
            continue
        ends = {name: final(records, name, "norm") for name in (none, layer)}
        begins = {n: [r["metrics"][0]["norm"] if r["metrics"] else math.nan for r in records[n]] for n in ends}
        growth = {n: below(begins[n], ends[n]) for n in ends}
        parts += [judge(below(ends[none], ends[layer]), 0), judge(below(growth[none], growth[layer]), 0)]
        figures.append(
            f"{what}: none {spread(ends[none])}, grown by {spread(growth[none])} since the first epoch, "
            f"layer {spread(ends[layer])}, by {spread(growth[layer])}"
        )
    return together(parts), "; ".join(figures)


def _c40(records: Records) -> tuple[Verdict, str]:
    gaps = {
        w: below(figure(records, a, "precision"), figure(records, b, "precision"))
        for w, (a, b) in pairs_of(records).items()
    }
    names = [name for pair in pairs_of(records).values() for name in pair]
    figures = ", ".join(f"{name} {spread(figure(records, name, 'precision'))}" for name in names)
    return together([judge(gap, 0) for gap in gaps.values()]), f"precision at {NEIGHBORS}: {figures}"


def _c41(records: Records) -> tuple[Verdict, str]:
    refused = all(r["failed"] for r in records["batch online"])
    known = records["batch online"][0]["frequencies"]
    learned = [n for n in records if (" online" in n and not n.startswith(("batch", "none"))) or " in cycles" in n]
    able = [all(cost < known for cost in final(records, name, "test_cost")) for name in learned]
    figures = ", ".join(f"{name} {spread(final(records, name, 'test_cost'))}" for name in learned)
    verdict: Verdict = "reproduced" if refused and all(able) else "partly" if refused and any(able) else "contradicted"
    return verdict, f"batch {'refused' if refused else 'ran'}; test cost, {known:.2f} from frequencies: {figures}"


def _c46(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for depth in ("", "deep "):
        none, batch = f"{depth}sigmoid none", f"{depth}sigmoid batch"
        open_ = {name: figure(records, name, "unsaturated") for name in (none, batch)}
        ends = {name: final(records, name, "test_cost") for name in (none, batch)}
        parts += [judge(below(open_[none], open_[batch]), 0), judge(below(ends[batch], ends[none]), 0)]
        figures += [f"{n}: {spread(open_[n])} between .05 and .95, test cost {spread(ends[n])}" for n in (none, batch)]
    return together(parts), "; ".join(figures)


def _c47(records: Records) -> tuple[Verdict, str]:
    found = [r["bias"] for r in records["batch in batches"] if not r["failed"]]
    if not found:
        return "contradicted", "no seed could train"
    gradient, difference = (max(pair[i] for pair in found) for i in (0, 1))
    redundant = gradient <= 1e-7 and difference <= 1e-7
    figures = f"largest gradient of the bias {gradient:.1e}, largest difference of a logit {difference:.1e}, in float64"
    return ("reproduced" if redundant else "contradicted"), figures


def _c48_dropout(records: Records) -> tuple[Verdict, str]:
    best, figures = {}, []
    for arm in ("none", "batch"):
        costs = {x: lowest(records, f"{arm}, dropout {x}", "test_cost") for x in DROPOUTS}
        dropped = zip(*(costs[x] for x in DROPOUTS[1:]), strict=True)
        best[arm] = below([min((c for c in seeds if c == c), default=math.nan) for seeds in dropped], costs[0.0])
        ends = {x: mean(final(records, f"{arm}, dropout {x}", "test_cost")) for x in DROPOUTS}
        parts = (f"{x} {spread(cost)} (last {ends[x]:.2f})" for x, cost in costs.items())
        figures.append(f"{arm}: " + ", ".join(parts))
    figures += [f"dropout gains {arm} {spread(gain)}" for arm, gain in best.items()]
    return judge(below(best["batch"], best["none"]), 0), "lowest test cost by dropout, " + "; ".join(figures)


def _c48_place(records: Records) -> tuple[Verdict, str]:
    places = {"none": "none, dropout 0.0", "hidden": "batch, dropout 0.0", "top": "batch on top", "all": "batch on all"}
    costs = {place: lowest(records, name, "test_cost") for place, name in places.items()}
    figures = ", ".join(f"{place} {spread(cost)}" for place, cost in costs.items())
    return judge(below(costs["all"], costs["hidden"]), 0), f"lowest test cost with BN on {figures}"


def _c63(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for what, names in pairs_of(records).items():
        if not what.startswith("online"):
            continue
        for key in ("units_alike", "units_and_words"):
            none, layer = (figure(records, name, key) for name in names)
            parts.append(judge(below(layer, none), 0))
        for name in names:
            alike, words, dead = (figure(records, name, key) for key in ("units_alike", "units_and_words", "dead"))
            figures.append(f"{name}: among units {spread(alike)}, with words {spread(words)}, dead {mean(dead):.1%}")
    return together(parts), "mean absolute correlation, " + "; ".join(figures)


CLAIMS = [
    Claim("C-38", "LN lowers the cost to 3/4 or less, at both epochs and the same rate (000).", _c38),
    Claim("C-39", "With LN the norm of W is larger and grows more (000).", _c39),
    Claim("C-40", "Neighbors by LN's codes are as good as those without (000).", _c40),
    Claim("C-41", "BN cannot learn from one document at a time; LN and streaming can (000, 001).", _c41),
    Claim("C-46", "With BN, sigmoid units saturate less and learn more of binary data (003).", _c46),
    Claim("C-47", "A bias before BN is redundant (003).", _c47),
    Claim(
        "C-48, 1", "Dropout gains less with BN than without, in an auto-encoder too (003, question 1).", _c48_dropout
    ),
    Claim("C-48, 2", "BN on all layers is better than on the hidden ones alone (003, question 2).", _c48_place),
    Claim("C-63", "ReLU units without a norm correlate more, with each other and with the words (000).", _c63),
]
"""Of a question, "reproduced" means yes."""


# --- The record


def table(records: Records, words: int) -> str:
    """The figures of every run as a Markdown table."""
    head = ["run", "train cost, first epoch", "last", "test cost, last", "a word", "lowest", "norm of W, first", "last"]
    head += [f"precision at {NEIGHBORS}", "among units", "with words", "dead", "s/epoch"]
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    for name, seeds in records.items():
        whole = [r for r in seeds if r["metrics"] and not r["failed"]]
        if not whole:
            lines.append([name, seeds[0]["failed"] or "", *[""] * (len(head) - 2)])
            continue
        ends = {
            i: {k: [number(r["metrics"][i][k]) for r in whole] for k in ("train_cost", "test_cost", "norm")}
            for i in (0, -1)
        }
        own, least = {name: whole}, lowest({name: whole}, name, "test_cost")
        cells = [
            with_failures(name, seeds),
            spread(ends[0]["train_cost"]),
            spread(ends[-1]["train_cost"]),
            spread(ends[-1]["test_cost"]),
        ]
        cells += [f"{mean(ends[-1]['test_cost']) / words:.5f}", spread(least)]
        cells += [f"{mean(ends[i]['norm']):.2f}" for i in (0, -1)] + [spread(figure(own, name, "precision"))]
        cells += [f"{mean(figure(own, name, key)):.4f}" for key in ("units_alike", "units_and_words", "dead")]
        seconds = statistics.median(line["seconds"] for r in whole for line in r["metrics"])
        lines.append([*cells, f"{seconds:.1f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def neighbors(records: Records, documents: Documents, tier: Tier, out: Path) -> str:
    """The neighbors of the chosen documents without a norm and with layer normalization, side by side, as Markdown; of
    the first seed, where it did not fail."""
    firsts = {name: records[name][0] for name in (f"{arm} online, rate {tier.rate}" for arm in ("none", "layer"))}
    models = {
        name: trained(folder_of(out, name.replace(",", ""), first["seed"]))[1]
        for name, first in firsts.items()
        if not first["failed"]
    }
    columns = {name: codes(model, documents.words) for name, model in models.items()}
    lines = []
    for title in tier.titles:
        i = documents.find(title)
        lines += [f"\n{documents.titles[i]} ({', '.join(documents.labels_of(i))}):\n", f"| | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        lines += [f"| {k} | {' | '.join(row)} |" for k, row in enumerate(side_by_side(documents, i, columns, 5), 1)]
    return "\n".join(lines)


def write_results(records: Records, tier: Tier, documents: Documents, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it ``results.json`` and ``curves.png``."""
    write(out / "results.json", json.dumps({"title": title, "records": records}, indent=1, allow_nan=False) + "\n")
    write(out / "curves.png", picture(records, DROPOUTS))
    first = next(iter(records.values()))[0]
    chance = precision_by_chance(documents.tested, documents.labels)
    lines = [*opening(first, title), *verdicts(records, CLAIMS), "", table(records, tier.vocabulary)]
    lines += [f"Costs in nats a document. Precision by chance: {chance:.3f}.", "", "![Curves](curves.png)", ""]
    lines += [neighbors(records, documents, tier, out), ""]
    write(out / "results.md", "\n".join(lines))
    return out / "results.md"


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "autoencoder", TIERS)
    named = runs(tier)
    records = carry_out(named, arguments.seeds_or(), arguments.data_root, out)
    documents = load_documents(tier.data, arguments.data_root, vocabulary=tier.vocabulary, train_limit=tier.limit)
    for record in records["batch online"]:
        record["frequencies"] = cost_of_frequencies(documents)
    for record in (record for record in records["batch in batches"] if not record["failed"]):
        record["bias"] = with_and_without_bias(AutoencoderRun.from_json(record["run"]), documents)
    title = f"Auto-encoders: {documents.name}, tier {arguments.tier}"
    return write_results(records, tier, documents, out, title)
