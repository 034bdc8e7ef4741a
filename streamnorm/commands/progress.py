"""The progress bar of every command. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress(console: Console, text: str = "") -> Iterator[Callable[..., None]]:
    """A bar that is gone in the end: what moves it, called with ``completed``, ``total`` and ``description``."""
    with Progress(console=console, transient=True) as bar:
        yield partial(bar.update, bar.add_task(text))
