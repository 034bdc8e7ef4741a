"""Writing down what a study found: verdicts, table, curves and every figure, for ``docs/results``. Never trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.report import write_report
from streamnorm.lab.runs.summary import sentence, summarize, table
from streamnorm.lab.studies.study import Claim, Record, Records, whole, with_failures


def write_results(records: Records, claims: Sequence[Claim], out: Path, title: str, note: str = "") -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it report.html, results.json, curves.png."""
    runs = [record for seeds in records.values() for record in seeds]
    write_report(runs, out, title)
    lines = [*opening(runs[0], title), sentence(summarize(runs)), "", *verdicts(records, claims)]
    lines += ["", note, "", summary(records), "", "![Learning curves](curves.png)", ""]
    return page(lines, out)


def page(lines: Sequence[str], out: Path) -> Path:
    """``results.md`` with these lines; its path."""
    write(out / "results.md", "\n".join(lines))
    return out / "results.md"


def keep(records: Records, out: Path, title: str) -> None:
    """``results.json``: every figure, None where one is not finite. A study that draws calls this first, so that a long
    training is not lost to a missing matplotlib."""
    kept = {"title": title, "records": finite(dict(records))}
    write(out / "results.json", json.dumps(kept, allow_nan=False) + "\n")


def opening(first: Record, title: str) -> list[str]:
    """The lines that say on what a study was carried out, from its first record."""
    lines = [f"# {title}", "", f"Data: {first['data']}. {first['source']}", ""]
    return [*lines, f"Versions: {_words(first['versions'])}. Machine: {_words(first['machine'])}.", ""]


def verdicts(records: Records, claims: Sequence[Claim]) -> list[str]:
    """The lines of the table of those claims whose runs are there, each checked and printed."""
    lines = ["| claim | verdict | figures |", "|---|---|---|"]
    for claim in (claim for claim in claims if set(claim.needs) <= set(records)):
        verdict, figures = claim.check(records)
        lines.append(f"| {claim.id}: {claim.text} | **{verdict}** | {figures} |")
        print(f"{claim.id} {verdict}: {figures}")
    return lines


def summary(records: Records) -> str:
    """The table of errors and losses of all runs of classifiers."""
    return table(summarize([record for seeds in records.values() for record in seeds]))


def lines_of(records: Records, head: Sequence[str], cells: Callable[[str, Sequence[Record]], list[str]]) -> str:
    """A Markdown table with a line for each name: the ``cells`` of those that trained to their end, or why none did."""
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    for name, seeds in records.items():
        if able := whole(seeds):
            lines.append([with_failures(name, seeds), *cells(name, able)])
        else:
            lines.append([name, seeds[0]["failed"] or "", *[""] * (len(head) - 2)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _words(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
