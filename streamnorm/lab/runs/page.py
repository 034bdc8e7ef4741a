"""What the pages of reports have in common: their frame, look, tables, and lists of settings. Imports the summary."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from streamnorm.lab.runs.summary import DASH, MINUS


def values_of(dicts: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The different values of each key, as text."""
    found: dict[str, list[str]] = {}
    for key, value in (item for d in dicts for item in d.items()):
        text = value if isinstance(value, str) else "default" if value is None else json.dumps(value)
        values = found.setdefault(key, [])
        if text not in values:
            values.append(text)
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]], strong: Sequence[str] = ()) -> str:
    """Columns of figures stand to the right; columns without any content are left out."""
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    figure = re.compile(rf"[-+{MINUS}]?\d|{DASH}$|reference$")
    marks = {i: ' class="n"' if all(figure.match(line[i]) for line in lines) else "" for i in kept}

    def html(line: Sequence[str], tag: str) -> str:
        best = ' class="best"' if line[0] in strong else ""
        return f"<tr{best}>{''.join(f'<{tag}{marks[i]}>{escape(line[i])}</{tag}>' for i in kept)}</tr>"

    body = "".join(html(line, "td") for line in lines)
    return f'<div class="wide"><table>{html(head, "th")}{body}</table></div>'


def pairs(values: Mapping[str, Sequence[str]]) -> str:
    """A list of names and their values."""
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(', '.join(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(items)}</dl>"


STYLE = """:root { --ink: #1d2127; --soft: #5a626e; --line: #dfe2e7; --paper: #fff; --mark: #f1f4f8 }
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
"""
"""For light and dark."""


_PAGE = Template("""<!DOCTYPE html>
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
<img alt="$alt"
src="data:image/png;base64,$light">
</picture></div>
$body<h2>Versions and machine</h2>
$machine
</body>
</html>
""")


def page(title: str, sentence: str, table: str, light: bytes, dark: bytes, alt: str, body: str, machine: str) -> str:
    """A report as one HTML page that needs no other file.

    Args:
        title, sentence: what it is about, and what came out; plain text.
        table, body, machine: HTML.
        light, dark: the picture as a PNG, for either color scheme.
        alt: what the picture shows, for who cannot see it.
    """
    return _PAGE.substitute(
        title=escape(title),
        style=STYLE,
        sentence=escape(sentence).replace(" %", "&nbsp;%"),
        table=table,
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(dark).decode(),
        alt=alt,
        body=body,
        machine=machine,
    )
