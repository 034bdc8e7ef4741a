"""Learning from a stream in a folder: chunk by chunk, with checkpoints from which it goes on at the very next row.

Chunks are for speed alone: what is learned does not depend on them. Imports the learner, and the checkpoints.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch

from streamnorm.checks import expect_whole
from streamnorm.lab.learning.arms import norm_of
from streamnorm.lab.learning.learner import Learner, Schema, task_of
from streamnorm.lab.learning.lines import Lines, Mark, Stopped
from streamnorm.lab.learning.rows import LOOKED_AT, READERS, JsonRows, Row, shown
from streamnorm.lab.learning.settings import Settings
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.checkpoint import CheckpointError
from streamnorm.lab.runs.keeping import CHECKPOINT
from streamnorm.lab.runs.lock import describe, expect_folder, expect_own, held
from streamnorm.lab.runs.underway import differences, machine, versions

CHUNK = 256
"""Rows that are read and learned at a time, at most."""
CHUNK_SIZE = 1 << 22
"""Bytes, after which a chunk is ended too."""
WHAT = "what was learned from a stream"
"""What a folder of a session holds."""
TOLD = 5
"""Rows that cannot be used of which it is said why; all are counted."""


@dataclass(frozen=True)
class Job:
    """What is to be learned, and how it is read.

    Attributes:
        name: of the stream.
        format: csv or jsonl.
        target: the column to be predicted.
        settings: of the networks.
        arms: normalizations, each of which learns every row.
        ignore: columns that are no features.
        strict: a row that cannot be used is an error.
        fresh: the stream does not begin with what was learned; all of it is new.
        limit: learn so many rows at most, those of a checkpoint included.
        checkpoint_every: so many rows.
    """

    name: str
    format: str
    target: str | None
    settings: Settings = field(default_factory=Settings)
    arms: tuple[str, ...] = ("streaming",)
    ignore: tuple[str, ...] = ()
    strict: bool = False
    fresh: bool = False
    limit: int | None = None
    checkpoint_every: int = 10_000

    def __post_init__(self) -> None:
        if not self.arms or len({*self.arms}) < len(self.arms):
            raise ValueError(f"name every arm once, and at least one; got {shown(self.arms) or 'none'}")
        for arm in self.arms:
            norm_of(arm)
        expect_whole("checkpoint_every", self.checkpoint_every)
        if self.limit is not None:
            expect_whole("limit", self.limit)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint is of."""
        mine = {"arms": list(self.arms), "target": self.target, "ignore": list(self.ignore), "format": self.format}
        return {**self.settings.to_json(), **mine}


SHAPE = {
    "schema": {"target": str, "columns": [str, ...], "task": ("classification", "regression")},
    "mark": {name: range(2**62) for name in ("size", "lines", "crc")},
    "skipped": {"count": range(2**62), "first": [[int, str], ...]},
    "learner": {str: object},
}
"""Of a checkpoint, beside what it is of; what a learner takes it checks itself."""


@dataclass
class Skipped:
    """Rows that could not be used."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: Row, why: str) -> str | None:
        """Count one; returns what is to be said about it."""
        self.count += 1
        if self.count <= TOLD:
            self.first.append((row.line, why))
            return f"line {row.line:,} skipped: {why}"
        return "further rows that cannot be used are counted, not shown" if self.count == TOLD + 1 else None


@dataclass
class Stop:
    """Whether somebody asked for a stop."""

    asked: bool = False


class Session:
    """A job under way in its folder.

    Attributes:
        learner: of the job.
        skipped: rows that could not be used.
        resumed: rows of the checkpoint that it goes on from.
        why: why the task is what it is, in words; None if that was given.
    """

    def __init__(self, job: Job, folder: Path, file: BinaryIO, tell: Callable[[str], None], stop: Stop) -> None:
        """Read the first lines, and refuse what cannot be learned from.

        Raises:
            ValueError: for a stream that cannot be used.
            Stopped: if it is stopped while it waits for them.
        """
        self.job, self.folder, self.tell, self.stop = job, folder, tell, stop
        self.skipped = Skipped()
        self.resumed = 0
        self.why: str | None = None
        self._ended = False
        self._error: ValueError | None = None
        self.name = "standard input" if job.name == "-" else job.name
        self._lines = Lines(file, self.name, lambda: stop.asked)
        self.reader = READERS[job.format](self._lines, job.target, job.ignore)
        self._rows: Iterator[Row] = self.reader.rows()
        self._looked: list[Row] = []
        self._is_new = not (folder / CHECKPOINT).exists()
        self._mark = self._lines.mark  # before the rows that are looked at: none of them is learned yet
        self._schema = self._look() if self._is_new else None

    def begin(self) -> None:
        """Make the networks, or go on from the checkpoint. The folder has to be held.

        Raises:
            CheckpointError: if the folder holds other learning, or a damaged checkpoint, or the stream has changed.
        """
        path = self.folder / CHECKPOINT
        expect_own(self.folder, WHAT)
        if self._is_new == path.exists():
            raise ValueError(f"{self.folder} has changed meanwhile; the same command goes on there")
        checkpoint.sweep(self.folder)
        if self._schema is not None:
            self.learner = Learner(self.job.settings, self._schema, self.job.arms)
        else:
            with checkpoint.said_of(path, f"; give another folder with --out, or delete {self.folder} to start over"):
                self._restore(checkpoint.load(path))
        described = {**self.job.identity(), "task": self.learner.schema.task, "source": self.job.name}
        described |= {"columns": list(self.learner.schema.columns), "versions": versions(), "machine": machine()}
        describe(self.folder, WHAT, described)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        limit = self.job.limit
        return self._ended or self.learner.failed is not None or (limit is not None and self.learner.rows >= limit)

    def run(self, show: Callable[[], None]) -> None:
        """Learn to the end of the stream, or until ``stop`` is asked for; then the checkpoint is up to date.

        Args:
            show: called after each chunk.

        Raises:
            ValueError: for a stream that breaks off, more classes than there may be, and, where that was asked for, for
                a row that cannot be used. What came before is learned and kept.
        """
        every = self.job.checkpoint_every
        saved, reached = None, self.learner.rows
        while not self.finished and not self.stop.asked:
            goals = [self.learner.rows - self.learner.rows % every + every, self.job.limit]
            most = min([CHUNK, *(goal - self.learner.rows for goal in goals if goal is not None)])
            self._learn(self._chunk(most))
            if self._error is None and self.learner.rows % every == 0 and self.learner.rows > reached:
                self.save()
                saved, reached = self._mark, self.learner.rows
            show()
            if self._error is not None:
                break
        if saved != self._mark:
            self.save()
        if self._error is not None:
            raise self._error
        if not self.learner.rows and not self.stop.asked:
            raise ValueError(f"{self._lines.name} has no row that could be learned{self._first_reason()}")

    def save(self) -> None:
        """Write the checkpoint."""
        skipped = {"count": self.skipped.count, "first": [list(pair) for pair in self.skipped.first]}
        schema = self.learner.schema
        state = {
            "run": {"arch": "stream", "data": self.job.name, **self.job.identity()},
            "schema": {"target": schema.target, "columns": list(schema.columns), "task": schema.task},
            "mark": {"size": self._mark.size, "lines": self._mark.lines, "crc": self._mark.crc},
            "skipped": skipped,
            "learner": self.learner.state_dict(),
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _restore(self, state: dict[str, Any]) -> None:
        checkpoint.expect(state, {"run": {str: object}})
        there = {k: v for k, v in state["run"].items() if k not in ("arch", "data")}
        if state["run"].get("arch") != "stream":
            raise CheckpointError("the checkpoint is of another kind of run")
        checkpoint.expect(state, SHAPE)
        if differing := differences(there, self.job.identity()):
            raise CheckpointError(f"the checkpoint is of other learning: {differing}")
        schema = Schema(state["schema"]["target"], tuple(state["schema"]["columns"]), state["schema"]["task"])
        if not isinstance(self.reader, JsonRows) and self.reader.columns != schema.columns:
            raise CheckpointError(
                f"{self._lines.name} has changed: its columns were {shown(schema.columns)} and are "
                f"{shown(self.reader.columns)}"
            )
        if not self.job.fresh:
            try:
                self._lines.skip(Mark(**state["mark"]))
            except ValueError as error:
                again = "pipe the same stream again from its beginning" if self.job.name == "-" else "it may only grow"
                raise CheckpointError(f"{error} ({again}; with --fresh all that comes is new)") from error
        self._mark = self._lines.mark
        self.learner = Learner(self.job.settings, schema, self.job.arms)
        self.learner.load_state_dict(state["learner"])
        self.skipped = Skipped(state["skipped"]["count"], [(line, why) for line, why in state["skipped"]["first"]])
        self.resumed = self.learner.rows

    def _look(self) -> Schema:
        """What the rows are, from the first of them if that is not known yet."""
        task = self.job.settings.task
        is_json = isinstance(self.reader, JsonRows)
        if task == "auto" or is_json:
            usable = 0
            while usable < LOOKED_AT and len(self._looked) < 10 * LOOKED_AT:
                row = next(self._rows, None)
                if row is None:
                    break
                self._looked.append(row)
                usable += row.wrong is None
            if not usable:
                self._refuse_looked()
        columns = self.reader.columns
        if isinstance(self.reader, JsonRows):
            columns = self.reader.columns_of(self._looked, self.job.ignore)
        if task == "auto":
            task, self.why = task_of(self._looked)
        return Schema(self.reader.target, columns, task)

    def _refuse_looked(self) -> None:
        if self._looked and isinstance(self.reader, JsonRows):
            self.reader.columns_of(self._looked)
        for row in self._looked:
            self.skipped.add(row, row.wrong or "")
        raise ValueError(f"{self._lines.name} has no row that could be learned{self._first_reason()}")

    def _first_reason(self) -> str:
        if not self.skipped.first:
            return ""
        line, why = self.skipped.first[0]
        return f"; {self.skipped.count:,} cannot be used, the first in line {line:,}: {why}"

    def _chunk(self, most: int) -> list[Row]:
        """The next rows, fewer if others have not come yet."""
        rows, self._looked = self._looked[:most], self._looked[most:]
        start = self._mark.size
        try:
            while len(rows) < most and not (rows and self._lines.would_wait):
                row = next(self._rows, None)
                if row is None:
                    self._ended = True
                    break
                rows.append(row)
                if row.mark.size - start > CHUNK_SIZE:
                    break
        except Stopped:
            self.stop.asked = True
        except ValueError as error:
            self._error = error
        return rows

    def _learn(self, rows: Sequence[Row]) -> None:
        """Learn from those that can be used, and count the others."""
        usable: list[Row] = []
        skipped: list[tuple[Row, str]] = []
        new: set[str] = set()
        mark, fatal = self._mark, None
        learner = self.learner
        for row in rows:
            why = learner.refuses(row)
            if why is not None and self.job.strict:
                fatal = ValueError(f"{self._lines.name}, line {row.line:,}: {why}; without --strict it is skipped")
                break
            if why is not None:
                skipped.append((row, why))
            elif learner.schema.by_class and row.label not in learner.classes:
                new.add(row.label)
                if len(learner.classes) + len(new) > self.job.settings.max_classes:
                    fatal = ValueError(
                        f"{self._lines.name}, line {row.line:,}: {row.label[:40]!r} would be class "
                        f"{len(learner.classes) + len(new):,}, and --max-classes is {self.job.settings.max_classes:,}; "
                        "if the target is a number, give --task regression"
                    )
                    break
            if why is None:
                usable.append(row)
            mark = row.mark
        learner.learn(usable)
        self._mark = mark
        if fatal is not None:
            self._error = fatal
        for row, why in skipped:
            if said := self.skipped.add(row, why):
                self.tell(said)

    def record(self) -> dict[str, Any]:
        """What a report reads."""
        learner = self.learner
        schema, job = learner.schema, self.job
        return {
            "source": self._lines.name,
            "rows": learner.rows,
            "skipped": {"count": self.skipped.count, "first": self.skipped.first},
            "not_finite": learner.encoder.not_finite,
            "unknown": learner.encoder.unknown,
            "task": schema.task,
            "target": schema.target,
            "columns": list(schema.columns),
            "classes": len(learner.classes),
            "arms": {
                name: {"failed": arm.failed, "seconds": arm.seconds, "rows": arm.track.count}
                for name, arm in learner.arms.items()
            },
            "baselines": list(learner.baselines.names),
            "so_far": {name: track.mean for name, track in learner.tracks.items()},
            "recent": {name: track.recent for name, track in learner.tracks.items()},
            "curve": learner.curve.state_dict(),
            "settings": {**job.settings.to_json(), "learning_rate": job.settings.rate, "ignore": list(job.ignore)},
            "versions": versions(),
            "machine": machine(),
        }


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Inside, the first Ctrl-C asks for a stop: the chunk under way is learned. A second one ends all at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: at one row an update others would have nothing to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def session(job: Job, folder: Path, file: BinaryIO, tell: Callable[[str], None]) -> Iterator[Session]:
    """A session that has begun, in a folder that is held.

    Raises:
        ValueError, CheckpointError: as ``Session`` and ``Session.begin``, and if another process holds the folder.
        KeyboardInterrupt: if it is stopped before the first rows are there.
    """
    expect_folder(folder)
    with one_thread(), interruptible() as stop, ExitStack() as stack:
        try:
            made = Session(job, folder, file, tell, stop)
            stack.enter_context(held(folder, f"learning from {made.name}"))
            made.begin()
        except Stopped:
            raise KeyboardInterrupt("the first rows") from None
        yield made


class Rate:
    """Rows a second, over about the last seconds."""

    def __init__(self, rows: int) -> None:
        self._at, self._rows, self.value = time.perf_counter(), rows, 0.0

    def of(self, rows: int) -> float:
        """Now that so many rows are learned."""
        now = time.perf_counter()
        if now - self._at >= 1 or not self.value:
            self.value = (rows - self._rows) / max(now - self._at, 1e-9)
            if now - self._at >= 1:
                self._at, self._rows = now, rows
        return self.value
