"""One page of everything that is recorded: Table 1 ours beside the paper's, every claim with its verdict, every figure
beside the statements about it. From records alone. Imports the reading of records and the look of pages."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from streamnorm.lab.runs.page import STYLE, table
from streamnorm.lab.studies.recorded import APPROACHES, COLUMNS, PAPER, Recorded, agreement, read_all, table_1

WORDS = {"works": "works", "behind": "behind", "fails": "fails", "unknown": "no record"}


def overview(folder: Path) -> str:
    """A page of HTML that needs no other file.

    Raises:
        FileNotFoundError: if the folder holds no record, or a picture of one is missing.
    """
    records = read_all(folder)
    counted = Counter(verdict for record in records for _, verdict, _ in record.claims)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
    body = [
        f"<p class='said'>{len(records)} records, {sum(counted.values())} verdicts on claims: {escape(said)}.</p>",
        "<h2>Table 1, ours beside the paper&rsquo;s</h2>",
        *_table_1(records),
        "<h2>Claims</h2>",
        table(["claim", "verdict", "figures", "record"], [_claim(r, *c) for r in records for c in r.claims]),
        *(part for record in records for part in _section(record)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{TITLE}</title><style>{STYLE}</style>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{TITLE}</h1>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


TITLE = "Streaming Normalization: what is recorded"


def _claim(record: Recorded, claim: str, verdict: str, figures: str) -> list[str]:
    return [claim, verdict, figures, record.path.name]


def _table_1(records: Sequence[Recorded]) -> list[str]:
    ours = table_1(records)
    same, all_ = agreement(ours)
    head = ["Approach", *(column.title for column in COLUMNS), "All combined"]
    lines = []
    for approach, line, paper in zip(APPROACHES, ours, PAPER, strict=True):
        cells = [
            WORDS[mark]
            + (f" ({figure:g})" if figure is not None else "")
            + ("" if mark == wanted else f"; paper: {WORDS[wanted]}")
            for (mark, figure), wanted in zip(line, paper, strict=True)
        ]
        lines.append([approach, *cells])
    columns = "; ".join(
        f"{column.title}: {column.study}, within {column.margin:g} of the best works, from {column.chance:g} on fails"
        for column in COLUMNS
    )
    rule = f"Derived from the records: {columns}. Test errors in per cent, validation losses of Rec &amp; FC in nats."
    return [table(head, lines), f"<p>{same} of {all_} cells agree (C-01). {rule}</p>"]


def _section(record: Recorded) -> list[str]:
    parts = [f"<h2>{escape(record.title)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in record.opening]
    parts += [_picture(path) for path in record.pictures]
    if record.claims:
        parts.append(table(["claim", "verdict", "figures"], [[*claim] for claim in record.claims]))
    return parts


def _picture(path: Path) -> str:
    what = re.sub(r"[-_]", " ", path.stem[11:])
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{escape(what)}" src="data:image/png;base64,{image}"></div>'
