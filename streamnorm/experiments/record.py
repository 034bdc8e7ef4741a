"""Writing down what a study found: verdicts, table, curves and every figure, for ``docs/results``. Never trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamnorm.experiments.study import Claim, Records
from streamnorm.training.checkpoint import write
from streamnorm.training.report import write_report
from streamnorm.training.summary import sentence, summarize, table


def write_results(records: Records, claims: Sequence[Claim], out: Path, title: str, note: str = "") -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it report.html, results.json, curves.png."""
    runs = [record for seeds in records.values() for record in seeds]
    write_report(runs, out, title)
    first = runs[0]
    lines = [f"# {title}", "", f"Data: {first['data']}. {first['source']}", ""]
    lines += [f"Versions: {_words(first['versions'])}. Machine: {_words(first['machine'])}.", ""]
    lines += [sentence(summarize(runs)), "", "| claim | verdict | figures |", "|---|---|---|"]
    for claim in claims:
        verdict, figures = claim.check(records)
        lines.append(f"| {claim.id}: {claim.text} | **{verdict}** | {figures} |")
        print(f"{claim.id} {verdict}: {figures}")
    lines += ["", note, "", table(summarize(runs)), "", "![Learning curves](curves.png)", ""]
    path = out / "results.md"
    write(path, "\n".join(lines))
    return path


def _words(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
