"""The command line: ``streamnorm learn | compare | train | language | autoencoder | evaluate | recalibrate | gap |
sample | neighbors | reproduce | report | bench | doctor``. Flags are derived from dataclasses; nothing is computed
here. Needs the extra ``cli``.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

try:
    import tyro
    from tyro.conf import OmitArgPrefixes
except ImportError as error:
    raise SystemExit(f"streamnorm: the command line needs {error.name}; pip install 'streamnorm[cli]'") from error

from streamnorm.lab.bench.settings import Bench
from streamnorm.lab.commands.autoencoders import Autoencoder, Neighbors, show_neighbors, train_autoencoder
from streamnorm.lab.commands.classifiers import Compare, Train, compare, train_one
from streamnorm.lab.commands.evaluation import Evaluate, evaluate_one
from streamnorm.lab.commands.language import Language, Sample, train_language, write_text
from streamnorm.lab.commands.learn import Learn, learn
from streamnorm.lab.commands.recalibration import Gap, Recalibrate, recalibrate_run, show_gap
from streamnorm.lab.commands.studies import Report, Reproduce, report, reproduce


@dataclass(frozen=True)
class Doctor:
    """Tell versions, machine, compiled kernels, and which backend serves which layer; for a report of an error."""


def time_layers(command: Bench) -> None:
    """Time the layers beside their peers; write the record and say how the targets were met."""
    from streamnorm.lab.bench.run import bench

    path, verdicts = bench(command)
    for line in verdicts:
        print(line)
    print(f"Record: {path}")


def examine(command: Doctor) -> None:
    """Print what ``streamnorm.lab.doctor`` finds."""
    from streamnorm.lab import doctor

    print(doctor.report())


COMMANDS: dict[Any, Callable[[Any], None]] = {
    Learn: learn,
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
    Report: report,
    Bench: time_layers,
    Doctor: examine,
}
"""Every command and what carries it out, in the order of ``streamnorm --help``."""
GOING_ON = {
    **dict.fromkeys(
        (Compare, Train, Language, Autoencoder, Reproduce), "; the same command goes on from the last checkpoint"
    ),
    Bench: "; the same command with --resume goes on",
    Learn: "; the same command goes on at the next row; standard input has to come from its beginning, or with --fresh",
}
"""What is said of those that Ctrl-C stops and that keep what they have done."""


READER_HAS_GONE = 141
"""Exit status of a command whose output nobody reads any more: 128 + SIGPIPE, as of other programs."""
WHY_ALONE = {
    Learn: "each row is predicted by the network that has learned every row before it, which leaves nothing to do side "
    "by side",
}
"""Why a command does not run in the several processes of torchrun, where there is more to say than that."""


def _expect_alone(command: Any) -> None:
    """Refuse several processes of torchrun for all but the training of a classifier."""
    several = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if several != "1" and not isinstance(command, Train):
        name, why = type(command).__name__.lower(), WHY_ALONE.get(type(command))
        said = f"{name} runs in one process, and torchrun has started {several}" + (f": {why}" if why else "")
        raise ValueError(f"{said}; run it without torchrun. Classifiers are trained by several: streamnorm train")


NAMES = [command.__name__.lower() for command in COMMANDS]
ARCHS = {"rnn": "language", "gru": "language", "lstm": "language", "autoencoder": "autoencoder"}
"""What ``train --arch`` takes, and the command that it is."""


def _routed(arguments: list[str]) -> list[str]:
    """``train --arch gru ...`` is ``language --arch gru ...``, ``train --arch autoencoder ...`` is ``autoencoder ...``,
    and nothing at all asks for help.

    A classifier, a language model and an auto-encoder share few flags, and of those some defaults differ; joined in one
    dataclass, half of its fields would be refused for each. So they are three commands, and the flag chooses.

    Raises:
        ValueError: for an architecture that there is not.
    """
    if arguments[:1] != ["train"]:
        return arguments or ["--help"]
    given = [i for i, argument in enumerate(arguments) if argument.split("=", 1)[0] == "--arch"]
    if not given:
        return arguments
    value = arguments[given[0]].partition("=")[2]
    chosen = value or next(iter(arguments[given[0] + 1 :]), "nothing")
    if chosen == "None":
        return arguments
    if chosen not in ARCHS:
        raise ValueError(f"--arch takes {', '.join(ARCHS)}, got {chosen}{_near(chosen, ARCHS)}")
    return [ARCHS[chosen], *arguments[1:]]


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments make; help is shown, and ends it.

    Raises:
        ValueError: for a value that a dataclass of ours refuses, in its words; for all else that cannot be parsed, in a
            line in the place of tyro's box.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said), _wide():
            return _parse(arguments)
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None:
            if isinstance(cause, ValueError) and _is_ours(cause):
                raise cause from None
            cause = cause.__context__
        if stop.code:
            raise ValueError(_refusal(arguments, said.getvalue())) from None
    try:
        return _parse(arguments)  # help once more, aloud
    finally:
        sys.stdout.flush()


def _parse(arguments: list[str]) -> Any:
    return tyro.cli(
        reduce(or_, COMMANDS),
        prog="streamnorm",
        description="Normalization for neural networks that learn from streams.",
        args=arguments,
        config=(OmitArgPrefixes,),
    )


def _refusal(arguments: list[str], said: str) -> str:
    """What is wrong with arguments about which tyro ``said`` something."""
    name = arguments[0]
    if name not in NAMES:
        return f"unknown command {name!r}{_near(name, NAMES)}; the commands are {', '.join(NAMES)}"
    known = _flags(name)
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in (word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")):
        if flag not in known:
            others = ", ".join(other for other in NAMES if flag in _flags(other))
            hint = f", which belongs to {others}" if others else _near(flag, known)
            return f"{name} has no {flag}{hint}; see streamnorm {name} --help"
    lines = "\n".join(line.strip().removeprefix("│").removesuffix("│") for line in said.splitlines())
    reason = [part for part in re.split(r"\n\W*[-─]{9,}\W*\n", f"\n{lines}\n") if part.strip()][1]
    return f"{' '.join(reason.split()).rstrip('.')}; see streamnorm {name} --help"


def _flags(name: str) -> list[str]:
    """The flags of a command, as its help lists them."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit), _wide():
        _parse([name, "--help"])
    lists = re.findall(r"^\W*(?:-h, )?(--[a-z][a-z, -]*)", said.getvalue(), re.MULTILINE)
    return [flag for found in lists for flag in re.findall(r"--[a-z-]+", found)]


@contextmanager
def _wide() -> Iterator[None]:
    """Inside, lines are as long as they are, whatever the terminal."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "5000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _is_ours(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals["__name__"].startswith("streamnorm.")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command ``streamnorm``. Returns the exit status: 2 for input that cannot be used."""
    command: Any = None
    try:
        command = _parsed(_routed(sys.argv[1:] if arguments is None else arguments))
        _expect_alone(command)
        COMMANDS[type(command)](command)
        sys.stdout.flush()
    except BrokenPipeError:  # nothing here writes to another pipe than the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python sends the rest at its exit
        return READER_HAS_GONE
    except (ValueError, OSError, ImportError) as error:
        process = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
        print(f"streamnorm{'' if process == '0' else f', process {process}'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        reached = f" at {stop}" if str(stop) else ""
        print(f"\nstreamnorm: stopped{reached}{GOING_ON.get(type(command), '')}", file=sys.stderr)
        return 130
    return 0
