"""Normalizations of a feed-forward convolutional network (paper, section 7.4: the arms of Figure 6 without windows).

    streamnorm reproduce convolutional --data-root DATA --out runs/convolutional

The first 10,000 images of CIFAR-10, architecture B with 16, then 32 features, 32 samples an update, 5 epochs.
"Figure 6" is streaming with the paper's values there: L2, Setting A, alpha = beta = (.5, .5).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.architecture_b import BASE, TIERS
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.convolutional.claims import CLAIMS
from streamnorm.lab.studies.convolutional.runs import RUNS
from streamnorm.lab.studies.record import write_results
from streamnorm.lab.studies.study import carry_out


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the report."""
    size, out = begin(arguments, "convolutional", TIERS)
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out({name: replace(run, **size) for name, run in RUNS.items()}, arguments.seeds_or(), data, out)
    title = f"Convolutional network: {data.name}, architecture B, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title)
