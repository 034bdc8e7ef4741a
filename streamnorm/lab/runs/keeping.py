"""A training run in a folder: resumed from its checkpoint, saved as it goes, its metrics beside it for people to read.

It knows a trainer by what it can do and nothing of what it trains. Imports the checkpoints and the lock.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.lock import RUN, describe, expect_own, held

SECONDS_BETWEEN_CHECKPOINTS = 60.0
CHECKPOINT = "checkpoint.safetensors"
MADE_BY = {
    "a classifier": "streamnorm train",
    "an auto-encoder": "streamnorm train --arch autoencoder",
    "a language model": "streamnorm train --arch gru",
    "a learner of a stream": "streamnorm learn",
}
"""Every kind of run, and a command that makes one."""
STATE = {
    "run": {str: object},
    "data": {str: object},
    "model": {str: Tensor},
    "failed": (str, None),
    "done": int,
    "updates": int,
}
"""The shape of the checkpoint of each of these, but of a learner of a stream."""
Tell = Callable[[dict[str, Any]], None]


def finite(value: Any) -> Any:
    """A nest of dicts and lists with None in the place of every number that is not finite, for which JSON has no word.

    >>> finite({"losses": [0.5, math.inf]})
    {'losses': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def recorded(key: str, value: float) -> dict[str, Any]:
    """A figure for a line of metrics: itself, or None and a note on what it became.

    >>> recorded("test_loss", math.inf)
    {'test_loss': None, 'note': 'test_loss became inf'}
    """
    return {key: value} if math.isfinite(value) else {key: None, "note": f"{key} became {value}"}


def kind(run: Mapping[str, Any]) -> str:
    """What was trained, from the run that its checkpoint holds."""
    arch = run.get("arch")
    if arch == "stream":
        return "a learner of a stream"
    return "a classifier" if arch is None else "an auto-encoder" if arch == "autoencoder" else "a language model"


def state_at(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, or in the folder ``path``.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    state = checkpoint.load(file)
    with checkpoint.said_of(file):
        checkpoint.expect(state, {"run": {str: object}})
        if kind(state["run"]) != "a learner of a stream":
            checkpoint.expect(state, STATE)
    return state


def expect_trained(state: dict[str, Any], path: Path) -> None:
    """Refuse the checkpoint of a run that failed.

    Raises:
        ValueError: with why it failed.
    """
    if state["failed"]:
        raise ValueError(f"{path} holds a run that could not train: {state['failed']}")


def trained_state(path: Path, wanted: str) -> dict[str, Any]:
    """``state_at``, of a run that could train and is of the kind ``wanted``, one of ``MADE_BY``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged.
        ValueError: if it is of another kind, or of a run that could not train.
    """
    state = state_at(path)
    held = kind(state["run"])
    if held != wanted:
        raise ValueError(
            f"{path} holds {held} of {state['run'].get('data')}, no {wanted.split(' ', 1)[1]}; make one by: "
            f"{MADE_BY[wanted]}"
        )
    expect_trained(state, path)
    return state


class Kept(Protocol):
    """What can be kept: a trainer between two of its steps."""

    metrics: list[dict[str, Any]]

    @property
    def finished(self) -> bool: ...

    def step(self) -> Any: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def run_to_end(
    trainer: Kept,
    folder: Path | None,
    described: dict[str, Any],
    progress: Callable[[], None] | None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    begin: Callable[[bool], None] | None = None,
    tell: Tell | None = None,
) -> None:
    """Step ``trainer`` until it is finished, from its last checkpoint if ``folder`` holds one.

    Args:
        folder: where the run is kept; None keeps nothing.
        described: what ``run.json`` says of it.
        progress: called after each step.
        within: entered around all steps, once the trainer is where its checkpoint left it.
        begin: called once nothing is refused any more, before anything is written, with whether nothing is left to do.
        tell: called with each line of the metrics: first with those of the checkpoint, then with each as it comes.

    Raises:
        CheckpointError: if the folder holds another run, or a damaged checkpoint.
        NotADirectoryError: if it is a file, or inside of one.
        ValueError: if another process trains there, or the folder holds something else.
        OSError: if a file cannot be written, with its name.
    """
    with ExitStack() as stack:
        if folder is not None:
            what = ", ".join(str(described[name]) for name in ("label", "data") if name in described)
            stack.enter_context(held(folder, f"{what}, seed {described.get('seed')}"))
            _go_on(trainer, folder)
        if begin:
            begin(trainer.finished)
        if folder is not None:
            checkpoint.sweep(folder)
            describe(folder, RUN, described)
            _save_metrics(trainer, folder)
        _step_to_end(trainer, folder, progress, within, tell)


def _go_on(trainer: Kept, folder: Path) -> None:
    """From the last checkpoint, if the folder holds one."""
    expect_own(folder, RUN)
    path = folder / CHECKPOINT
    if path.exists():
        with checkpoint.said_of(path, f"; give another folder with --out, or delete {folder} to start over"):
            trainer.restore(checkpoint.load(path))


def _step_to_end(
    trainer: Kept,
    folder: Path | None,
    progress: Callable[[], None] | None,
    within: Callable[[], AbstractContextManager[Any]],
    tell: Tell | None,
) -> None:
    _tell(trainer.metrics, tell)
    saved, lines = time.monotonic(), len(trainer.metrics)
    with within():
        while not trainer.finished:
            trainer.step()
            if progress:
                progress()
            late = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            if folder is not None and (late or trainer.finished or len(trainer.metrics) > lines):
                save(trainer, folder)
                saved = time.monotonic()
            _tell(trainer.metrics[lines:], tell)
            lines = len(trainer.metrics)


def _tell(lines: list[dict[str, Any]], tell: Tell | None) -> None:
    if tell:
        for line in lines:
            tell(line)


def save(trainer: Kept, folder: Path) -> None:
    """The checkpoint, and the metrics beside it."""
    checkpoint.save(folder / CHECKPOINT, trainer.state())
    _save_metrics(trainer, folder)


def _save_metrics(trainer: Kept, folder: Path) -> None:
    checkpoint.write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in trainer.metrics))
