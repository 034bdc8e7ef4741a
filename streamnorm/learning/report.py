"""The report of a learned stream: one HTML page that needs no other file, beside it the picture and every figure."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from string import Template

from streamnorm.learning.curves import picture
from streamnorm.learning.figures import Record, best, cells, is_by_class, notes, sentence, title
from streamnorm.training.checkpoint import write
from streamnorm.training.keeping import finite
from streamnorm.training.page import STYLE, pairs, table, values_of


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
    return PAGE.substitute(
        title=escape(title(record)),
        style=STYLE,
        sentence=escape(sentence(record)).replace(" %", "&nbsp;%"),
        table=table(*cells(record), strong=best(record)),
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(dark).decode(),
        notes="".join(f"<p>{escape(note)}</p>\n" for note in notes(record)),
        figure="accuracy" if is_by_class(record) else "mean absolute error",
        data=escape(f"{record['source']}: {record['target']}{classes}, from {shown}"),
        settings=pairs(values_of([record["settings"]])),
        machine=pairs(values_of([{**record["versions"], **record["machine"]}])),
    )


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<h1>$title</h1>
<p class="said">$sentence</p>
$table
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,$dark">
<img alt="The $figure of each predictor over the rows; the table above has the final figures."
src="data:image/png;base64,$light">
</picture></div>
$notes<h2>How to read this</h2>
<p>Each row was predicted first and learned from then, with one weight update; no row was seen twice. A figure is the
$figure of these predictions. The dashed lines need no network: a network that is not ahead of them has learned nothing
that they do not know. In bold: the best normalization. Rows a second are those of its network alone.</p>
<h2>Settings</h2>
<p>Data: $data.</p>
$settings
<h2>Versions and machine</h2>
$machine
</body>
</html>
""")
