"""The report of a comparison: one HTML page that needs no other file, beside it the picture and every figure.

Words and figures come from ``summary``, the picture from ``curves``; here they are put on the page and into files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.curves import picture
from streamnorm.lab.runs.page import page, pairs, table, values_of
from streamnorm.lab.runs.summary import DASH, Run, by_label, cells, fixed, ranked, sentence, summarize


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
    settings = {label: values_of(map(_settings, group)) for label, group in by_label(runs).items()}
    every = values_of(map(_settings, runs))
    shared = {key: values for key, values in every.items() if len(values) == 1}
    differing = [key for key in every if key not in shared]
    lines = [[label, *(", ".join(own[key]) for key in differing)] for label, own in settings.items()]
    body = BODY.substitute(
        seeds=table(*_seeds(runs)),
        data=escape(f"{runs[0]['data']}: {runs[0]['source']}"),
        shared=pairs(shared),
        differing=table(["Arm", *differing], lines) if differing else "",
    )
    shown = table(*cells(rows), strong=[row.label for row in ranked(rows)[0]])
    machine = pairs(values_of({**run["versions"], **run["machine"]} for run in runs))
    return page(title, sentence(rows), shown, light, dark, ALT, body, machine)


def _settings(run: Run) -> dict[str, Any]:
    """All but what the table says, and what an architecture does not have."""
    return {key: value for key, value in run["run"].items() if key not in ("arm", "seed", "data") and value != []}


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


ALT = "Training loss and test error of each arm over the epochs; the table above has the final figures."
BODY = Template("""<h2>How to read this</h2>
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
""")
