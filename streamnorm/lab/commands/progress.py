"""What every command shows of work under way: a bar, and where a run goes on. Imports how files are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from streamnorm.reading import ReadError, read_lines


@contextmanager
def progress(console: Console, text: str = "", unit: str = "update") -> Iterator[Callable[..., None]]:
    """A bar that is gone in the end: what moves it, called with ``completed``, ``total`` and ``description``.

    Raises:
        KeyboardInterrupt: with how far it came, in units.
    """
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        try:
            yield partial(bar.update, task)
        except KeyboardInterrupt:
            reached = bar.tasks[task]
            if not reached.total:
                raise
            raise KeyboardInterrupt(
                f"{unit} {reached.completed:.0f} of {reached.total:.0f} ({reached.description})"
            ) from None


def say_where(console: Console, folder: Path, finished: bool) -> None:
    """Tell how far a run that is kept in ``folder`` has come before; nothing if it begins."""
    if finished:
        console.print("It has finished: nothing is left to do. Give another --out to train anew.", soft_wrap=True)
        return
    metrics, lines = folder / "metrics.jsonl", []
    with suppress(OSError, ReadError):  # they are for people, and are written anew from the checkpoint
        lines = [line for line, _ in read_lines(metrics, {"updates": int}, "it is made anew")]
    if lines:
        reached = lines[-1]["updates"]
        said = f"Its metrics reach update {reached} already; what is missing goes on from the last checkpoint."
        console.print(said, soft_wrap=True)
