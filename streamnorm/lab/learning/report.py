"""The report of a learned stream: one HTML page that needs no other file, beside it the picture and every figure."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template

from streamnorm.lab.learning.curves import picture
from streamnorm.lab.learning.figures import Record, best, cells, is_by_class, notes, sentence, title
from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.page import page, pairs, table, values_of


def write_report(record: Record, folder: Path) -> Path:
    """Write ``report.html``, ``results.json`` and ``curves.png`` into ``folder``, each of them whole or not at all.

    Returns:
        The path of ``report.html``.

    Raises:
        ImportError: without matplotlib; ``results.json`` is written by then.
    """
    said = {"title": title(record), "sentence": sentence(record), **record}
    write(folder / "results.json", json.dumps(finite(said), indent=1, allow_nan=False) + "\n")
    light = picture(record)
    write(folder / "curves.png", light)
    write(folder / "report.html", _page(record, light, picture(record, dark=True)))
    return folder / "report.html"


def _page(record: Record, light: bytes, dark: bytes) -> str:
    columns = record["columns"]
    shown = ", ".join(columns[:30]) + (f" and {len(columns) - 30:,} more" if len(columns) > 30 else "")
    classes = f" of {record['classes']:,} classes" if is_by_class(record) else ""
    figure = "accuracy" if is_by_class(record) else "mean absolute error"
    body = BODY.substitute(
        notes="".join(f"<p>{escape(note)}</p>\n" for note in notes(record)),
        figure=figure,
        data=escape(f"{record['source']}: {record['target']}{classes}, from {shown}"),
        settings=pairs(values_of([record["settings"]])),
    )
    alt = f"The {figure} of each predictor over the rows; the table above has the final figures."
    machine = pairs(values_of([{**record["versions"], **record["machine"]}]))
    return page(
        title(record), sentence(record), table(*cells(record), strong=best(record)), light, dark, alt, body, machine
    )


BODY = Template("""$notes<h2>How to read this</h2>
<p>Each row was predicted first and learned from then, with one weight update; no row was seen twice. A figure is the
$figure of these predictions. The dashed lines need no network: a network that is not ahead of them has learned nothing
that they do not know. In bold: the best normalization. Rows a second are those of its network alone.</p>
<h2>Settings</h2>
<p>Data: $data.</p>
$settings
""")
