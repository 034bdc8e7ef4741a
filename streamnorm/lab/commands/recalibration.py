"""The commands about the statistics of testing: take them anew, tell how far off they are. Needs the extra ``cli``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from streamnorm.checks import expect_whole

if TYPE_CHECKING:
    from streamnorm.calibration.recalibrate import Progress
    from streamnorm.lab.runs.reopen import Reopened, Source


@dataclass(frozen=True)
class Recalibrate:
    """Take the statistics that testing uses anew from data, with the weights as they are, and keep the result.

    The run may be of a classifier, a language model or an auto-encoder. A language model reads the text as in testing:
    streams of 10 chunks of the trained length, each stream from a state of 0, or of one chunk if training did not carry
    the state."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made, or its checkpoint file."""
    estimator: Literal["pooled", "moving", "corrected"] = "pooled"
    """pooled: exactly those of all data. moving: a running average with decay 0.9 from mean 0 and sigma 1; corrected:
    the same without what the initial values weigh."""
    passes: int | None = None
    """Passes through the data at most; default: until every layer is exact, and 1 for running averages."""
    samples_per_batch: int = 64
    """Samples, documents or streams of text that go through the network at a time; what is pooled does not depend on
    it."""
    limit: int | None = None
    """Take so many training samples, documents or characters only, the first of them."""
    data: str | None = None
    """Training data to take them from; default: those of the run. An auto-encoder reads no others."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    out: Path | None = None
    """Folder of the result, which can be tested like any run. Default: FOLDER-recalibrated."""


@dataclass(frozen=True)
class Gap:
    """Tell how far the statistics that testing uses are from those of data, layer by layer; nothing is changed."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made, or its checkpoint file."""
    samples_per_batch: int = 64
    """Samples, documents or streams of text that go through the network at a time."""
    limit: int | None = None
    """Take so many training samples, documents or characters only, the first of them."""
    data: str | None = None
    """Training data to compare with; default: those of the run. An auto-encoder reads no others."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


def recalibrate_run(command: Recalibrate) -> None:
    """Recalibrate the network of a checkpoint; write it into a folder of its own and test it."""
    from streamnorm.lab.runs.lock import expect_folder, held

    folder = command.folder.parent if command.folder.is_file() else command.folder
    beside = folder if folder.name else folder.resolve()
    out = command.out or beside.with_name(f"{folder.resolve().name}-recalibrated")
    run, source = _opened(command)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} is the run itself, whose statistics would be lost; give another folder with --out")
    expect_folder(out)
    with held(out, f"recalibrating {run.label}"):
        before, after, passes, said = _recalibrated(run, source, command, out)
    print(
        f"{run.label}: statistics of {source.count} {source.unit} of {source.name}, {command.estimator}, {passes} "
        f"pass{'es' if passes > 1 else ''}; kept in {out}"
    )
    print(f"before  {before}\nafter   {after}")
    for warning in said:
        print(f"streamnorm: {warning.message}", file=sys.stderr)


def _recalibrated(
    run: Reopened, source: Source, command: Recalibrate, out: Path
) -> tuple[str, str, int, list[warnings.WarningMessage]]:
    """What the tests before and after say, how many passes it took, and what was warned of; the result is kept."""
    from streamnorm.calibration.recalibrate import recalibrate
    from streamnorm.lab.runs import checkpoint
    from streamnorm.lab.runs.keeping import CHECKPOINT
    from streamnorm.lab.runs.lock import describe, expect_own

    what = "a recalibrated run"
    expect_own(out, what)
    path = out / CHECKPOINT
    if path.exists():
        there = checkpoint.load(path)
        if "recalibrated" not in there or there.get("run") != run.state["run"]:
            raise ValueError(f"{out} holds another run, which would be lost; give another folder with --out")
    before = run.test()
    with warnings.catch_warnings(record=True) as said, _bar() as show:
        passes = recalibrate(
            run.model,
            source.batches,
            estimator=command.estimator,
            passes=command.passes,
            call=source.call,
            progress=show,
        )
    after = run.test()
    done = {"estimator": command.estimator, "passes": passes, source.unit: source.count, "data": source.name}
    state = {**run.state, "model": dict(run.model.state_dict()), "recalibrated": done}
    describe(out, what, {**run.description, "recalibrated": done})
    checkpoint.save(path, state)
    return before, after, passes, said


def show_gap(command: Gap) -> None:
    """Print the gap of a checkpoint as a table."""
    from streamnorm.calibration import gap

    run, source = _opened(command)
    with _bar() as show:
        found = gap(run.model, source.batches, call=source.call, progress=show)
    print(f"{run.label}: what testing uses, beside {source.count} {source.unit} of {source.name}\n\n{found}")


def _opened(command: Recalibrate | Gap) -> tuple[Reopened, Source]:
    """The run as it was, and the data that its statistics are taken of or compared with."""
    from streamnorm.calibration.postproc import layers
    from streamnorm.lab.runs.keeping import state_at
    from streamnorm.lab.runs.reopen import reopen

    expect_whole("samples_per_batch", command.samples_per_batch)
    if command.limit is not None and command.limit < 2:
        raise ValueError(f"limit is a number of samples >= 2, of which there is a sigma, got {command.limit}")
    run = reopen(command.folder, state_at(command.folder), command.data_root)
    layers(run.model)  # refuses a network without statistics
    return run, run.source(command.data, command.limit, command.samples_per_batch)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar over passes on the error stream: what moves it."""
    from rich.console import Console

    from streamnorm.lab.commands.progress import progress

    with progress(Console(stderr=True), unit="mini-batch") as move:
        yield lambda number, batch, batches: move(description=f"pass {number}", completed=batch, total=batches)
