"""The runs of the study ``smallbatch``: each one kept as a file with its errors in both modes."""

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
from streamnorm.lab.studies.sidebyside import each_once
from streamnorm.lab.studies.study import CHANCE, Record
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
            f"{path} does not hold the run {name}, seed {run.seed}; delete it to do that run again ({wrong})"
        )
    return record


def _do(job: Job) -> Record:
    name, run, data_root, out = job
    record = {**trained(run, _data(run.data, data_root, run.train_limit, run.test_limit)), "label": name}
    checkpoint.write(path_of(name, run, out), json.dumps(finite(record)) + "\n")
    return record


def carry_out(jobs: Sequence[Job], processes: int = 1, threads: int | None = None) -> dict[str, list[Record]]:
    """Do every run that is not kept; for each name the records of its seeds, in their order."""

    def told(record: Record) -> str:
        error = f"test error {record['metrics'][-1]['test_error']:.4f}" if record["metrics"] else ""
        return record["failed"] or error

    return each_once(_do, jobs, lambda job: kept(job[0], job[1], job[3]), told, processes, threads)
