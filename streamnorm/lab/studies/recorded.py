"""Reading the records of ``docs/results`` again: title, hardware, verdicts, the figures of every run, and Table 1 from
them. Never trains, and imports nothing of ours.

Table 1 of the paper says where each approach works. Here a cell is derived from the record of a study: an approach
works where it is within a margin of the best of its column, is behind where it is not but learns, and fails where it
could not train or is near chance. Limited and Suboptimal in the paper, and its footnote on layer normalization, are
read as: works, is behind, is behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mark = Literal["works", "behind", "fails", "unknown"]
ORDER: tuple[Mark, ...] = ("works", "behind", "fails", "unknown")
"""From the best on."""


@dataclass(frozen=True)
class Recorded:
    """A record.

    Attributes:
        path: its file.
        title: of its first line.
        opening: the paragraphs before the first table: data, versions, machine.
        claims: id and text, verdict and figures, of each claim.
        figures: of each run by name, its first mean over seeds; None if it has none.
        pictures: the files of its pictures.
    """

    path: Path
    title: str
    opening: tuple[str, ...]
    claims: tuple[tuple[str, str, str], ...]
    figures: Mapping[str, float | None]
    pictures: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The name of its study."""
        return self.path.stem[11:]


def read(path: Path) -> Recorded:
    """The record in a Markdown file.

    Raises:
        ValueError: if it has no title.
    """
    text = path.read_text(encoding="utf-8")
    title, _, body = text.partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"{path} is no record of a study: its first line is no title")
    opening = [part.strip() for part in re.split(r"^(?:\||## )", body, maxsplit=1, flags=re.MULTILINE)[0].split("\n\n")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in body.splitlines() if line[:1] == "|"]
    claims = [(row[0], row[1].strip("*"), row[2]) for row in rows if len(row) == 3 and row[1].startswith("**")]
    pictures = [path.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", body)]
    figures = {_name(row[0]): _figure(row[1:]) for row in reversed(rows) if len(row) > 3}
    return Recorded(path, title[2:].strip(), tuple(filter(None, opening)), tuple(claims), figures, tuple(pictures))


def read_all(folder: Path) -> list[Recorded]:
    """Every record of a folder, in the order of their dates.

    Raises:
        FileNotFoundError: if it holds none.
    """
    paths = sorted(folder.glob("[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]-*.md"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no record of a study; give the folder docs/results of the source")
    return [read(path) for path in paths]


def _name(cell: str) -> str:
    return re.sub(r" \(\d+ of \d+ seeds failed\)$", "", cell.strip("*"))


def _figure(cells: Sequence[str]) -> float | None:
    for cell in cells:
        if found := re.match(r"(-?\d+\.\d+) ± ", cell.strip("*")):
            return float(found[1])
    return None


@dataclass(frozen=True)
class Column:
    """A column of Table 1: the study that says it, the runs of the approaches, and what counts as near and as failed.

    Attributes:
        runs: of BN, TSBN, LN and streaming; where no layer is called twice, time-specific BN is BN.
    """

    title: str
    study: str
    runs: tuple[str, str, str, str]
    margin: float
    chance: float


APPROACHES = ("Original Batch Normalization", "Time-specific BN", "Layer Normalization", "Streaming Normalization")
_A = "batch 64 x 1", "batch 64 x 1", "layer 64 x 1", "streaming 2 x 32"
_B = "batch 32 x 1", "batch 32 x 1", "layer 32 x 1", "streaming Figure 6, 32 x 1"
COLUMNS = (
    Column("FF & FC", "online", _A, 2.0, 85.0),
    Column("FF & Conv", "convolutional", _B, 2.0, 85.0),
    Column("Rec & FC", "shakespeare", ("rnn batch", "rnn tsbn", "rnn layer", "rnn streaming"), 0.05, 3.3),
    Column("Rec & Conv", "unrolled", ("C batch", "C tsbn", "C layer", "C streaming"), 2.0, 85.0),
    Column("Online", "online", ("batch 1 x 64", "batch 1 x 64", "layer 1 x 64", "streaming 1 x 64"), 2.0, 85.0),
    Column("Small batch", "online", ("batch 2 x 32", "batch 2 x 32", "layer 64 x 1", "streaming 2 x 32"), 2.0, 85.0),
)
"""Errors in per cent, losses in nats; 3.3 nats is what the frequencies of characters alone give."""
PAPER: tuple[tuple[Mark, ...], ...] = (
    ("works", "works", "fails", "fails", "fails", "behind", "fails"),
    ("works", "works", "works", "works", "fails", "behind", "fails"),
    ("works", "behind", "works", "behind", "works", "works", "behind"),
    ("works", "works", "works", "works", "works", "works", "works"),
)
"""Table 1 of the paper, a line for each approach; the last column is all combined."""


def table_1(records: Sequence[Recorded]) -> list[list[tuple[Mark, float | None]]]:
    """Our Table 1: for each approach its marks and the figures that they stand on; the last column is the worst of the
    line."""
    latest = {record.name: record for record in records}
    lines: list[list[tuple[Mark, float | None]]] = [[] for _ in APPROACHES]
    for column in COLUMNS:
        found = latest[column.study].figures if column.study in latest else {}
        figures = [found.get(run) for run in column.runs]
        best = min((figure for figure in figures if figure is not None), default=None)
        for line, run, figure in zip(lines, column.runs, figures, strict=True):
            line.append((_mark(column, figure, best, run in found), figure))
    for line in lines:
        marks = [mark for mark, _ in line]
        line.append((ORDER[max(map(ORDER.index, marks))], None))
    return lines


def _mark(column: Column, figure: float | None, best: float | None, is_there: bool) -> Mark:
    if not is_there:
        return "unknown"
    if figure is None or best is None or figure >= column.chance:
        return "fails"
    return "works" if figure <= best + column.margin else "behind"


def agreement(ours: Sequence[Sequence[tuple[Mark, float | None]]]) -> tuple[int, int]:
    """In how many cells our Table 1 is the paper's, and how many there are."""
    same = [
        mark == theirs
        for line, paper in zip(ours, PAPER, strict=True)
        for (mark, _), theirs in zip(line, paper, strict=True)
    ]
    return sum(same), len(same)
