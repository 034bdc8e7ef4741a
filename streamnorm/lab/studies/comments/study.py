"""Two comments on batch normalization, by BorisG below "Batch Normalization: Warm-Up" (seed 003).

    streamnorm reproduce comments --data-root DATA --tier reduced

The first: normalization and "scale and shift" are two techniques, and right before a convolution one does without the
second. Architecture B as in ``convolutional``, in four arrangements. The second: going back, the gradient is divided by
the deviation, and the loss is curved otherwise so that it over-fits less. Architecture A with batch normalization and
without, mini-batches of 64, at two learning rates that both bear; its curvature is that of the loss of one batch of
training data, normalized by its own statistics. A stopped study goes on with the same command.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.comments.arrangement import AFTER, ARRANGEMENTS
from streamnorm.lab.studies.comments.claims import CLAIMS
from streamnorm.lab.studies.comments.figures import picture
from streamnorm.lab.studies.comments.runs import TIERS, runs, trainer_of
from streamnorm.lab.studies.record import keep, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Records, carry_out


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the tables; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    arranged = {name: records[name] for name in ARRANGEMENTS}
    curved = {name: seeds for name, seeds in records.items() if name not in ARRANGEMENTS}
    checkpoint.write(out / "curves.png", picture(arranged, curved))
    lines = [*opening(records[AFTER][0], title), *verdicts(records, CLAIMS)]
    for architecture, part in (("B", arranged), ("A", curved)):
        lines += ["", f"Architecture {architecture}:", "", summary(part)]
    return page([*lines, "", "![Curves](curves.png)", ""], out)


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "comments", TIERS)
    named = runs(tier)
    first = named[AFTER]
    data = load(first.data, arguments.data_root, train_limit=first.train_limit, test_limit=first.test_limit)
    records = carry_out(named, arguments.seeds_or(), data, out, make=partial(trainer_of, tier=tier))
    return write_results(records, out, f"Two comments on batch normalization: {data.name}, tier {arguments.tier}")
