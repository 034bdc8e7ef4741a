"""Testing with the last mini-batch's statistics, or with a running average (paper, section 3.3.3).

    streamnorm reproduce specialcase --data-root DATA

With n = 1, alpha = (0, 1) and beta = (0, 0, 1) streaming trains as batch normalization does, and its estimate for
testing is the last mini-batch's. Architecture B as in ``convolutional``: 10,000 images of CIFAR-10, here 3 epochs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.architecture_b import BASE, TIERS
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import write_results
from streamnorm.lab.studies.specialcase.claims import CLAIMS
from streamnorm.lab.studies.specialcase.runs import RUNS
from streamnorm.lab.studies.study import carry_out


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claim, write the report."""
    size, out = begin(arguments, "specialcase", TIERS)
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out({name: replace(run, **size) for name, run in RUNS.items()}, arguments.seeds_or(), data, out)
    title = f"The special case of section 3.3.3: {data.name}, architecture B, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title)
