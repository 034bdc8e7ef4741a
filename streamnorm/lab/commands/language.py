"""The commands of language models: train one, and let it write. Needs the extra ``cli``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from streamnorm.lab.runs.language.run import TextRun


@dataclass(frozen=True)
class Language:
    """Train a character-level language model; a stopped run goes on from its last checkpoint."""

    run: TextRun = field(default_factory=TextRun)
    out: Path | None = None
    """Folder of the run. Default: runs/DATA-ARCH-ARM-SEED."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


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


def train_language(command: Language) -> None:
    """Train one language model and show its losses, at the end of each epoch and while it runs."""
    from rich.console import Console
    from rich.markup import escape

    from streamnorm.lab.commands.progress import progress, say_where
    from streamnorm.lab.runs.language.data import load_text
    from streamnorm.lab.runs.language.loop import TextTrainer, train_text
    from streamnorm.lab.runs.summary import fixed

    run = command.run
    console = Console()
    out = command.out or Path("runs") / f"{Path(run.data).stem}-{run.arch}-{run.arm}-{run.seed}"
    text = load_text(run.data, command.data_root, limit=run.limit)
    latest: list[dict[str, Any]] = []

    def begin(finished: bool) -> None:
        said = f"{run.label} on {escape(text.source)}, seed {run.seed}; kept in {escape(str(out))}"
        console.print(said, highlight=False, soft_wrap=True)
        say_where(console, out, finished)

    def tell(line: dict[str, Any]) -> None:
        if latest and math.ceil(line["epoch"]) > math.ceil(latest[-1]["epoch"]):
            console.print(_epoch(latest[-1]), highlight=False, soft_wrap=True)
        latest[:] = [line]

    with progress(console, run.label) as move:

        def show(trainer: TextTrainer) -> None:
            said = "" if trainer.train_loss is None else f"  train {trainer.train_loss:.3f}"
            if trainer.metrics:
                said += f"  validation {fixed(trainer.metrics[-1]['validation_loss'], unit=1, places=3)}"
            move(completed=trainer.done, total=trainer.updates, description=f"{run.label}{said} nats")

        record = train_text(run, text, out, show, begin, tell)
    for line in latest:
        console.print(_epoch(line), highlight=False, soft_wrap=True)
    if record["failed"]:
        raise ValueError(f"{run.label} could not train: {record['failed']}")


def _epoch(line: dict[str, Any]) -> str:
    """What the latest validation of an epoch came to, in words."""
    from streamnorm.lab.runs.summary import fixed

    return (
        f"epoch {math.ceil(line['epoch']):3d}   train loss {line['train_loss']:.4f} nats   validation loss "
        f"{fixed(line['validation_loss'], unit=1, places=4)} nats, "
        f"{fixed(line['validation_bits'], unit=1, places=4)} bits per character"
        + (f"   {line['note']}" if "note" in line else "")
    )


def write_text(command: Sample) -> None:
    """Write text with a trained language model."""
    from streamnorm.lab.runs.language.loop import trained
    from streamnorm.lab.runs.language.model import sample

    run, model, state = trained(command.checkpoint)
    vocabulary, prompt = state["data"]["vocabulary"], command.prompt
    options = {"temperature": command.temperature, "seed": command.seed, "steps": max(run.steps)}
    print(prompt + sample(model, vocabulary, prompt, command.length, **options))
