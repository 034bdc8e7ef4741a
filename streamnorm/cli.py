"""The command line: ``streamnorm compare | train | language | autoencoder | evaluate | recalibrate | gap | sample |
neighbors | reproduce | bench | doctor``. Flags are derived from dataclasses; nothing is computed here. Needs the extra
``cli``.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

try:
    import tyro
    from tyro.conf import OmitArgPrefixes
except ImportError as error:
    raise SystemExit(f"streamnorm: the command line needs {error.name}; pip install 'streamnorm[cli]'") from error

from streamnorm.bench.settings import Bench
from streamnorm.commands.autoencoders import Autoencoder, Neighbors, show_neighbors, train_autoencoder
from streamnorm.commands.classifiers import Compare, Train, compare, train_one
from streamnorm.commands.evaluation import Evaluate, evaluate_one
from streamnorm.commands.language import Language, Sample, train_language, write_text
from streamnorm.commands.recalibration import Gap, Recalibrate, recalibrate_run, show_gap
from streamnorm.commands.studies import Reproduce, reproduce


@dataclass(frozen=True)
class Doctor:
    """Tell versions, machine, compiled kernels, and which backend serves which layer; for a report of an error."""


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


COMMANDS: dict[Any, Callable[[Any], None]] = {
    Compare: compare,
    Train: train_one,
    Language: train_language,
    Autoencoder: train_autoencoder,
    Evaluate: evaluate_one,
    Recalibrate: recalibrate_run,
    Gap: show_gap,
    Sample: write_text,
    Neighbors: show_neighbors,
    Reproduce: reproduce,
    Bench: time_layers,
    Doctor: examine,
}
"""Every command and what carries it out, in the order of ``streamnorm --help``."""


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
        reduce(or_, COMMANDS),
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
    try:
        command = _parsed(_routed(sys.argv[1:] if arguments is None else arguments))
        COMMANDS[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"streamnorm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "with --resume goes on" if isinstance(command, Bench) else "goes on from the last checkpoint"
        print(f"\nstreamnorm: stopped; the same command {again}", file=sys.stderr)
        return 130
    return 0
