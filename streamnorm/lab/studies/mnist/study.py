"""Sigmoid units on MNIST with and without normalization, after the talk on batch normalization (Ioffe 2015).

    streamnorm reproduce mnist --data-root DATA --tier reduced

3 x 100 sigmoid units, 60 samples an update. The talk and its paper leave open, and we chose: learning rate 0.1 (a tenth
of it in the last sixth), momentum 0.9, gray images of mean 0 and variance 1, weights from a Gaussian of deviation
``scale / sqrt(inputs)`` with ``scale`` 1 where a name says nothing else. The scale is that of the normalized layers;
the read-out keeps 1. ``none`` has a gain and a bias where the others normalize before them. A stopped study goes on
with the same command.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.mnist.claims import CLAIMS
from streamnorm.lab.studies.mnist.figures import picture
from streamnorm.lab.studies.mnist.runs import NAIVE, SCALES, TIERS, SigmoidTrainer, runs, scaled
from streamnorm.lab.studies.record import keep, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Records, carry_out, end_errors


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    by_scale = {arm: {s: end_errors(records, scaled(arm, s)) for s in SCALES} for arm in ("none", "batch", "streaming")}
    checkpoint.write(out / "curves.png", picture(records, by_scale, NAIVE))
    lines = [*opening(records["none"][0], title), *verdicts(records, CLAIMS), ""]
    lines += [summary(records), "", "![Curves](curves.png)", ""]
    return page(lines, out)


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "mnist", TIERS)
    data = load(tier.data, arguments.data_root)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out, make=partial(SigmoidTrainer, every=tier.every))
    return write_results(records, out, f"Sigmoid units: {data.name}, tier {arguments.tier}")
