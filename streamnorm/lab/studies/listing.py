"""What is recorded of every study, what is missing, and how long that takes. Never trains."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import streamnorm
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.once import AnyRun, folder_of, kept, missing, seeded
from streamnorm.lab.studies.registry import STUDIES
from streamnorm.lab.studies.study import Record

ONCE = ("moments", "references", "accumulation")
"""The studies whose runs are kept as records."""
RESULTS = Path(streamnorm.__file__).parents[1] / "docs" / "results"
"""The records of a source tree."""


def listed(arguments: Arguments, results: Path = RESULTS) -> list[str]:
    """A line for each study: its records in ``docs/results``, and what its folder holds at this tier."""
    wide = max(map(len, STUDIES))
    return [f"{name:{wide}}  {_recorded(name, results)}; {_here(name, arguments)}" for name in STUDIES]


def _recorded(name: str, results: Path) -> str:
    dates = sorted(path.name[:10] for path in results.glob(f"[0-9]*-{name}.md"))
    return f"recorded {', '.join(dates)}" if dates else "not recorded"


def _here(name: str, arguments: Arguments) -> str:
    folder = arguments.folder(name)
    if name not in ONCE:
        return _written(folder)
    module: Any = import_module(f"streamnorm.lab.studies.{name}.runs")
    runs = module.runs(module.TIERS[arguments.tier])
    seeds, records = arguments.seeds_or(), folder_of(folder)
    wanted = seeded(runs, seeds)
    left = missing(runs, seeds, records)
    done = [record for record in (kept(run, records) for run in wanted) if record is not None]
    said = f"{len(done)} of {len(wanted)} runs in {records}"
    if done:
        said += f", which took {_minutes(sum(map(seconds_of, done)))}"
    return said + (f"; {len(left)} missing: {_guess(left, done)}" if left else "")


def _written(folder: Path) -> str:
    path = folder / "results.json"
    if not path.exists():
        return f"{folder} is begun" if folder.exists() else f"nothing in {folder}"
    records = [record for of in json.loads(path.read_text())["records"].values() for record in of]
    timed = [record for record in records if isinstance(record, dict) and "metrics" in record]
    return f"{folder} holds its record" + (f", which took {_minutes(sum(map(seconds_of, timed)))}" if timed else "")


def seconds_of(record: Record) -> float:
    """How long a run trained: the sum over epochs of a network; a language model has a clock that goes on."""
    seconds = [line.get("seconds") or 0.0 for line in record["metrics"]]
    goes_on = bool(record["metrics"]) and "validation_loss" in record["metrics"][-1]
    return seconds[-1] if goes_on else math.fsum(seconds)


def _guess(left: Sequence[AnyRun], done: Iterable[Record]) -> str:
    """How long the missing runs take, if others of their kind say so."""
    by_kind: dict[str, list[float]] = {}
    for record in done:
        if not record["failed"]:
            by_kind.setdefault(_kind(record["run"]), []).append(seconds_of(record))
    kinds = [_kind(run.to_json()) for run in left]
    if not set(kinds) <= set(by_kind):
        return "how long they take is not known yet"
    return f"about {_minutes(sum(statistics.median(by_kind[kind]) for kind in kinds))}"


def _kind(run: dict[str, Any]) -> str:
    return f"{run.get('architecture') or run.get('arch')} {run.get('loops')}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
