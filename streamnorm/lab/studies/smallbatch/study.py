"""Training and testing with 1 to 32 samples a batch, and what to normalize with.

    streamnorm reproduce smallbatch --data-root DATA

Architecture A (three layers of 256, 64 samples an update, 4 epochs of CIFAR-10) and B (convolutional, width 16, 32
samples an update, 5 epochs of its first 10,000 images), rate .1, momentum .9; the samples of an update are cut into
mini-batches of 1, 2, 4, 8 or 32. In the tier reduced the runs that claims stand on have these sizes, and those of all
batch sizes, whose names begin with "short", smaller ones.

Testing mode is ``model.eval()``. In training mode the test set is normalized by the rule of mini-batches, an update's
worth at a time, each from what the model remembered at the end of its training.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import keep, opening, page, verdicts
from streamnorm.lab.studies.smallbatch.claims import CLAIMS, in_training
from streamnorm.lab.studies.smallbatch.figures import picture
from streamnorm.lab.studies.smallbatch.runs import (
    BY_SAMPLE,
    PER_BATCH,
    SHORT,
    STABLE,
    TIERS,
    UPDATE,
    Tier,
    carry_out,
    grid,
    many_seeds,
    name_of,
    runs,
)
from streamnorm.lab.studies.study import CHANCE, Records, below, end_errors, spread, with_failures


def table(records: Records) -> list[str]:
    """A line for each name: errors in both modes and the paired difference to the default at one sample a batch."""
    lines = [
        "| run | seeds | testing mode | training mode | beyond the default at 1, testing mode |",
        "|---|---|---|---|---|",
    ]
    for name, own in records.items():
        if name.startswith(STABLE):
            continue
        prefix = SHORT if name.startswith(SHORT) else ""
        beside = end_errors(records, prefix + name_of(own[0]["run"]["architecture"], "default", 1))
        apart = below(beside, end_errors(records, name))
        figures = [spread(end_errors(records, name)), spread(in_training(records, name)), spread(apart)]
        lines.append(f"| {with_failures(name, own)} | {len(own)} | {' | '.join(figures)} |")
    return lines


def write_results(records: Records, tier: Tier, out: Path, title: str) -> Path:
    """``results.md`` with verdicts and the table; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    prefix = SHORT if tier.short else ""
    shown: dict[str, dict[str, dict[int, tuple[list[float], list[float]]]]] = {}
    for letter in UPDATE:
        for arm, m in grid(letter):
            name = prefix + name_of(letter, arm, m)
            shown.setdefault(letter, {}).setdefault(arm, {})[m] = end_errors(records, name), in_training(records, name)
    checkpoint.write(out / "curves.png", picture(shown, BY_SAMPLE, PER_BATCH))
    sizes = [("the runs of claims", tier.whole), ("short runs", tier.short), ("runs of many seeds", tier.many)]
    said = "; ".join(f"{what}: {json.dumps(size)}" for what, size in sizes if size)
    lines = [*opening(next(iter(records.values()))[0], title), f"Sizes. {said}.", ""]
    lines += [f"A run that failed counts as an error of {CHANCE}. Means ± sd over seeds.", ""]
    lines += [*verdicts(records, CLAIMS), "", *table(records), "", "![Errors](curves.png)", ""]
    return page(lines, out)


def main(arguments: Arguments) -> Path:
    """Do what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "smallbatch", TIERS, side_by_side=True)
    seeds = arguments.seeds_or(tier.seeds)
    wanted = [(name, replace(run, seed=seed)) for name, run in runs(tier).items() for seed in seeds]
    wanted += [(n, replace(run, seed=seed)) for n, run in many_seeds(tier).items() for seed in range(tier.many_seeds)]
    wanted.sort(key=lambda pair: (pair[1].architecture, pair[1].train_limit or 0))  # data of one size after another
    jobs = [(name, run, arguments.data_root, out) for name, run in wanted]
    done = carry_out(jobs, arguments.processes, arguments.threads)
    records = {name: done[name] for name in (*runs(tier), *many_seeds(tier))}
    return write_results(records, tier, out, f"Small batches, tier {arguments.tier}")
