"""Online learning and tiny mini-batches on a fully connected network (paper, section 7.3, Figures 4 and 5).

    streamnorm reproduce online --data-root DATA --out runs/online

CIFAR-10, architecture A (3 layers of 256), 64 samples an update unless a name says otherwise, 4 epochs in the place of
the paper's 30 (``--tier full``). The paper's Figure 5 uses L1 and Setting B with alpha = beta = (.7, .3).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.online.claims import CLAIMS
from streamnorm.lab.studies.online.runs import BASE, DEGENERATE, RUNS, TIERS, degenerate, own_sigma_of_one_sample
from streamnorm.lab.studies.record import write_results
from streamnorm.lab.studies.study import carry_out


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the report."""
    size, out = begin(arguments, "online", TIERS)
    runs = {name: replace(run, **size) for name, run in RUNS.items()}
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out(runs, arguments.seeds_or(), data, out)
    records[DEGENERATE] = degenerate(runs["streaming 1 x 64"], data, arguments.seeds_or())
    note = f"sigma of Setting A for one sample, without eps: {own_sigma_of_one_sample(data.train_x)}"
    title = f"Online learning: {data.name}, architecture A, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title, note)
