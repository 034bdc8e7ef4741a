"""The record of a benchmark: a dated Markdown file with its pictures beside it, made from the journal. Never times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamnorm.lab.bench.device import CPU
from streamnorm.lab.bench.journal import Journal, Timed
from streamnorm.lab.bench.pictures import picture
from streamnorm.lab.bench.registry import GROUPS
from streamnorm.lab.bench.results import DEFAULT, TUNED, Row, allocators, curves, rows, totals, verdicts
from streamnorm.lab.bench.targets import THREADS
from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.summary import DASH

TITLES = {TUNED: "Memory kept by the process", DEFAULT: "Default allocator"}
READ = """\
A figure is the median over {rounds} rounds; in each round everything that is compared was timed once, in random order,
in one process, and a ratio is to the reference's time of the same round, with the quartiles in brackets. Below 1 is
faster than the reference. Every layer of ours was first compared with the oracle and with float64.

*Ideal MB* is what an ideal implementation moves, with stores past the cache and, in brackets, with ordinary ones, which
read what they overwrite; values that stay in the second cache between statistics and map are read once for both.
*Floor* is how many times longer a step takes than moving just that, at the bandwidth below.

*Peak MB*, where memory is compared, is the most that a step holds at a time beyond weights, statistics and the
optimizer's averages.
"""
KEPT = """\
*Memory kept by the process*: glibc was told not to hand large blocks back (`MALLOC_MMAP_THRESHOLD_` and the like), so
that page faults, which otherwise cost as much as the layers, are out of the comparison; *default allocator*: as it
comes.
"""
KEPT_THERE = """\
Layers, inputs and gradients are on the device, and a sample ends when the device has done its work. *Memory kept by the
process*: by torch, which does so on a device.
"""


def write_record(journal: Journal) -> Path:
    """The record of a journal, ``.md`` and a ``.png`` a group beside it.

    Raises:
        ImportError: without matplotlib; the journal holds all figures.
    """
    asked, facts = journal.head()
    cases = journal.cases()
    stem = journal.path.with_suffix("")
    pages = []
    for group in dict.fromkeys([*GROUPS, *(case.group for case in cases)]):
        mine = [case for case in cases if case.group == group]
        if mine:
            title = GROUPS[group].title if group in GROUPS else group
            image = stem.with_name(f"{stem.name}-{group}.png")
            write(image, picture(mine, title))
            pages.append(_group(title, image.name, mine, _judged(asked)))
    text = "\n".join([*_head(stem.name, asked, facts), *_judgement(cases, asked), *_floor(cases), *pages])
    path = stem.with_suffix(".md")
    write(path, text)
    return path


def _head(name: str, asked: dict[str, Any], facts: dict[str, str]) -> list[str]:
    lines = [f"# Benchmarks, {name}", ""]
    if asked["quick"]:
        lines += ["**A quick run on tiny inputs: it shows that everything works and says nothing about speed.**", ""]
    lines += [READ.format(rounds=asked["rounds"]), KEPT if _on_cpu(asked) else KEPT_THERE]
    table = [[key, f"`{value}`" if key == "command" else value] for key, value in facts.items()]
    return [*lines, _table(["", ""], [["threads", str(asked["threads"])], *table], "::"), ""]


def sentences(journal: Journal) -> list[str]:
    """A line for each target that this run can be judged by."""
    asked, _ = journal.head()
    head, lines = _targets(journal.cases()) if _judged(asked) else ([], [])
    return [", ".join(f"{name} {cell}".strip() for name, cell in zip(head, line, strict=True)) for line in lines]


def _judged(asked: dict[str, Any]) -> bool:
    """Whether the targets are for runs like this one."""
    return asked["threads"] == THREADS and not asked["quick"] and _on_cpu(asked)


def _on_cpu(asked: dict[str, Any]) -> bool:
    """Older journals are all of the CPU."""
    return asked.get("device", CPU) == CPU


def _targets(cases: Sequence[Timed]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of targets."""
    lines = []
    for target, measured, met in verdicts([case for case in cases if case.allocator == TUNED]):
        cases_of = " ".join(filter(None, (target.group, target.cases)))
        figures = [f"{measured.mean:.2f}", f"{measured.worst:.2f}", str(target), "met" if met else "missed"]
        lines.append([cases_of, measured.variant, measured.reference, *figures])
    return ["", "", "to", "mean", "worst", "target", ""], lines


def _judgement(cases: Sequence[Timed], asked: dict[str, Any]) -> list[str]:
    _, lines = _targets(cases)
    if not lines or asked["quick"]:
        return []
    note = []
    if not _judged(asked):
        note = [f"The targets are for {THREADS} threads of a CPU; nothing is judged by this run.", ""]
        lines = [[*line[:-1], DASH] for line in lines]
    head = ["cases", "variant", "to", "geometric mean", "worst", "target", "verdict"]
    return ["## Targets", "", *note, _table(head, [[*line[:-1], _strong(line[-1])] for line in lines], ":::--::"), ""]


def _strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "missed" else verdict


def _floor(cases: Sequence[Timed]) -> list[str]:
    """The bandwidth that was measured last under each allocator."""
    latest = {case.allocator: case.floor for case in cases if case.floor}
    parts = ["## Memory floor", "", "GB/s, read and written, of tensors of so many MiB:", ""]
    for allocator, measured in latest.items():
        head = [TITLES[allocator].lower(), *(f"{row['size'] / 2**20:g}" for row in measured)]
        lines = [[name, *(f"{row[name] / 1e9:.0f}" for row in measured)] for name in ("copy", "triad")]
        parts += [_table(head, lines, ":" + "-" * len(measured)), ""]
    return parts if latest else []


def _group(title: str, image: str, cases: Sequence[Timed], judged: bool) -> str:
    parts = [f"## {title}", "", f"![{title}]({image})", ""]
    for allocator in allocators(cases):
        mine = [case for case in cases if case.allocator == allocator]
        parts += [f"### {title}: {TITLES[allocator].lower()}", ""]
        if mine[0].series:
            parts += _growth(mine)
        else:
            parts += [_totals(mine, judged and allocator == TUNED), ""]
            for case in mine:
                parts += [f"{case.name}:", "", _case(rows(case), case.reference), ""]
    return "\n".join(parts)


def _totals(cases: Sequence[Timed], judged: bool) -> str:
    """Every variant over the cases of its group; below, what a target compares otherwise."""
    shown = dict.fromkeys(totals(cases), "")
    if judged:
        shown |= {
            measured: f"{target}: {_strong('met' if met else 'missed')}" for target, measured, met in verdicts(cases)
        }
    lines = [
        [
            total.variant,
            total.reference,
            str(total.cases),
            f"{total.mean:.2f}",
            f"{total.worst:.2f}",
            total.worst_case if total.cases < len(cases) or total.cases > 1 else "",
            verdict,
        ]
        for total, verdict in shown.items()
    ]
    head = ["variant", "to", "cases", "geometric mean", "worst", "worst at", "target"]
    return _table(head, lines, "::---::")


def _case(found: Sequence[Row], reference: str) -> str:
    head = ["variant", "µs", f"to {reference}", "quartiles", "forward", "backward", "ideal MB", "floor"]
    peaks = any(row.peak is not None for row in found)
    head += ["peak MB"] * peaks
    lines = [
        [
            row.variant,
            _micros(row.seconds),
            f"{row.ratio[1]:.2f}",
            f"[{row.ratio[0]:.2f}, {row.ratio[2]:.2f}]",
            DASH if row.forward is None else f"{row.forward:.2f}",
            DASH if row.backward is None else f"{row.backward:.2f}",
            DASH if row.ideal is None else "{:.0f} ({:.0f})".format(*(size / 1e6 for size in row.ideal)),
            DASH if row.floor is None else "{:.1f} ({:.1f})".format(*row.floor),
            *([DASH if row.peak is None else f"{row.peak / 1e6:.1f}"] if peaks else []),
        ]
        for row in found
    ]
    return _table(head, lines, ":" + "-" * (len(head) - 1))


def _growth(cases: Sequence[Timed]) -> list[str]:
    """For each series the exponents, and microseconds at every size."""
    parts = []
    drawn = curves(cases)
    for series in dict.fromkeys(curve.series for curve in drawn):
        mine = [curve for curve in drawn if curve.series == series]
        head = [series, *(curve.variant for curve in mine)]
        lines = [
            [str(size), *(_micros(curve.seconds[size]) if size in curve.seconds else DASH for curve in mine)]
            for size in sorted({size for curve in mine for size in curve.seconds})
        ]
        slopes = [DASH if c.exponent is None else f"{c.exponent:.2f} ({c.low} to {c.high})" for c in mine]
        parts += [f"µs by {series}; at the end the exponent of the upper half, and its range:", ""]
        parts += [_table(head, [*lines, ["exponent", *slopes]], "-" * len(head)), ""]
    return parts


def _micros(seconds: float) -> str:
    """Three digits, thousands set apart.

    >>> _micros(1.23456), _micros(0.000012345)
    ('1,234,560', '12.3')
    """
    micros = seconds * 1e6
    return f"{micros:,.0f}" if micros >= 100 else f"{micros:.3g}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], sides: str) -> str:
    """A Markdown table; ``sides`` has a ``:`` for a column of words and a ``-`` for one of figures."""
    rule = [":---" if side == ":" else "---:" for side in sides.replace(" ", "")]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
