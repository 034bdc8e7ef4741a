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
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.underway import differences
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.sidebyside import side_by_side
from streamnorm.lab.studies.smallbatch.figures import picture
from streamnorm.lab.studies.study import (
    CHANCE,
    Claim,
    Record,
    Records,
    Verdict,
    below,
    mean,
    spread,
    together,
    with_failures,
)
from streamnorm.reading import ReadError, parsed
from streamnorm.train.dau import vectorized

UPDATE = {"A": 64, "B": 32}
"""Samples of a weight update."""
PER_BATCH = (1, 2, 4, 8, 32)
BY_SAMPLE = ("group", "instance", "layer")
"""Arms to which a mini-batch does not matter; they are run with an update in one."""
BY_BATCH = ("batch", "batchrenorm", "onlinenorm", "paper", "default")
IN_TRAINING = 1024
"""Test samples that are looked at in training mode."""
SHORT, STABLE = "short ", "many seeds: "


@dataclass(frozen=True)
class Tier:
    """The size of a study.

    Attributes:
        whole: what it changes in the runs that claims stand on.
        short: and in those of all batch sizes; None: they are as the others.
        many: in those that look for a seed that diverges, and how many seeds that is.
        seeds: of every other run, unless others are asked for.
    """

    whole: dict[str, dict[str, Any]]
    short: dict[str, dict[str, Any]] | None
    many: dict[str, dict[str, Any]]
    many_seeds: int = 20
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


_TINY = {"data": "digits", "epochs": 1, "train_limit": 128, "test_limit": 64}
_WHOLE: dict[str, dict[str, Any]] = {
    "A": {"data": "cifar10", "width": 256, "epochs": 4},
    "B": {"data": "cifar10", "width": 16, "epochs": 5, "train_limit": 10_000},
}
_MANY: dict[str, dict[str, Any]] = {
    "A": {"data": "cifar10", "width": 256, "epochs": 1, "train_limit": 4000, "test_limit": 1000},
    "B": {"data": "cifar10", "width": 16, "epochs": 1, "train_limit": 1500, "test_limit": 1000},
}
TIERS = {
    "smoke": Tier(
        whole={"A": {**_TINY, "width": 16}, "B": {**_TINY, "width": 8}},
        short=None,
        many={"A": {**_TINY, "width": 16}, "B": {**_TINY, "width": 8}},
        many_seeds=2,
        seeds=(0,),
    ),
    "reduced": Tier(
        whole={"A": {**_WHOLE["A"], "train_limit": 25_000}, "B": {**_WHOLE["B"], "test_limit": 5000}},
        short={
            "A": {**_WHOLE["A"], "epochs": 2, "train_limit": 8000, "test_limit": 2000},
            "B": {**_WHOLE["B"], "width": 8, "epochs": 2, "train_limit": 2000, "test_limit": 2000},
        },
        many=_MANY,
    ),
    "full": Tier(whole=_WHOLE, short=None, many=_MANY),
}


def name_of(architecture: str, arm: str, m: int) -> str:
    """What a run is called.

    >>> name_of("A", "default", 1)
    'A default 1 x 64'
    """
    return f"{architecture} {arm} {m} x {UPDATE[architecture] // m}"


KEYS = {
    "A": (("batch", 64), ("layer", 64), ("default", 1)),
    "B": (("batch", 32), ("group", 32), ("default", 1)),
}
"""The arms and samples a batch that claims stand on."""


def grid(architecture: str) -> list[tuple[str, int]]:
    """Every arm with every number of samples a batch that it can train with."""
    update = UPDATE[architecture]
    arms = [arm for arm in BY_SAMPLE if (architecture, arm) != ("A", "instance")]  # without a map it sees one number
    alone = [(arm, update) for arm in arms]
    sizes = [m for m in (*PER_BATCH, update) if m <= update]
    cut = [(arm, m) for arm in BY_BATCH for m in dict.fromkeys(sizes) if (arm, m) != ("batch", 1)]
    return alone + [(arm, m) for arm, m in cut if m in PER_BATCH or arm == "batch"]


def runs(tier: Tier) -> dict[str, Run]:
    """Every run of the study by name, those that look for divergence left out."""
    named: dict[str, Run] = {}
    for architecture in UPDATE:
        keys = [(name_of(architecture, *key), key) for key in KEYS[architecture]]
        all_ = [(name_of(architecture, *key), key) for key in grid(architecture)]
        for name, key in keys if tier.short else keys + all_:
            named[name] = _run(architecture, *key, tier.whole[architecture])
        if tier.short:
            named |= {SHORT + name: _run(architecture, *key, tier.short[architecture]) for name, key in all_}
    return named


def many_seeds(tier: Tier) -> dict[str, Run]:
    """The default, one sample a batch, for one short epoch."""
    return {STABLE + name_of(letter, "default", 1): _run(letter, "default", 1, tier.many[letter]) for letter in UPDATE}


def _run(architecture: str, arm: str, m: int, size: dict[str, Any]) -> Run:
    n = UPDATE[architecture] // m
    run = Run(architecture=architecture, arm=arm, samples_per_batch=m, batches_per_update=n)  # type: ignore[arg-type]
    return replace(run, **size)


# --- Training


@torch.no_grad()
def error_in_training_mode(model: nn.Module, x: Tensor, y: Tensor, m: int, n: int) -> float:
    """The error where test data are normalized by the mini-batch rule: each n mini-batches of m by a copy of the model,
    so that nothing is kept. What does not fill the last n is left out."""
    wrong = count = 0
    for few, labels in zip(x.split(m * n), y.split(m * n), strict=True):
        if len(few) == m * n:
            copy = deepcopy(model).train()
            with vectorized(copy, n):
                wrong += int((copy(few).argmax(1) != labels).sum())
            count += m * n
    return wrong / count if count else math.nan


def trained(run: Run, data: Data) -> Record:
    """The record of a run, with its error in training mode."""
    trainer = Trainer(run, data)
    while not trainer.finished:
        trainer.step()
    error = CHANCE
    if not trainer.failed:
        x, y = data.test_x[:IN_TRAINING], data.test_y[:IN_TRAINING]
        error = error_in_training_mode(trainer.model, x, y, run.samples_per_batch, run.batches_per_update)
    return {**trainer.record(), "training_mode_error": error}


@lru_cache(maxsize=2)
def _data(name: str, data_root: Path | None, train_limit: int | None, test_limit: int | None) -> Data:
    return load(name, data_root, train_limit=train_limit, test_limit=test_limit)


Job = tuple[str, Run, Path | None, Path]


def path_of(name: str, run: Run, out: Path) -> Path:
    """Where the record of a run is kept."""
    return out / "runs" / name.replace(": ", "/").replace(" ", "-") / f"seed{run.seed}.json"


SHAPE = {
    **dict.fromkeys(("label", "arm", "data", "source"), str),
    "seed": int,
    "run": {str: object},
    "versions": {str: str},
    "machine": {str: (str, int)},
    "metrics": [Trainer.LINE, ...],
    "failed": (str, None),
    "training_mode_error": (float, None),
}
"""Of a record."""


def kept(name: str, run: Run, out: Path) -> Record | None:
    """The record of a run that is done.

    Raises:
        ReadError: if its file holds another run, or none.
    """
    path = path_of(name, run, out)
    if not path.exists():
        return None
    record, wrong = parsed(path.read_bytes(), SHAPE)
    if not wrong:
        wrong = differences({**Run.defaults(), **record["run"]}, run.to_json())
    if wrong:
        raise ReadError(
            f"{path} does not hold the run {name}, seed {run.seed} ({wrong}); delete it to do that run again"
        )
    return record


def _do(job: Job) -> Record:
    name, run, data_root, out = job
    record = {**trained(run, _data(run.data, data_root, run.train_limit, run.test_limit)), "label": name}
    checkpoint.write(path_of(name, run, out), json.dumps(finite(record)) + "\n")
    return record


def carry_out(jobs: Sequence[Job], processes: int = 1, threads: int | None = None) -> dict[str, list[Record]]:
    """Do every run that is not kept; for each name the records of its seeds, in their order."""
    missing = [job for job in jobs if kept(job[0], job[1], job[3]) is None]
    for i, record in enumerate(side_by_side(_do, missing, processes, threads), 1):
        error = f"test error {record['metrics'][-1]['test_error']:.4f}" if record["metrics"] else ""
        print(f"{i} of {len(missing)}: {record['label']}, seed {record['seed']}: {record['failed'] or error}")
    records: dict[str, list[Record]] = {}
    for name, run, _, out in jobs:
        record = kept(name, run, out)
        assert record is not None
        records.setdefault(name, []).append(record)
    return records


# --- Claims


def errors(records: Records, name: str) -> list[float]:
    """In testing mode after the last epoch, of each seed; that of guessing where a run failed."""
    return [CHANCE if r["failed"] or not r["metrics"] else r["metrics"][-1]["test_error"] for r in records[name]]


def in_training(records: Records, name: str) -> list[float]:
    """In training mode, of each seed."""
    return [CHANCE if r["training_mode_error"] is None else r["training_mode_error"] for r in records[name]]


def at_least(differences: Sequence[float], margin: float) -> Verdict:
    """Of the mean of paired differences."""
    return "reproduced" if mean(differences) >= margin else "contradicted"


def _fully_connected(records: Records) -> tuple[Verdict, str]:
    own, batch, layer = (errors(records, f"A {name}") for name in ("default 1 x 64", "batch 64 x 1", "layer 64 x 1"))
    verdict = together([at_least(below(own, batch), -0.003), at_least(below(own, layer), 0)])
    return (
        verdict,
        f"default {spread(own)}, below batch by {spread(below(own, batch))}, layer by {spread(below(own, layer))}",
    )


def _convolutional(records: Records) -> tuple[Verdict, str]:
    own, batch, group = (errors(records, f"B {name}") for name in ("default 1 x 32", "batch 32 x 1", "group 32 x 1"))
    verdict = together([at_least(below(own, batch), -0.015), at_least(below(own, group), 0.08)])
    return (
        verdict,
        f"default {spread(own)}, below batch by {spread(below(own, batch))}, group by {spread(below(own, group))}",
    )


def failed(records: Sequence[Record]) -> int:
    """How many could not train to their end."""
    return sum(bool(record["failed"]) for record in records)


def _nothing_diverges(records: Records) -> tuple[Verdict, str]:
    own = {name: runs for name, runs in records.items() if runs[0]["arm"] == "default"}
    many = [f"{n.removeprefix(STABLE)} {failed(r)} of {len(r)} seeds" for n, r in own.items() if n.startswith(STABLE)]
    lost = sum(map(failed, own.values()))
    others = {n: failed(r) for n, r in records.items() if n not in own and failed(r)}
    figures = [*many, f"of all runs of the default {lost} of {sum(map(len, own.values()))}"]
    figures += [f"{name} {count}" for name, count in others.items()]
    return ("contradicted" if lost else "reproduced"), ", ".join(figures)


def _modes(records: Records) -> tuple[Verdict, str]:
    prefix = SHORT if any(name.startswith(SHORT) for name in records) else ""
    told = []
    for architecture in UPDATE:
        for arm in BY_BATCH:
            name = name_of(architecture, arm, 2)
            if prefix + name in records:
                gap = below(in_training(records, prefix + name), errors(records, prefix + name))
                told.append(f"{name}: {spread(gap)}")
    return "reported", "error in testing mode less that in training mode, " + "; ".join(told)


CLAIMS = [
    Claim("SB-1", "A at 1 x 64: the default is within 0.3 points of batch at 64 and below layer.", _fully_connected),
    Claim("SB-2", "B at 1 x 32: it is within 1.5 points of batch at 32 and 8 points below group.", _convolutional),
    Claim("SB-3", "It never diverges, in many seeds at rate 0.1 either.", _nothing_diverges),
    Claim("SB-4", "How far testing is from training at 2 samples a batch.", _modes),
]


# --- The record


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
        beside = errors(records, prefix + name_of(own[0]["run"]["architecture"], "default", 1))
        apart = below(beside, errors(records, name))
        figures = [spread(errors(records, name)), spread(in_training(records, name)), spread(apart)]
        lines.append(f"| {with_failures(name, own)} | {len(own)} | {' | '.join(figures)} |")
    return lines


def write_results(records: Records, tier: Tier, out: Path, title: str) -> Path:
    """``results.md`` with verdicts and the table; beside it ``results.json`` and ``curves.png``."""
    checkpoint.write(out / "results.json", json.dumps({"title": title, "records": records}) + "\n")
    prefix = SHORT if tier.short else ""
    shown: dict[str, dict[str, dict[int, tuple[list[float], list[float]]]]] = {}
    for letter in UPDATE:
        for arm, m in grid(letter):
            name = prefix + name_of(letter, arm, m)
            shown.setdefault(letter, {}).setdefault(arm, {})[m] = errors(records, name), in_training(records, name)
    checkpoint.write(out / "curves.png", picture(shown, BY_SAMPLE, PER_BATCH))
    sizes = [("the runs of claims", tier.whole), ("short runs", tier.short), ("runs of many seeds", tier.many)]
    said = "; ".join(f"{what}: {json.dumps(size)}" for what, size in sizes if size)
    lines = [*opening(next(iter(records.values()))[0], title), f"Sizes. {said}.", ""]
    lines += [f"A run that failed counts as an error of {CHANCE}. Means ± sd over seeds.", ""]
    lines += [*verdicts(records, CLAIMS), "", *table(records), "", "![Errors](curves.png)", ""]
    checkpoint.write(out / "results.md", "\n".join(lines))
    return out / "results.md"


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
