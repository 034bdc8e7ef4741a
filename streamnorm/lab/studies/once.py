"""Runs of networks and language models that are done once, whatever study asks for them, each kept as a record by what
it computes. Imports the training room.

A study names its runs; the file of a record is named after the run itself, so two names or two studies that ask for the
same run share one training. A study that is stopped loses the run under way alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import train
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.language.data import Text, load_text
from streamnorm.lab.runs.language.loop import train_text
from streamnorm.lab.runs.language.run import TextRun
from streamnorm.lab.runs.underway import differences
from streamnorm.lab.studies.study import Record, final
from streamnorm.reading import ReadError, parsed

AnyRun = Run | TextRun
RECORDS = "records"
SHAPE = {
    **dict.fromkeys(("data", "source"), str),
    "seed": int,
    "run": {str: object},
    "versions": {str: str},
    "machine": {str: (str, int)},
    "metrics": [{str: object}, ...],
    "failed": (str, None),
}
"""Of a record."""


def folder_of(out: Path) -> Path:
    """Where records are kept that studies share: beside the folder of a study."""
    return out.parent / RECORDS


def path_of(run: AnyRun, folder: Path) -> Path:
    """The file of a run's record.

    >>> path_of(Run(arm="layer"), Path("records")).name
    'layer-26aecf58595e.json'
    """
    said = json.dumps([type(run).__name__, run.to_json()], sort_keys=True)
    return folder / f"{run.arm}-{hashlib.sha256(said.encode()).hexdigest()[:12]}.json"


def kept(run: AnyRun, folder: Path) -> Record | None:
    """The record of a run that is done.

    Raises:
        ReadError: if its file holds another run, or none.
    """
    path = path_of(run, folder)
    if not path.exists():
        return None
    record, wrong = parsed(path.read_bytes(), SHAPE)
    wrong = wrong or differences({**type(run).defaults(), **record["run"]}, run.to_json())
    if wrong:
        raise ReadError(f"{path} does not hold the run of its name; delete it to do that run again ({wrong})")
    return record


def carry_out_once(
    runs: Mapping[str, AnyRun],
    seeds: Sequence[int],
    data_root: Path | None,
    folder: Path,
    say: Callable[[str], None] = print,
) -> dict[str, list[Record]]:
    """Train every run with every seed that no record holds, seed by seed so that a stopped study has whole pairs.

    Returns:
        For each name the records of its seeds, in their order.
    """
    records: dict[str, list[Record]] = {name: [] for name in runs}
    for seed in seeds:
        for name, unseeded in runs.items():
            run = replace(unseeded, seed=seed)
            record = kept(run, folder)
            if record is None:
                record = finite(_trained(run, data_root))
                checkpoint.write(path_of(run, folder), json.dumps(record, allow_nan=False) + "\n")
                say(f"{name}, seed {seed}: {_told(record)}")
            records[name].append({**record, "label": name})
    return records


def recorded(runs: Mapping[str, AnyRun], seeds: Sequence[int], folder: Path) -> dict[str, list[Record]]:
    """``carry_out_once`` without training: of each name the records of the seeds that are there, in their order."""
    found = {name: [kept(replace(run, seed=seed), folder) for seed in seeds] for name, run in runs.items()}
    return {name: [{**r, "label": name} for r in of if r is not None] for name, of in found.items()}


def seeded(runs: Mapping[str, AnyRun], seeds: Sequence[int]) -> list[AnyRun]:
    """Every run with every seed, each once, however many names it has."""
    return list(dict.fromkeys(replace(run, seed=seed) for seed in seeds for run in runs.values()))


def missing(runs: Mapping[str, AnyRun], seeds: Sequence[int], folder: Path) -> list[AnyRun]:
    """The runs that no record holds, each once."""
    return [run for run in seeded(runs, seeds) if not path_of(run, folder).exists()]


def _told(record: Record) -> str:
    key = "validation_loss" if "validation_loss" in (record["metrics"] or [{}])[-1] else "test_error"
    return record["failed"] or f"{key.replace('_', ' ')} {final({'': [record]}, '', key)[0]:.4f}"


def _trained(run: AnyRun, data_root: Path | None) -> dict[str, Any]:
    if isinstance(run, TextRun):
        return train_text(run, _text(run.data, data_root, run.limit))
    return train(run, _data(run.data, data_root, run.train_limit, run.test_limit))


@lru_cache(maxsize=4)
def _data(name: str, data_root: Path | None, train_limit: int | None, test_limit: int | None) -> Data:
    return load(name, data_root, train_limit=train_limit, test_limit=test_limit)


@lru_cache(maxsize=1)
def _text(name: str, data_root: Path | None, limit: int | None) -> Text:
    return load_text(name, data_root, limit=limit)
