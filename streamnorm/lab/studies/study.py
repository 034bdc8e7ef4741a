"""What every experiment is made of: named runs with paired seeds, and claims that are checked on their records.

Imports the training room. A study trains what is not finished yet and goes on where it was stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import CHECKPOINT, run_to_end
from streamnorm.lab.runs.underway import description

Record = dict[str, Any]
Records = Mapping[str, Sequence[Record]]
"""For each name the records of its seeds, in the order of the seeds."""
CHANCE = 0.9
"""The error of guessing one of ten classes."""

Verdict = Literal["reproduced", "partly", "contradicted", "reported"]
"""``reported`` is for what the paper makes no claim about."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and how it is checked.

    Attributes:
        id: as in ``docs/results``.
        text: the claim, in our words, with its place in the paper.
        check: the verdict and the figures it stands on, from the records.
        needs: the runs that the check looks at, where a study has sizes without them.
    """

    id: str
    text: str
    check: Callable[[Records], tuple[Verdict, str]]
    needs: tuple[str, ...] = ()


Make = Callable[[Any, Data], Trainer]
"""What makes the trainer of a run."""


def carry_out(
    runs: Mapping[str, Run],
    seeds: Sequence[int],
    data: Data,
    out: Path,
    say: Callable[[str], None] = print,
    make: Make = Trainer,
) -> dict[str, list[Record]]:
    """Train every run with every seed, seed by seed so that a stopped study has whole pairs."""
    records: dict[str, list[Record]] = {name: [] for name in runs}
    for seed in seeds:
        for name, run in runs.items():
            records[name].append({**trained(run, name, seed, data, out, say, make).record(), "label": name})
    return records


def trained(
    run: Run,
    name: str,
    seed: int,
    data: Data,
    out: Path,
    say: Callable[[str], None] = print,
    make: Make = Trainer,
) -> Trainer:
    """A run with a seed at its end: trained anew, gone on with, or as its folder holds it."""
    run = replace(run, seed=seed)
    trainer = make(run, data)
    run_to_end(trainer, folder_of(out, name, seed), description(run, data), None)
    error = f"test error {trainer.metrics[-1]['test_error']:.4f}" if trainer.metrics else ""
    say(f"{name}, seed {seed}: {trainer.failed or error}")
    return trainer


def reopened(record: Record, data: Data, out: Path) -> Trainer:
    """The trained run of a record of ``carry_out``."""
    trainer = Trainer(Run.from_json(record["run"]), data)
    trainer.restore(checkpoint.load(folder_of(out, record["label"], record["seed"]) / CHECKPOINT))
    return trainer


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where ``carry_out`` keeps a run."""
    return out / name.replace(" ", "-") / f"seed{seed}"


def whole(records: Iterable[Any]) -> list[Any]:
    """Those that trained to their end."""
    return [record for record in records if record["metrics"] and not record["failed"]]


def number(figure: float | None) -> float:
    """A figure of a record; one that was not finite is kept as None and is larger than any other."""
    return math.inf if figure is None else figure


def final(records: Records, name: str, key: str = "test_error") -> list[float]:
    """The last epoch's ``key`` of each seed; a run that failed counts as nan."""
    return [number(r["metrics"][-1][key]) if r["metrics"] and not r["failed"] else math.nan for r in records[name]]


def end_errors(records: Records, name: str) -> list[float]:
    """The last test error of each seed; a run that failed is at chance."""
    return [CHANCE if math.isnan(error) else error for error in final(records, name)]


def lowest(records: Records, name: str, key: str = "test_error") -> list[float]:
    """The lowest ``key`` of each seed; nan for a run that failed."""
    return [
        min(number(line[key]) for line in r["metrics"]) if r["metrics"] and not r["failed"] else math.nan
        for r in records[name]
    ]


def below(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How far a lies below b, seed by seed.

    >>> below([1.0, 2.0], [3.0, 1.0])
    [2.0, -1.0]
    """
    return [y - x for x, y in zip(a, b, strict=True)]


def unrest(curve: Sequence[float]) -> float:
    """The standard deviation of a curve's steps; nan of fewer than two steps.

    >>> unrest([4.0, 3.0, 2.0, 1.0])
    0.0
    """
    steps = [b - a for a, b in pairwise(curve)]
    return deviation(steps) if len(steps) > 1 else math.nan


def mean(values: Sequence[float]) -> float:
    """Over seeds."""
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> str:
    """``mean ± sd`` over seeds; how many could not train or were not finite, if any."""
    lost, endless = sum(map(math.isnan, values)), sum(map(math.isinf, values))
    if lost or endless:
        said = [f"{lost} of {len(values)} seeds could not train"] * bool(lost)
        return ", ".join(said + [f"{endless} of {len(values)} seeds not finite"] * bool(endless))
    return f"{mean(values):.4f} ± {deviation(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation over seeds; 0 of a single one, nan if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_failures(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """A name for a picture or a table, and how many of its seeds failed.

    >>> with_failures("none", [{"failed": None}, {"failed": "diverged"}])
    'none (1 of 2 seeds failed)'
    """
    lost = sum(bool(record["failed"]) for record in records)
    return name + (f" ({lost} of {len(records)} seeds failed)" if lost else "")


def judge(differences: Sequence[float], margin: float, sign_alone_is_partly: bool = True) -> Verdict:
    """``reproduced`` if the mean of the paired differences and two thirds of the seeds reach ``margin``; ``partly`` if
    only the sign is right."""
    enough = sum(d >= margin for d in differences) >= 2 / 3 * len(differences)
    if mean(differences) >= margin and enough:
        return "reproduced"
    return "partly" if sign_alone_is_partly and mean(differences) > 0 else "contradicted"


def alike(differences: Sequence[float], margin: float) -> Verdict:
    """``reproduced`` if the mean of the paired differences and two thirds of the seeds stay within ``margin``."""
    near = sum(abs(d) <= margin for d in differences) >= 2 / 3 * len(differences)
    return "reproduced" if abs(mean(differences)) <= margin and near else "contradicted"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim with several parts."""
    if set(verdicts) == {"reproduced"}:
        return "reproduced"
    return "contradicted" if set(verdicts) == {"contradicted"} else "partly"


def first_at(curve: Iterable[tuple[float, float]], level: float) -> float:
    """Where a curve of points (x, y) first comes down to ``level``, between points by a straight line; inf if never.

    >>> first_at([(100, 3.0), (200, 2.0), (300, 1.0)], 1.5)
    250.0
    """
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= level:
            if before is None or before[1] in (y, math.inf):
                return x
            return before[0] + (x - before[0]) * (before[1] - level) / (before[1] - y)
        before = x, y
    return math.inf
