"""The report of a comparison: one HTML page that needs no other file, beside it the picture and every figure.

Words and figures come from ``summary``, the picture from ``curves``; here they are put on the page and into files.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from streamnorm.training.checkpoint import write
from streamnorm.training.curves import picture
from streamnorm.training.summary import DASH, MINUS, Run, by_label, cells, fixed, ranked, sentence, summarize


def write_report(runs: Sequence[Run], folder: Path, title: str) -> Path:
    """Write ``report.html``, ``results.json`` and ``curves.png`` into ``folder``, each of them whole or not at all.

    Returns:
        The path of ``report.html``.

    Raises:
        ImportError: without matplotlib; ``results.json`` is written by then.
        ValueError: as ``summarize``.
    """
    rows = summarize(runs)
    record = {"title": title, "sentence": sentence(rows), "rows": [asdict(row) for row in rows], "runs": list(runs)}
    # First, so that a long training is not lost to a missing matplotlib.
    write(folder / "results.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    light = picture(runs)
    write(folder / "curves.png", light)
    write(folder / "report.html", _page(runs, title, light, picture(runs, dark=True)))
    return folder / "report.html"


def _page(runs: Sequence[Run], title: str, light: bytes, dark: bytes) -> str:
    rows = summarize(runs)
    settings = {label: _values(map(_settings, group)) for label, group in by_label(runs).items()}
    every = _values(map(_settings, runs))
    shared = {key: values for key, values in every.items() if len(values) == 1}
    differing = [key for key in every if key not in shared]
    lines = [[label, *(", ".join(own[key]) for key in differing)] for label, own in settings.items()]
    return PAGE.substitute(
        title=escape(title),
        sentence=escape(sentence(rows)).replace(" %", "&nbsp;%"),
        table=_table(*cells(rows), strong=[row.label for row in ranked(rows)[0]]),
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(dark).decode(),
        seeds=_table(*_seeds(runs)),
        data=escape(f"{runs[0]['data']}: {runs[0]['source']}"),
        shared=_pairs(shared),
        differing=_table(["Arm", *differing], lines) if differing else "",
        machine=_pairs(_values({**run["versions"], **run["machine"]} for run in runs)),
    )


def _settings(run: Run) -> dict[str, Any]:
    """All but what the table says, and what an architecture does not have."""
    return {key: value for key, value in run["run"].items() if key not in ("arm", "seed", "data") and value != []}


def _values(dicts: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The different values of each key, as text."""
    found: dict[str, list[str]] = {}
    for key, value in (item for d in dicts for item in d.items()):
        text = value if isinstance(value, str) else "default" if value is None else json.dumps(value)
        values = found.setdefault(key, [])
        if text not in values:
            values.append(text)
    return found


def _seeds(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of all runs."""
    head = ["Arm", "Seed", "Epochs", "Updates", "Samples", "Training loss (nats)", "Training error (%)"]
    head += ["Test loss (nats)", "Test error (%)", "Time (s)", "Note"]
    lines = []
    for run in runs:
        end = run["metrics"][-1] if run["metrics"] else {}
        counts = [str(end.get(key, DASH)) for key in ("epoch", "updates", "samples")]
        figures = [
            text
            for part in ("train", "test")
            for text in (fixed(end.get(f"{part}_loss"), unit=1, places=4), fixed(end.get(f"{part}_error")))
        ]
        seconds = f"{sum(m['seconds'] for m in run['metrics']):.1f}" if end else DASH
        lines.append([run["label"], str(run["seed"]), *counts, *figures, seconds, run["failed"] or end.get("note", "")])
    return head, lines


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], strong: Sequence[str] = ()) -> str:
    """Columns of figures stand to the right; columns without any content are left out."""
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    figure = re.compile(rf"[-+{MINUS}]?\d|{DASH}$|reference$")
    marks = {i: ' class="n"' if all(figure.match(line[i]) for line in lines) else "" for i in kept}

    def html(line: Sequence[str], tag: str) -> str:
        best = ' class="best"' if line[0] in strong else ""
        return f"<tr{best}>{''.join(f'<{tag}{marks[i]}>{escape(line[i])}</{tag}>' for i in kept)}</tr>"

    body = "".join(html(line, "td") for line in lines)
    return f'<div class="wide"><table>{html(head, "th")}{body}</table></div>'


def _pairs(values: Mapping[str, Sequence[str]]) -> str:
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(', '.join(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(items)}</dl>"


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1d2127; --soft: #5a626e; --line: #dfe2e7; --paper: #fff; --mark: #f1f4f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6eb; --soft: #9aa3b0; --line: #343a44; --paper: #15181d; --mark: #20262f } }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
p { max-width: 46rem; overflow-wrap: anywhere } .said { font-size: 1.2rem; max-width: 52rem; margin: 0 0 1.75rem }
.wide { overflow-x: auto; margin: 0 0 1.25rem } summary { cursor: pointer; margin: 0 0 .75rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums lining-nums }
th, td { padding: .4rem .8rem .4rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th, dt, summary { color: var(--soft); font-weight: 500 } th { vertical-align: bottom } .n { text-align: right }
td.n { white-space: nowrap } td:first-child, td:last-child:not(.n) { min-width: 13rem }
.best td { font-weight: 650; background: var(--mark) }
img { display: block; width: 100%; min-width: 44rem; margin-top: 1rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem 1rem; margin: 0 0 1.5rem }
dt, dd { font-size: .9rem; margin: 0; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>$title</h1>
<p class="said">$sentence</p>
$table
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,$dark">
<img alt="Training loss and test error of each arm over the epochs; the table above has the final figures."
src="data:image/png;base64,$light">
</picture></div>
<h2>How to read this</h2>
<p>S/B is samples per batch, B/U batches per weight update. Figures are the mean over seeds ± the sample standard
deviation at each run&rsquo;s last epoch; &ldquo;lowest&rdquo; is the best of any epoch and seed, chosen on the test
set, hence optimistic. In bold: the lowest test error and all that are level with it, nearer than the larger of the two
deviations; an arm which lost a seed is not ranked. Differences pair runs of the same seed, at the last epoch both have;
below zero is better than the reference. In the picture a line is the mean over seeds, its band from the lowest seed to
the highest.</p>
<details><summary>Each seed</summary>
$seeds
</details>
<h2>Settings</h2>
<p>Data: $data.</p>
$shared
$differing
<h2>Versions and machine</h2>
$machine
</body>
</html>
""")
