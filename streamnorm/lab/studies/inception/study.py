"""A small Inception network on CIFAR-10: learning rates, logistic units, an ensemble; after the talk of Ioffe (2015).

    streamnorm reproduce inception --data-root DATA --tier reduced

The talk's network was trained on ImageNet; ours is ``streamnorm/lab/runs/classifier/inception.py``, at 32 samples an
update as theirs, streaming too. The learning rate x1 is the best of 0.003, 0.01, 0.03 and 0.1 for the network without
normalization. Its last test errors in the reduced tier were 0.570, 0.507, 0.507 and 0.571 with seed 100;
with seed 101, 0.01 came to 0.493 and 0.03 to 0.515. Neither is a seed of the study. We chose: momentum 0.9, a tenth of
the rate in the last sixth of the updates, no weight decay, first weights of deviation ``sqrt(2 / inputs)``, also before
sigmoids. ``none`` has a gain and a bias where the others normalize before them. Members of an ensemble differ in their
first weights and the order of their data. A stopped study goes on with the same command.
"""

from __future__ import annotations

from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.inception.claims import CLAIMS
from streamnorm.lab.studies.inception.figures import picture
from streamnorm.lab.studies.inception.runs import ENSEMBLE, MEMBER, TIERS, carry_out, named
from streamnorm.lab.studies.record import keep, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Records


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the tables; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    single = {name: seeds for name, seeds in records.items() if name not in (MEMBER, ENSEMBLE)}
    checkpoint.write(out / "curves.png", picture(single, records[ENSEMBLE]))
    lines = [*opening(records[named("none", 1)][0], title), *verdicts(records, CLAIMS), ""]
    lines += [summary(single)]
    lines += ["The members of ensembles:", "", summary({MEMBER: records[MEMBER]}), "![Curves](curves.png)", ""]
    return page(lines, out)


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "inception", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.train_limit, test_limit=tier.test_limit)
    records = carry_out(tier, arguments.seeds_or(), data, out)
    return write_results(records, out, f"Inception: {data.name}, tier {arguments.tier}")
