"""Unrolled convolutional networks (paper, sections 7.4 and 7.5, Figures 8, 9 and 10).

    streamnorm reproduce unrolled --data-root DATA --tier reduced

Architecture C with k1 = k2 = 5 and architecture D with k = 5. Streaming is the paper's of these figures: L2, Setting B,
alpha = (.7, .3), beta = (.7, 0, .3) unless a name says otherwise, at 32 S/B x 2 B/U; the others at 64 x 1. Errors in
training are those of the samples as they are trained on, in training mode. A stopped study goes on with the same
command.
"""

from __future__ import annotations

from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import keep, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Records, carry_out
from streamnorm.lab.studies.unrolled.claims import CLAIMS
from streamnorm.lab.studies.unrolled.figures import picture
from streamnorm.lab.studies.unrolled.runs import FIGURES, TIERS, examine, runs


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and a table for each figure; beside it ``results.json`` and
    ``curves.png``."""
    keep(records, out, title)
    figures = {figure: {name: records[name] for name in names} for figure, names in FIGURES.items()}
    checkpoint.write(out / "curves.png", picture(figures))
    lines = [*opening(records["C streaming"][0], title), *verdicts(records, CLAIMS), ""]
    for figure, named in figures.items():
        lines += [f"## {figure}", "", summary(named)]
    return page([*lines, "![Curves](curves.png)", ""], out)


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "unrolled", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.train_limit, test_limit=tier.test_limit)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out)
    examine(records, data, out)
    return write_results(records, out, f"Unrolled networks: {data.name}, tier {arguments.tier}")
