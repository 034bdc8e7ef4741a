"""Writing down what a study found: verdicts, table, curves and every figure, for ``docs/results``. Never trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.report import write_report
from streamnorm.lab.runs.summary import sentence, summarize, table
from streamnorm.lab.studies.study import Claim, Record, Records


def write_results(records: Records, claims: Sequence[Claim], out: Path, title: str, note: str = "") -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it report.html, results.json, curves.png."""
    runs = [record for seeds in records.values() for record in seeds]
    write_report(runs, out, title)
    lines = [*opening(runs[0], title), sentence(summarize(runs)), "", *verdicts(records, claims)]
    lines += ["", note, "", table(summarize(runs)), "", "![Learning curves](curves.png)", ""]
    path = out / "results.md"
    write(path, "\n".join(lines))
    return path


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


def _words(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
