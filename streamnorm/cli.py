"""The command line: ``streamnorm compare | train | language | autoencoder | evaluate | recalibrate | gap | sample |
neighbors | bench | doctor``. Flags are derived from dataclasses; nothing is computed here. Needs the extra ``cli``.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

try:
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional
except ImportError as error:
    raise SystemExit(f"streamnorm: the command line needs {error.name}; pip install 'streamnorm[cli]'") from error

from streamnorm.autoencoder_cli import Autoencoder, Neighbors, evaluate_autoencoder, show_neighbors, train_autoencoder
from streamnorm.bench.settings import Bench
from streamnorm.recalibrate_cli import Gap, Recalibrate, recalibrate_run, show_gap
from streamnorm.training.run import Run, Settings
from streamnorm.training.textrun import TextRun

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
    """Train one network; a stopped run goes on from its last checkpoint.

    With --arch rnn, gru or lstm it is a language model, with --arch autoencoder an auto-encoder of documents, and the
    flags are those of `streamnorm language` or `streamnorm autoencoder`."""

    run: Run = field(default_factory=Run)
    out: Path | None = None
    """Folder of the run. Default: runs/DATA-ARM-SEED."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    monitor: int | None = None
    """Every so many weight updates, record the distributions of pre-activations and the statistics of the
    normalizations, in monitor.jsonl of the folder and as a picture in monitor.png."""


@dataclass(frozen=True)
class Language:
    """Train a character-level language model; a stopped run goes on from its last checkpoint."""

    run: TextRun = field(default_factory=TextRun)
    out: Path | None = None
    """Folder of the run. Default: runs/DATA-ARCH-ARM-SEED."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


@dataclass(frozen=True)
class Evaluate:
    """Test a trained network."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    lengths: tuple[int, ...] = ()
    """Of a language model: test it on sequences of so many time steps too, each from a state of 0."""
    loops: tuple[int, ...] = ()
    """Of architecture C or D: test it with so many loops too (k1 and k2, or k), in the place of those it was trained
    with."""


@dataclass(frozen=True)
class Sample:
    """Write text with a trained language model."""

    checkpoint: Positional[Path]
    """Folder of a run that `streamnorm train --arch ...` made, or its checkpoint file."""
    prompt: str = "\n"
    """What the text goes on from."""
    length: int = 500
    """Characters to write."""
    temperature: float = 1.0
    """Below 1 is more certain, above more various; 0 always takes the likeliest character."""
    seed: int = 0
    """The same seed, the same text."""


@dataclass(frozen=True)
class Doctor:
    """Tell versions, machine, compiled kernels, and which backend serves which layer; for a report of an error."""


def arms(command: Compare) -> list[Run]:
    """The runs of a comparison, arm by arm.

    Raises:
        ValueError: for an arm that cannot be read, is unknown or named twice.
    """
    from streamnorm.training.architectures import norm_factory

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

    from streamnorm.training.data import load
    from streamnorm.training.loop import train
    from streamnorm.training.report import write_report
    from streamnorm.training.summary import sentence, summarize

    if not command.seeds or not command.arms:
        raise ValueError("give at least one arm and one seed, for instance --arms none streaming --seeds 0 1 2")
    runs = arms(command)
    console = Console()
    settings = command.settings
    out = command.out or Path("runs") / f"compare-{settings.data}"
    _keep_report(out, runs)
    data = load(settings.data, command.data_root, train_limit=settings.train_limit, test_limit=settings.test_limit)
    console.print(
        f"{data.name}: {len(data.train_x)} to train on, {len(data.test_x)} to test; {len(runs)} runs in {out}"
    )
    records = []
    with _progress(console) as bar:
        task = bar.add_task("", total=len(runs))
        for done, run in enumerate(runs):

            def show(update: int, updates: int, done: int = done, run: Run = run) -> None:
                bar.update(task, completed=done + update / updates, description=f"{run.label}, seed {run.seed}")

            folder = out / re.sub(r"[^\w.-]+", "-", run.label) / f"seed{run.seed}"
            records.append(train(run, data, folder, show))
            bar.update(task, completed=done + 1)
    title = f"{data.name}, architecture {settings.network}"
    report = write_report(records, out, title)
    rows = summarize(records)
    console.print(_table(rows, title))
    for row in rows:
        if row.failed:
            console.print(f"{row.label}: {row.failed}", highlight=False)
    console.print(f"\n{sentence(rows)}\n", highlight=False, soft_wrap=True)
    console.print(f"Report: {report}", soft_wrap=True)


def _keep_report(out: Path, runs: Sequence[Run]) -> None:
    """Refuse to replace the report of runs that this comparison does not have."""
    results = out / "results.json"
    if results.is_file():
        there = {(run["label"], run["seed"]) for run in json.loads(results.read_text())["runs"]}
        if lost := sorted(there - {(run.label, run.seed) for run in runs}):
            named = ", ".join(f"{label}, seed {seed}" for label, seed in lost[:3]) + (" ..." if lost[3:] else "")
            raise ValueError(f"{out} has a report that also holds {named}; name those too, or another --out")


def train_one(command: Train) -> None:
    """Train one run and show its epochs."""
    from rich.console import Console

    from streamnorm.monitor import read
    from streamnorm.monitorcurves import picture
    from streamnorm.training.checkpoint import write
    from streamnorm.training.data import load
    from streamnorm.training.loop import MONITOR, train

    run, every = command.run, command.monitor
    if every is not None and every < 1:
        raise ValueError(f"--monitor is a number of weight updates >= 1, got {every}")
    console = Console()
    out = command.out or Path("runs") / f"{run.data}-{run.arm}-{run.seed}"
    data = load(run.data, command.data_root, train_limit=run.train_limit, test_limit=run.test_limit)
    console.print(f"{run.label} on {data.name}, architecture {run.network}, seed {run.seed}; kept in {out}")
    with _progress(console) as bar:
        task = bar.add_task(run.label)
        record = train(run, data, out, lambda done, total: bar.update(task, completed=done, total=total), every)
    for line in record["metrics"]:
        console.print(
            f"epoch {line['epoch']:3d}   train loss {line['train_loss']:.4f} nats, error {line['train_error']:.2%}   "
            f"test loss {line['test_loss']:.4f} nats, error {line['test_error']:.2%}",
            highlight=False,
            soft_wrap=True,
        )
    if every is not None and (out / MONITOR).is_file():
        write((out / MONITOR).with_suffix(".png"), picture(read(out / MONITOR)))
        console.print(f"Monitor: {out / MONITOR} and .png", soft_wrap=True)
    if record["failed"]:
        raise ValueError(f"{run.label} could not train: {record['failed']}")


def train_language(command: Language) -> None:
    """Train one language model and show its losses, at the end of each epoch and while it runs."""
    from rich.console import Console
    from rich.markup import escape

    from streamnorm.training.language_loop import TextTrainer, train_text
    from streamnorm.training.text import load_text

    run = command.run
    console = Console()
    out = command.out or Path("runs") / f"{Path(run.data).stem}-{run.arch}-{run.arm}-{run.seed}"
    text = load_text(run.data, command.data_root, limit=run.limit)
    console.print(
        f"{run.label} on {escape(text.source)}, seed {run.seed}; kept in {out}", highlight=False, soft_wrap=True
    )
    with _progress(console) as bar:
        task = bar.add_task(run.label)

        def show(trainer: TextTrainer) -> None:
            said = "" if trainer.train_loss is None else f"  train {trainer.train_loss:.3f}"
            said += f"  validation {trainer.metrics[-1]['validation_loss']:.3f}" if trainer.metrics else ""
            bar.update(task, completed=trainer.done, total=trainer.updates, description=f"{run.label}{said} nats")

        record = train_text(run, text, out, show)
    for epoch, line in {math.ceil(line["epoch"]): line for line in record["metrics"]}.items():
        console.print(
            f"epoch {epoch:3d}   train loss {line['train_loss']:.4f} nats   validation loss "
            f"{line['validation_loss']:.4f} nats, {line['validation_bits']:.4f} bits per character",
            highlight=False,
            soft_wrap=True,
        )
    if record["failed"]:
        raise ValueError(f"{run.label} could not train: {record['failed']}")


def evaluate_one(command: Evaluate) -> None:
    """Load a checkpoint and test it."""
    from streamnorm.training import checkpoint
    from streamnorm.training.data import load
    from streamnorm.training.loop import Trainer, evaluate, reloop

    state = checkpoint.load(command.folder / "checkpoint.safetensors")
    if state["run"].get("arch") == "autoencoder":
        if command.lengths or command.loops:
            raise ValueError(f"{command.folder} holds an auto-encoder, which has no --lengths and no --loops")
        return evaluate_autoencoder(command.folder, command.data_root)
    if "arch" in state["run"]:
        if command.loops:
            raise ValueError(f"--loops are those of architecture C or D, {command.folder} holds a language model")
        return evaluate_language(command)
    if command.lengths:
        raise ValueError(f"--lengths are those of a language model, {command.folder} holds a classifier; leave it out")
    run = Run.from_json(state["run"])
    if state["failed"]:
        raise ValueError(f"{command.folder} holds a run that could not train: {state['failed']}")
    data = load(run.data, command.data_root, train_limit=run.train_limit, test_limit=run.test_limit)
    trainer = Trainer(run, data)
    trainer.restore(state)
    other = reloop(trainer, command.loops) if command.loops else None
    loss, error = evaluate(trainer.model, data.test_x, data.test_y)
    print(
        f"{run.label} on {data.name}, architecture {run.network}, after {trainer.done} of {trainer.updates} updates: "
        f"test loss {loss:.4f} nats, error {error:.2%} of {len(data.test_x)}"
    )
    if other is not None:
        loss, error = evaluate(other, data.test_x, data.test_y)
        print(f"with loops {' '.join(map(str, command.loops))}: test loss {loss:.4f} nats, error {error:.2%}")


def evaluate_language(command: Evaluate) -> None:
    """Load the checkpoint of a language model and test it on its whole validation text."""
    from streamnorm.training.language import bits, evaluate, validate
    from streamnorm.training.language_loop import trained
    from streamnorm.training.text import load_text

    run, model, state = trained(command.folder)
    text = load_text(run.data, command.data_root, vocabulary=state["data"]["vocabulary"], limit=run.limit)
    if text.source != state["data"]["text"]:
        raise ValueError(f"it was trained on another text: {state['data']['text']} there and {text.source} here")
    characters = len(text.validation) - 1
    if wrong := [length for length in command.lengths if not 1 <= length <= characters]:
        raise ValueError(f"a length is 1 to {characters} time steps, the whole validation text; got {wrong[0]}")
    nats = validate(model, text.validation, run)
    print(
        f"{run.label} on {text.name}, after {state['done']} of {state['updates']} updates: validation loss "
        f"{nats:.4f} nats, {bits(nats):.4f} bits per character of {characters}"
    )
    for length in command.lengths:
        nats = evaluate(model, text.validation, length)
        print(f"{length} time steps, each sequence from a state of 0: {nats:.4f} nats, {bits(nats):.4f} bits")


def write_text(command: Sample) -> None:
    """Write text with a trained language model."""
    from streamnorm.training.language import sample
    from streamnorm.training.language_loop import trained

    run, model, state = trained(command.checkpoint)
    vocabulary, prompt = state["data"]["vocabulary"], command.prompt
    options = {"temperature": command.temperature, "seed": command.seed, "steps": max(run.steps)}
    print(prompt + sample(model, vocabulary, prompt, command.length, **options))


def time_layers(command: Bench) -> None:
    """Time the layers beside their peers; write the record and say how the targets were met."""
    from streamnorm.bench.run import bench

    path, verdicts = bench(command)
    for line in verdicts:
        print(line)
    print(f"Record: {path}")


def examine(command: Doctor) -> None:
    """Print what ``streamnorm.doctor`` finds."""
    from streamnorm.doctor import report

    print(report())


@contextmanager
def _progress(console: Any) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar


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


def _routed(arguments: list[str]) -> list[str]:
    """``train --arch gru ...`` is ``language --arch gru ...``, ``train --arch autoencoder ...`` is ``autoencoder ...``.

    A classifier, a language model and an auto-encoder share few flags, and of those some defaults differ; joined in one
    dataclass, half of its fields would be refused for each. So they are three commands, and the flag chooses.
    """
    words = " ".join(arguments).replace("=", " ").split()
    if words[:1] != ["train"] or "--arch" not in words:
        return arguments
    chosen = "autoencoder" if words[words.index("--arch") + 1 :][:1] == ["autoencoder"] else "language"
    return [chosen, *arguments[1:]]


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments make.

    Raises:
        ValueError: for a value that a dataclass of ours refuses, in its words; tyro would add the names of its own
            inner parts. All else it says itself, and exits.
    """
    parse: Callable[[], Any] = partial(
        tyro.cli,
        Compare | Train | Language | Autoencoder | Evaluate | Recalibrate | Gap | Sample | Neighbors | Bench | Doctor,
        prog="streamnorm",
        description="Normalization for neural networks that learn from streams.",
        args=arguments,
        config=(OmitArgPrefixes,),
    )
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parse()
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None:
            if isinstance(cause, ValueError) and _is_ours(cause):
                raise cause from None
            cause = cause.__context__
    return parse()  # the same once more, aloud


def _is_ours(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals["__name__"].startswith("streamnorm.")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command ``streamnorm``. Returns the exit status: 2 for input that cannot be used."""
    command: Any = None
    commands = {Compare: compare, Train: train_one, Language: train_language, Evaluate: evaluate_one}
    commands |= {Recalibrate: recalibrate_run, Gap: show_gap}
    commands |= {Autoencoder: train_autoencoder, Neighbors: show_neighbors}
    commands |= {Sample: write_text, Bench: time_layers, Doctor: examine}
    try:
        command = _parsed(_routed(sys.argv[1:] if arguments is None else arguments))
        commands[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"streamnorm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "with --resume goes on" if isinstance(command, Bench) else "goes on from the last checkpoint"
        print(f"\nstreamnorm: stopped; the same command {again}", file=sys.stderr)
        return 130
    return 0
