"""Character-level language models of Shakespeare (paper, section 7.6, Figures 11 and 12).

    streamnorm reproduce shakespeare --data-root DATA --tier reduced

RNN and GRU of 100 units, the Manhattan rule, 64 streams an update, chunks of 100 characters: time-specific and layer
normalization at 64 S/B x 1 B/U, streaming at 32 x 2 (L2, Setting B, alpha = (.7, .3), beta = (.7, 0, .3)). For a seed
every arm has the same weights and order of text; where one path has no norm, the read-out begins with other weights.
All are validated every 20 updates, that is after as many characters; the paper says every 20 mini-batches. Mixed
lengths are 96 sequences an update, each from a state of 0, and validation is the mean over those lengths. Streaming is
also trained with two other settings than the figures', and the GRU from larger first weights, since the paper does not
give its own (``docs/decisions/recurrence.md``). The full tier trains the arms of the two figures, and streaming with
one other setting, on the paper's own text; the variants are left to the reduced one. A stopped study goes on with the
same command.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.language.data import load_text
from streamnorm.lab.runs.language.model import bits
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import keep, lines_of, opening, page, verdicts
from streamnorm.lab.studies.shakespeare.claims import CLAIMS
from streamnorm.lab.studies.shakespeare.figures import FIGURES, over_time, picture
from streamnorm.lab.studies.shakespeare.runs import TIERS, carry_out, runs
from streamnorm.lab.studies.study import Record, Records, lowest, mean, number, spread


def table(records: Records, lengths: Sequence[int]) -> str:
    """The figures of every run as a Markdown table."""
    head = ["run", "lowest validation loss (nats)", "bits", "last training loss (nats)"]
    head += [f"at {length} steps (nats)" for length in lengths] + ["statistics kept", "s/epoch"]

    def cells(name: str, able: Sequence[Record]) -> list[str]:
        low = lowest({name: able}, name, "validation_loss")
        found = [spread(low), f"{bits(mean(low)):.4f}", spread([r["metrics"][-1]["train_loss"] for r in able])]
        found += [spread([number(r["lengths"][str(length)]) for r in able]) for length in lengths]
        per_epoch = statistics.median(r["metrics"][-1]["seconds"] / r["metrics"][-1]["epoch"] for r in able)
        return [*found, f"{able[0]['statistics']}", f"{per_epoch:.1f}"]

    return lines_of(records, head, cells)


def write_results(records: Records, lengths: Sequence[int], out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it ``results.json``, ``curves.png`` and
    ``statistics.png``, the statistics over time."""
    keep(records, out, title)
    rows = {title: {name: records[name] for name in names if name in records} for title, names in FIGURES.items()}
    write(out / "curves.png", picture({title: named for title, named in rows.items() if len(named) > 1}))
    shown = [r for r in records.get("rnn streaming, state reset", ()) if not r["failed"]][:1]
    for record in shown:
        write(out / "statistics.png", over_time(record))
    lines = [*opening(next(iter(records.values()))[0], title), *verdicts(records, CLAIMS), "", table(records, lengths)]
    lines += ["![Curves](curves.png)", "", *(["![Statistics over time](statistics.png)", ""] if shown else [])]
    return page(lines, out)


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "shakespeare", TIERS)
    text = load_text(tier.data, arguments.data_root, limit=tier.limit)
    records = carry_out(runs(tier), arguments.seeds_or(), text, tier.lengths, out)
    return write_results(records, tier.lengths, out, f"Language models: {text.name}, tier {arguments.tier}")
