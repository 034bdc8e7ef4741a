"""The commands about the statistics of testing: take them anew, tell how far off they are. Needs the extra ``cli``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from streamnorm.calibration.recalibrate import Choice, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from streamnorm.training.loop import Trainer


@dataclass(frozen=True)
class Recalibrate:
    """Take the statistics that testing uses anew from data, with the weights as they are, and keep the result."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made."""
    estimator: Choice = "pooled"
    """pooled: exactly those of all data. moving: a running average with decay 0.9 from mean 0 and sigma 1; corrected:
    the same without what the initial values weigh."""
    passes: int | None = None
    """Passes through the data at most; default: until every layer is exact, and 1 for running averages."""
    samples_per_batch: int = 64
    """Samples that go through the network at a time; what is pooled does not depend on it."""
    limit: int | None = None
    """Take so many training samples only, the first of the file."""
    data: str | None = None
    """Training data to take them from; default: those of the run."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    out: Path | None = None
    """Folder of the result, which can be tested like any run. Default: FOLDER-recalibrated."""


@dataclass(frozen=True)
class Gap:
    """Tell how far the statistics that testing uses are from those of data, layer by layer; nothing is changed."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made."""
    samples_per_batch: int = 64
    """Samples that go through the network at a time."""
    limit: int | None = None
    """Take so many training samples only, the first of the file."""
    data: str | None = None
    """Training data to compare with; default: those of the run."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


def recalibrate_run(command: Recalibrate) -> None:
    """Recalibrate the network of a checkpoint; write it into a folder of its own and test it."""
    from streamnorm.calibration.recalibrate import recalibrate
    from streamnorm.training import checkpoint
    from streamnorm.training.keeping import CHECKPOINT
    from streamnorm.training.loop import description, evaluate

    trainer, batches, name = _opened(command)
    out = command.out or command.folder.with_name(f"{command.folder.resolve().name}-recalibrated")
    if out.resolve() == command.folder.resolve():
        raise ValueError(f"{out} is the run itself, whose statistics would be lost; give another folder with --out")
    if (out / CHECKPOINT).is_file() and "recalibrated" not in checkpoint.load(out / CHECKPOINT):
        raise ValueError(f"{out} holds another run, which would be lost; give another folder with --out")
    test = trainer.data.test_x, trainer.data.test_y
    before = evaluate(trainer.model, *test)
    with warnings.catch_warnings(record=True) as said, _bar() as show:
        passes = recalibrate(trainer.model, batches, estimator=command.estimator, passes=command.passes, progress=show)
    after = evaluate(trainer.model, *test)
    done = {"estimator": command.estimator, "passes": passes, "samples": sum(map(len, batches)), "data": name}
    checkpoint.save(out / CHECKPOINT, {**trainer.state(), "recalibrated": done})
    described = {**description(trainer.run, trainer.data), "recalibrated": done}
    checkpoint.write(out / "run.json", json.dumps(described, indent=1))
    print(
        f"{trainer.run.label}: statistics of {done['samples']} samples of {name}, {command.estimator}, {passes} "
        f"pass{'es' if passes > 1 else ''}; kept in {out}"
    )
    for when, (loss, error) in (("before", before), ("after", after)):
        print(f"{when:6}  test loss {loss:.4f} nats, error {error:.2%} of {len(test[0])}")
    for warning in said:
        print(f"streamnorm: {warning.message}", file=sys.stderr)


def show_gap(command: Gap) -> None:
    """Print the gap of a checkpoint as a table."""
    from streamnorm.calibration import gap

    trainer, batches, name = _opened(command)
    with _bar() as show:
        found = gap(trainer.model, batches, progress=show)
    print(f"{trainer.run.label}: what testing uses, beside {sum(map(len, batches))} samples of {name}\n\n{found}")


def _opened(command: Recalibrate | Gap) -> tuple[Trainer, Sequence[Tensor], str]:
    """The trainer of a checkpoint as it was, mini-batches of training data in random order, and the data's name."""
    import torch

    from streamnorm.training import checkpoint
    from streamnorm.training.data import load
    from streamnorm.training.keeping import CHECKPOINT, kind
    from streamnorm.training.loop import Trainer
    from streamnorm.training.run import Run

    if command.samples_per_batch < 1:
        raise ValueError(f"samples_per_batch is a whole number >= 1, got {command.samples_per_batch}")
    if command.limit is not None and command.limit < 2:
        raise ValueError(f"limit is a number of samples >= 2, of which there is a sigma, got {command.limit}")
    state = checkpoint.load(command.folder / CHECKPOINT)
    if (held := kind(state["run"])) != "a classifier":
        raise ValueError(
            f"{command.folder} holds {held}, no classifier; for other models there is "
            "streamnorm.recalibrate(model, data)"
        )
    if state["failed"]:
        raise ValueError(f"{command.folder} holds a run that could not train: {state['failed']}")
    run = Run.from_json(state["run"])
    data = load(run.data, command.data_root, train_limit=run.train_limit, test_limit=run.test_limit)
    trainer = Trainer(run, data)
    trainer.restore(state)
    if command.data is not None:
        data = load(command.data, command.data_root)
    x = data.train_x[: command.limit]
    if x.shape[1:] != trainer.data.train_x.shape[1:]:
        raise ValueError(
            f"the network was trained on samples {tuple(trainer.data.train_x.shape[1:])} of {trainer.data.name}, those "
            f"of {data.name} are {tuple(x.shape[1:])}"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed))
    return trainer, x[order].split(command.samples_per_batch), data.name


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar over passes on the error stream: what moves it."""
    from rich.console import Console

    from streamnorm.commands.progress import progress

    with progress(Console(stderr=True)) as move:
        yield lambda number, batch, batches: move(description=f"pass {number}", completed=batch, total=batches)
