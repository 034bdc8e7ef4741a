"""Auto-encoders of sparse text on a stream, and two questions about batch normalization in them (seeds 000 and 003).

    streamnorm reproduce autoencoder --data-root DATA --tier reduced

Films, 1,992 words, 128 ReLU units, plain SGD at a constant rate, two epochs: one document at a time, and mini-batches
of 64. Dropout and the place of batch normalization are studied where there is something to overfit: on fewer documents,
for more epochs. For a seed every arm has the same weights and order of documents. A stopped study goes on with the same
command.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from streamnorm.lab.runs.autoencoder.data import Documents, load_documents
from streamnorm.lab.runs.autoencoder.loop import trained
from streamnorm.lab.runs.autoencoder.model import cost_of_frequencies
from streamnorm.lab.runs.autoencoder.neighbors import codes, precision_by_chance, side_by_side
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.autoencoder.claims import CLAIMS, figure
from streamnorm.lab.studies.autoencoder.figures import picture
from streamnorm.lab.studies.autoencoder.measures import NEIGHBORS, with_and_without_bias
from streamnorm.lab.studies.autoencoder.runs import DROPOUTS, TIERS, Tier, carry_out, runs
from streamnorm.lab.studies.record import keep, lines_of, opening, page, verdicts
from streamnorm.lab.studies.study import Record, Records, folder_of, lowest, mean, number, spread


def table(records: Records, words: int) -> str:
    """The figures of every run as a Markdown table."""
    head = ["run", "train cost, first epoch", "last", "test cost, last", "a word", "lowest", "norm of W, first", "last"]
    head += [f"precision at {NEIGHBORS}", "among units", "with words", "dead", "s/epoch"]

    def cells(name: str, able: Sequence[Record]) -> list[str]:
        own = {name: able}
        first, last = (
            {k: [number(r["metrics"][i][k]) for r in able] for k in ("train_cost", "test_cost", "norm")}
            for i in (0, -1)
        )
        found = [spread(costs) for costs in (first["train_cost"], last["train_cost"], last["test_cost"])]
        found += [f"{mean(last['test_cost']) / words:.5f}", spread(lowest(own, name, "test_cost"))]
        found += [f"{mean(ends['norm']):.2f}" for ends in (first, last)] + [spread(figure(own, name, "precision"))]
        found += [f"{mean(figure(own, name, key)):.4f}" for key in ("units_alike", "units_and_words", "dead")]
        return [*found, f"{statistics.median(line['seconds'] for r in able for line in r['metrics']):.1f}"]

    return lines_of(records, head, cells)


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
    keep(records, out, title)
    write(out / "curves.png", picture(records, DROPOUTS))
    first = next(iter(records.values()))[0]
    chance = precision_by_chance(documents.tested, documents.labels)
    lines = [*opening(first, title), *verdicts(records, CLAIMS), "", table(records, tier.vocabulary)]
    lines += [f"Costs in nats a document. Precision by chance: {chance:.3f}.", "", "![Curves](curves.png)", ""]
    lines += [neighbors(records, documents, tier, out), ""]
    return page(lines, out)


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
