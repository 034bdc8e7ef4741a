"""The commands of auto-encoders: train one, and show what it finds alike. Needs the extra ``cli``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from streamnorm.lab.runs.autoencoder.run import AutoencoderRun


@dataclass(frozen=True)
class Autoencoder:
    """Train an auto-encoder of documents; a stopped run goes on from its last checkpoint."""

    run: AutoencoderRun = field(default_factory=AutoencoderRun)
    out: Path | None = None
    """Folder of the run. Default: runs/DATA-autoencoder-ARM-SEED."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


@dataclass(frozen=True)
class Neighbors:
    """Show the documents that a trained auto-encoder finds most like others, and how often they share a label."""

    checkpoint: Positional[Path]
    """Folder of a run that `streamnorm train --arch autoencoder` made, or its checkpoint file."""
    titles: Positional[tuple[str, ...]] = ()
    """The documents asked for, such as "Toy Story". None: only how often the held-out documents share a label."""
    search: str | None = None
    """List the titles that contain this, and no neighbors; "" lists all."""
    beside: tuple[Path, ...] = ()
    """More of such folders or files, shown side by side with the first."""
    k: int = 10
    """Neighbors of each document."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""


def train_autoencoder(command: Autoencoder) -> None:
    """Train one auto-encoder and show its epochs."""
    from rich.console import Console
    from rich.markup import escape

    from streamnorm.lab.commands.progress import progress, say_where
    from streamnorm.lab.runs.autoencoder.data import load_documents
    from streamnorm.lab.runs.autoencoder.loop import AutoencoderTrainer, train_autoencoder
    from streamnorm.lab.runs.summary import fixed

    run = command.run
    console = Console()
    out = command.out or Path("runs") / f"{Path(run.data).name.split('.')[0]}-autoencoder-{run.arm}-{run.seed}"
    documents = load_documents(run.data, command.data_root, vocabulary=run.vocabulary, train_limit=run.train_limit)

    def begin(finished: bool) -> None:
        said = f"{run.label} on {escape(documents.source)}, seed {run.seed}; kept in {escape(str(out))}"
        console.print(said, highlight=False, soft_wrap=True)
        say_where(console, out, finished)

    def tell(line: dict[str, Any]) -> None:
        console.print(
            f"epoch {line['epoch']:3d}   train cost {line['train_cost']:.3f}   test cost "
            f"{fixed(line['test_cost'], unit=1, places=3)} nats a document, "
            f"{fixed(line['test_cost'], unit=1 / run.vocabulary, places=5)} a word   norm of W {line['norm']:.2f}"
            + (f"   {line['note']}" if "note" in line else ""),
            highlight=False,
            soft_wrap=True,
        )

    with progress(console, run.label) as move:

        def show(trainer: AutoencoderTrainer) -> None:
            epoch = math.ceil(trainer.done / trainer.per_epoch)
            said = f"{run.label}, epoch {epoch} of {run.epochs}"
            move(completed=trainer.done, total=trainer.updates, description=said)

        record = train_autoencoder(run, documents, out, show, begin, tell)
    if record["failed"]:
        raise ValueError(f"{run.label} could not train: {record['failed']}")


def show_neighbors(command: Neighbors) -> None:
    """Print nearest neighbors side by side, and the precision of each checkpoint."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from streamnorm.lab.runs.autoencoder.neighbors import (
        codes_of,
        nearest,
        precision,
        precision_by_chance,
        side_by_side,
    )

    documents, columns = codes_of([command.checkpoint, *command.beside], command.data_root)
    if command.search is not None:
        found = documents.search(command.search)
        if not found:
            raise ValueError(f"no title of {documents.name} contains {command.search!r}; give less of it")
        print("\n".join(found))
        return
    asked = [documents.find(title) for title in command.titles]
    console = Console()
    for i in asked:
        labels = ", ".join(documents.labels_of(i))
        table = Table("", *map(escape, columns), title=escape(documents.titles[i] + (f": {labels}" if labels else "")))
        for rank, row in enumerate(side_by_side(documents, i, columns, command.k), 1):
            table.add_row(str(rank), *map(escape, row))
        console.print(table)
    if not documents.label_names:
        return
    queries = documents.tested
    chance = precision_by_chance(queries, documents.labels)
    for name, code in columns.items():
        share = precision(nearest(code, queries, command.k)[0], queries, documents.labels)
        print(
            f"{' '.join(name.split())}: {share:.1%} of the {command.k} nearest of {len(queries)} held-out documents "
            f"share a label with them, {chance:.1%} would by chance"
        )
