"""The commands that carry out a study anew, and that show what is recorded. Need the extra ``cli``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.registry import STUDIES, study

LISTED = "\n\n".join(f"{name}: {what}." for name, what in STUDIES.items())


@dataclass(frozen=True)
class Reproduce:
    """Carry out a study: train what is missing, check the claims, write down verdicts and figures."""

    name: Positional[Annotated[str, arg(metavar="NAME", help=LISTED)]] = ""
    list: FlagCreatePairsOff[bool] = False
    """Show what is recorded of every study, what is missing and how long that takes; train nothing."""
    arguments: Arguments = field(default_factory=Arguments)


def reproduce(command: Reproduce) -> None:
    """Carry out a study, in a folder that no other command writes to meanwhile, and say where its record is.

    Raises:
        ValueError: without the name of a study.
    """
    if command.list:
        from streamnorm.lab.studies.listing import listed

        print("\n".join(listed(command.arguments)))
        return
    if not command.name:
        raise ValueError(f"reproduce takes the name of a study, one of {', '.join(STUDIES)}; --list shows them all")
    from streamnorm.lab.runs.lock import describe, expect_own, held

    carry_out, arguments = study(command.name), command.arguments
    out, what = arguments.folder(command.name), f"the study {command.name}, tier {arguments.tier}"
    with held(out, what):
        expect_own(out, what)
        describe(out, what, {})
        record = carry_out(arguments)
    print(f"Record: {record}")


@dataclass(frozen=True)
class Report:
    """Write one page of what is recorded: Table 1 beside the paper's, every claim with its verdict, every figure."""

    results: Path = Path("docs/results")
    """Folder of the records."""
    out: Path = Path("report.html")
    """The page, which needs no other file."""


def report(command: Report) -> None:
    """Write the page of all records and say where it is."""
    from streamnorm.lab.runs.checkpoint import write
    from streamnorm.lab.studies.overview import overview

    write(command.out, overview(command.results))
    print(f"Report: {command.out}")
