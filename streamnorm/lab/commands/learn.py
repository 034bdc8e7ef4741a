"""The command that learns from a stream of rows. Needs the extra ``cli``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from streamnorm.lab.learning.settings import Settings

if TYPE_CHECKING:
    from streamnorm.lab.learning.session import Job, Session


@dataclass(frozen=True)
class Learn:
    """Learn from a stream, row by row: each is predicted, then learned from with one weight update.

    The columns may hold numbers, booleans and words, and lack values. What is stopped goes on at the very next row."""

    file: Positional[str]
    """CSV with a header or JSON lines, plain or gzip, or parquet; - is standard input. drift is made here, to try."""
    target: str | None = None
    """The column that is to be predicted."""
    ignore: tuple[str, ...] = ()
    """Columns that are not to be looked at, such as a number of the row."""
    arm: str = "streaming"
    """The normalization: none, layer, rms, streaming, paper (streaming with alpha and beta of the paper)."""
    arms: tuple[str, ...] = ()
    """Several of them, which learn the same rows from the same initial weights, side by side."""
    settings: Settings = field(default_factory=Settings)
    format: Literal["csv", "jsonl"] | None = None
    """None: jsonl for names that end in .jsonl, .ndjson, .json or .parquet, otherwise csv."""
    limit: int | None = None
    """Learn so many rows at most, those learned before included."""
    checkpoint_every: int = 10_000
    """Rows between checkpoints."""
    strict: bool = False
    """Stop at a row that cannot be used; otherwise it is skipped, counted and said."""
    fresh: bool = False
    """What comes is all new, as from a live source. Otherwise a stopped command expects the stream from its beginning,
    and leaves out what it has learned."""
    out: Path | None = None
    """Folder of the checkpoint and the report. Default: runs/learn-FILE-ARM-SEED."""


def job_of(command: Learn) -> Job:
    """What a command asks for.

    Raises:
        ValueError: for flags that do not fit.
    """
    from streamnorm.lab.learning.rows import EXTENSIONS
    from streamnorm.lab.learning.session import Job
    from streamnorm.lab.learning.streams import MADE, is_made

    target = command.target
    if target is None and is_made(command.file):
        target = MADE[command.file][1]
    suffix = Path(command.file.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet" and command.format is not None:
        raise ValueError(f"--format is for text, and {command.file} is a parquet file; leave it out")
    return Job(
        name=command.file,
        format=command.format or EXTENSIONS.get(suffix, "csv"),
        target=target,
        settings=command.settings,
        arms=command.arms or (command.arm,),
        ignore=command.ignore,
        strict=command.strict,
        fresh=command.fresh,
        limit=command.limit,
        checkpoint_every=command.checkpoint_every,
    )


def learn(command: Learn) -> None:
    """Learn the rows that were not learned yet; write and show the report."""
    from rich.console import Console

    from streamnorm.lab.learning.figures import notes, sentence
    from streamnorm.lab.learning.report import write_report
    from streamnorm.lab.learning.session import session
    from streamnorm.lab.learning.streams import opened, stem

    job = job_of(command)
    name = f"learn-{stem(command.file)}-{'-'.join(job.arms)}-{job.settings.seed}"
    out = command.out or Path("runs") / name
    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with opened(job.name) as file, session(job, out, file, tell) as under_way:
        tell(_beginning(under_way))
        is_written = True
        try:
            with _shown(console, under_way) as show:
                under_way.run(show)
        except OSError:  # what is full or gone takes no report, and its own error is the one to show
            is_written = False
            raise
        finally:
            tell(_reached(under_way))
            record = under_way.record()
            report = write_report(record, out) if under_way.learner.rows and is_written else None
        if under_way.stop.asked:
            raise KeyboardInterrupt(f"row {under_way.learner.rows:,}, all of them kept")
        console.print(_table(record))
        for note in notes(record):
            tell(note)
        tell(f"\n{sentence(record)}\n")
        tell(f"Report: {report}")
        if failed := under_way.learner.failed:
            best = "--scale, or " if not job.settings.scale else ""
            raise ValueError(f"no network learns any more: {failed}; try {best}a lower --learning-rate")


def _beginning(session: Session) -> str:
    job, learner = session.job, session.learner
    schema = learner.schema
    from streamnorm.lab.learning.rows import shown

    columns = f"{len(schema.columns):,} column{'s' if len(schema.columns) > 1 else ''} ({shown(schema.columns, 8)})"
    lines = [f"{', '.join(job.arms)}: {schema.target!r} from {columns}, kept in {session.folder}"]
    if session.why:
        other = "regression" if schema.by_class else "classification"
        lines.append(f"Task: {schema.task}, since the first targets are {session.why}; otherwise give --task {other}")
    if session.resumed:
        after = "all that comes is new" if job.fresh else "what was learned is left out"
        lines.append(f"{session.resumed:,} rows were learned before; {after}")
    return "\n".join(lines)


@contextmanager
def _shown(console: Any, session: Session) -> Iterator[Callable[[], None]]:
    """What shows how far it has come: a line that is renewed in a terminal, elsewhere a line a checkpoint."""
    from rich.status import Status

    from streamnorm.lab.learning.session import Rate

    rate = Rate(session.learner.rows)
    if not console.is_terminal:
        told = [session.learner.rows // session.job.checkpoint_every]

        def line() -> None:
            now = session.learner.rows // session.job.checkpoint_every
            speed = rate.of(session.learner.rows)
            if now > told[0]:
                told[0] = now
                print(f"{_reached(session)}   {speed:,.0f} rows a second", flush=True)

        yield line
        return
    with Status("waiting for rows", console=console) as status:

        def renew() -> None:
            speed = rate.of(session.learner.rows)
            status.update(f"{_reached(session)}   {speed:,.0f} rows a second")

        yield renew


def _reached(session: Session) -> str:
    """How far it has come, in a line."""
    from streamnorm.lab.learning.figures import figure

    record = session.record()
    parts = [
        f"{name} {figure(record['so_far'][name], record)} (last 1,000: {figure(record['recent'][name], record)})"
        for name in record["so_far"]
    ]
    skipped = f", {session.skipped.count:,} skipped" if session.skipped.count else ""
    return f"{record['rows']:,} rows{skipped}   " + "   ".join(parts)


def _table(record: Any) -> Any:
    from rich.table import Table

    from streamnorm.lab.learning.figures import cells, title

    head, lines = cells(record)
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    shown = Table(*(head[i] for i in kept), title=title(record))
    for line in lines:
        shown.add_row(*(line[i] for i in kept))
    return shown
