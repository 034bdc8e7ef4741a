"""The commands of classifiers: train one, or several side by side. Needs the extra ``cli``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamnorm.lab.runs.classifier.run import Run, Settings
from streamnorm.reading import read_json

if TYPE_CHECKING:
    from rich.console import Console

    from streamnorm.lab.runs.classifier.data import Data
    from streamnorm.lab.runs.processes import Share

ARMS = ("none", "layer", "batch", "streaming")


@dataclass(frozen=True)
class Compare:
    """Train several normalizations side by side, with the same weights and order of data, and report what was seen."""

    settings: Settings = field(default_factory=Settings)
    arms: tuple[str, ...] = ARMS
    """Arms to compare: none, layer, batch, tsbn, streaming, instance, group, rms, or a reference such as BA6-S. An arm
    may have its own S/B x B/U, written after a colon: batch:64x1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that every arm is trained with."""
    out: Path | None = None
    """Folder of the runs and the report; a stopped comparison goes on from there. Default: runs/compare-DATA."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


@dataclass(frozen=True)
class Train:
    """Train one network; a stopped run goes on from its last checkpoint."""

    run: Run = field(default_factory=Run)
    arch: Literal["rnn", "gru", "lstm", "autoencoder"] | None = None
    """None: a classifier. rnn, gru, lstm: a language model, with the flags of `streamnorm language`.
    autoencoder: of documents, with the flags of `streamnorm autoencoder`."""
    out: Path | None = None
    """Folder of the run. Default: runs/DATA-ARM-SEED."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    monitor: int | None = None
    """Every so many weight updates, record the distributions of pre-activations and the statistics of the
    normalizations, in monitor.jsonl of the folder and as a picture in monitor.png."""


def arms(command: Compare) -> list[Run]:
    """The runs of a comparison, arm by arm.

    Raises:
        ValueError: for an arm that cannot be read, is unknown or named twice.
    """
    from streamnorm.lab.runs.classifier.models import norm_factory

    runs = []
    for spec in command.arms:
        found = re.fullmatch(r"([^:]+)(?::(\d+)x(\d+))?", spec)
        if not found:
            raise ValueError(f"an arm is a name, or a name with its S/B x B/U like batch:64x1, got {spec!r}")
        values = asdict(command.settings)
        if found[2]:
            values |= {"samples_per_batch": int(found[2]), "batches_per_update": int(found[3])}
        runs += [Run(**values, arm=found[1], seed=seed) for seed in command.seeds]
        try:
            norm_factory(runs[-1])(runs[-1].width)
        except ValueError as error:
            raise ValueError(f"arm {spec}: {error}") from error
    if len({(run.label, run.seed) for run in runs}) < len(runs):
        raise ValueError(f"every arm and seed once, got arms {command.arms} and seeds {command.seeds}")
    return runs


def compare(command: Compare) -> None:
    """Train every run of the comparison that is not finished yet; write and show the report."""
    from rich.console import Console

    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.runs.classifier.loop import expect_enough
    from streamnorm.lab.runs.lock import describe, expect_folder, expect_own, held
    from streamnorm.lab.runs.report import write_report
    from streamnorm.lab.runs.summary import sentence, summarize

    if not command.seeds or not command.arms:
        raise ValueError("give at least one arm and one seed, for instance --arms none streaming --seeds 0 1 2")
    runs = arms(command)
    _expect_images(command.settings.data)
    console = Console()
    settings = command.settings
    out = command.out or Path("runs") / f"compare-{Path(settings.data).name}"
    expect_folder(out)
    data = load(settings.data, command.data_root, train_limit=settings.train_limit, test_limit=settings.test_limit)
    for run in runs:
        expect_enough(run, data)
    what = "a comparison"
    with held(out, f"{what} on {data.name}"):
        expect_own(out, what)
        _keep_report(out, runs)
        describe(out, what, {"runs": [{"label": run.label, "seed": run.seed} for run in runs]})
        console.print(
            f"{data.name}: {len(data.train_x)} to train on, {len(data.test_x)} to test; {len(runs)} runs in {out}"
        )
        records = _trained(runs, data, out, console)
        title = f"{data.name}, architecture {settings.network}"
        report = write_report(records, out, title)
    rows = summarize(records)
    console.print(_table(rows, title))
    console.print(f"\n{sentence(rows)}\n", highlight=False, soft_wrap=True)
    console.print(f"Report: {report}", soft_wrap=True)


QUIET = 10
"""Seconds of a comparison after which an epoch is told; otherwise only what each run came to."""


def _trained(runs: Sequence[Run], data: Data, out: Path, console: Console) -> list[dict[str, Any]]:
    """The records of all runs, each trained to its end in a folder of its own."""
    from streamnorm.lab.commands.progress import progress
    from streamnorm.lab.runs.classifier.loop import train

    records = []
    with progress(console) as move:
        for number, run in enumerate(runs, 1):
            name = f"{run.label}, seed {run.seed}"
            said = f"run {number} of {len(runs)}, {name}"

            def show(done: int, total: int, said: str = said) -> None:
                move(completed=done, total=total, description=said)

            said_at = time.monotonic()

            def tell(line: dict[str, Any], name: str = name) -> None:
                nonlocal said_at
                if time.monotonic() - said_at > QUIET:
                    said_at = time.monotonic()
                    console.print(f"{name}, {_epoch(line)}", highlight=False, soft_wrap=True)

            folder = out / re.sub(r"[^\w.-]+", "-", run.label) / f"seed{run.seed}"
            record = train(run, data, folder, show, tell=tell)
            came_to = f"could not train: {record['failed']}" if record["failed"] else _epoch(record["metrics"][-1])
            console.print(f"{name}, {came_to}", highlight=False, soft_wrap=True)
            records.append(record)
    return records


def _expect_images(data: str) -> None:
    """Refuse what other models are trained on, and say by which command they are."""
    from streamnorm.lab.runs.autoencoder.data import COLLECTIONS
    from streamnorm.lab.runs.language.data import TEXTS

    for arch, known, what in (("gru", TEXTS, "a text"), ("autoencoder", COLLECTIONS, "a collection of documents")):
        if data in known:
            raise ValueError(f"{data} is {what}; train on it by streamnorm train --arch {arch} --data {data}")


def _keep_report(out: Path, runs: Sequence[Run]) -> None:
    """Refuse to replace the report of runs that this comparison does not have."""
    results = out / "results.json"
    if results.exists():
        shape = {"runs": [{"label": str, "seed": int}, ...]}
        remedy = "move it away to have it made anew, or give another folder with --out"
        there = {(run["label"], run["seed"]) for run in read_json(results, shape, remedy)["runs"]}
        if lost := sorted(there - {(run.label, run.seed) for run in runs}):
            named = ", ".join(f"{label}, seed {seed}" for label, seed in lost[:3]) + (" ..." if lost[3:] else "")
            raise ValueError(f"{out} has a report that also holds {named}; name those too, or another --out")


def train_one(command: Train) -> None:
    """Train one run, in all processes that torchrun has started, and show its epochs."""
    from streamnorm.lab.runs.processes import joined

    with joined() as share:
        _train(command, share)


def _train(command: Train, share: Share) -> None:
    from rich.console import Console
    from rich.markup import escape

    from streamnorm.lab.commands.progress import progress, say_where
    from streamnorm.lab.runs.checkpoint import write
    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.runs.classifier.loop import MONITOR, train
    from streamnorm.monitoring import read
    from streamnorm.monitoring.curves import picture

    run, every = command.run, command.monitor
    if every is not None and every < 1:
        raise ValueError(f"--monitor is a number of weight updates >= 1, got {every}")
    if every is not None and share.size > 1:
        raise ValueError(f"--monitor sees the share of one process alone, and there are {share.size}; leave it out")
    _expect_images(run.data)
    console = Console(quiet=not share.is_first)
    out = command.out or Path("runs") / f"{Path(run.data).name}-{run.arm}-{run.seed}"
    with share.after_the_first():
        data = load(run.data, command.data_root, train_limit=run.train_limit, test_limit=run.test_limit)

    def begin(finished: bool) -> None:
        console.print(
            f"{run.label} on {data.name}, architecture {run.network}, seed {run.seed}; kept in {escape(str(out))}",
            soft_wrap=True,
        )
        say_where(console, out, finished)

    with progress(console, run.label) as move:

        def show(done: int, total: int) -> None:
            epoch = -(-done * run.epochs // total)
            move(completed=done, total=total, description=f"{run.label}, epoch {epoch} of {run.epochs}")

        def tell(line: dict[str, Any]) -> None:
            console.print(_epoch(line), highlight=False, soft_wrap=True)

        record = train(run, data, out, show, every, begin, tell, share)
    if every is not None:
        seen = read(out / MONITOR) if (out / MONITOR).is_file() else []
        if seen:
            write((out / MONITOR).with_suffix(".png"), picture(seen))
            console.print(f"Monitor: {out / MONITOR} and .png", soft_wrap=True)
        elif not record["failed"]:
            said = "Monitor: nothing was left to record; to record this run begin it anew with another --out"
            console.print(said, soft_wrap=True)
    if record["failed"]:
        raise ValueError(f"{run.label} could not train: {record['failed']}; try {_remedy(record['failed'])}")


def _remedy(failed: str) -> str:
    """The flags by which a run that failed might not."""
    if failed.startswith("diverged"):
        return "a lower --learning-rate"
    if "(BA" in failed:
        return "--samples-per-batch 8, or --arm streaming --center estimate"
    return "--arm layer, or --architecture B, which has maps"


def _epoch(line: dict[str, Any]) -> str:
    """What an epoch came to, in words."""
    from streamnorm.lab.runs.summary import fixed

    return (
        f"epoch {line['epoch']:3d}   train loss {line['train_loss']:.4f} nats, error {line['train_error']:.2%}   "
        f"test loss {fixed(line['test_loss'], unit=1, places=4)} nats, error {line['test_error']:.2%}"
        + (f"   {line['note']}" if "note" in line else "")
    )


def _table(rows: Any, title: str) -> Any:
    from rich.table import Table

    shown = Table("arm", "test error (%)", "train loss (nats)", "s/epoch", title=title)
    for row in rows:
        if not row.counted:
            shown.add_row(row.label, (row.failed or "").split(" because")[0], "", "")
            continue
        error, loss = (
            _spread(row.test_error, row.test_error_sd, 100, 2),
            _spread(row.train_loss, row.train_loss_sd, 1, 4),
        )
        shown.add_row(row.label, error, loss, f"{row.seconds_per_epoch:.2f}")
    return shown


def _spread(mean: float | None, sd: float | None, unit: float, places: int) -> str:
    if mean is None:
        return "not finite"
    return f"{mean * unit:.{places}f}" + ("" if sd is None else f" ± {sd * unit:.{places}f}")
