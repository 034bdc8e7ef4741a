"""The learning curves of a comparison as a picture. Needs matplotlib, from the extra ``cli``, when it draws."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from streamnorm.drawing import COLORS, DASHES, OTHER_COLORS, logarithmic, png, whole_numbers
from streamnorm.lab.runs.summary import Row, Run, by_label, fixed, summarize

MARKERS_UP_TO = 15
"""Epochs that still have room for a dot each."""


def picture(runs: Sequence[Run], *, dark: bool = False) -> bytes:
    """A PNG, 1800 pixels wide, of training loss (nats) and test error (%) over the epochs.

    Each label is a line, the mean over its seeds, in a band from the lowest seed to the highest. A cross marks where a
    seed ends before the longest run does.

    Raises:
        ImportError: without matplotlib.
        ValueError: as ``summarize``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("the learning curves need matplotlib: pip install 'streamnorm[cli]'") from error
    rows = summarize(runs)
    ink, faint, paper = ("#e3e6eb", "#343a44", "#15181d") if dark else ("#1d2127", "#e3e6ea", "#ffffff")
    styles = _styles(rows)
    rows.sort(key=lambda row: (row.test_error is None, row.test_error or 0.0))
    names = [_name(row) for row in rows]
    lines = [Line2D([], [], linewidth=1.9, **styles[row.label]) for row in rows]
    height = max(4.4, 0.6 + sum(0.08 + 0.17 * len(name.splitlines()) for name in names))
    figure = Figure(figsize=(12, height), dpi=150, facecolor=paper, layout="constrained")
    panels = figure.subplots(1, 2)
    ended = False
    for axes, key, title, unit in zip(
        panels, ("train_loss", "test_error"), ("Training loss, nats", "Test error, %"), (1, 100), strict=True
    ):
        axes.set_facecolor(paper)
        axes.set_title(title, loc="left", size=12, color=ink)
        axes.set_xlabel("epoch", size=11, color=ink)
        axes.tick_params(colors=ink, labelsize=10, which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.grid(color=faint, linewidth=0.8)
        ended = _draw(axes, runs, styles, key, unit)
    if ended:
        names.append("a seed ends; the mean goes\non over the others")
        lines.append(Line2D([], [], color=ink, linestyle="", marker="x", markersize=8, markeredgewidth=2))
    legend = figure.legend(lines, names, loc="outside right upper", frameon=False, labelcolor=ink, handlelength=2.8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """An arm is a color, each of its labels another dash."""
    others = dict.fromkeys(row.arm for row in rows if row.arm not in COLORS)
    colors = COLORS | dict(zip(others, cycle(OTHER_COLORS), strict=False))
    styles, used = {}, []
    for row in rows:
        color = colors[row.arm]
        styles[row.label] = {"color": color, "linestyle": DASHES[used.count(color) % len(DASHES)]}
        used.append(color)
    return styles


def _name(row: Row) -> str:
    figures = [] if row.test_error is None else [f"{fixed(row.test_error)} %"]
    figures += [f"{row.counted} of {len(row.seeds)} seeds trained"] if row.failed else []
    return f"{textwrap.fill(row.label, 30)}\n{', '.join(figures)}"


def _draw(axes: Any, runs: Sequence[Run], styles: dict[str, dict[str, Any]], key: str, unit: float) -> bool:
    """One panel; returns whether a seed ends before the longest run."""
    longest = max(len(run["metrics"]) for run in runs)
    marker = "o" if longest <= MARKERS_UP_TO else ""
    drawn, ended = [], False
    for label, group in by_label(runs).items():
        seeds = [[m[key] * unit for m in run["metrics"]] for run in group]
        columns = [[seed[i] for seed in seeds if i < len(seed)] for i in range(max(map(len, seeds)))]
        epochs, style = range(1, len(columns) + 1), styles[label]
        axes.fill_between(epochs, [*map(min, columns)], [*map(max, columns)], color=style["color"], alpha=0.16, lw=0)
        axes.plot(epochs, [*map(statistics.fmean, columns)], marker=marker, markersize=3.5, linewidth=1.9, **style)
        for seed in seeds:
            if 0 < len(seed) < longest:
                axes.plot(len(seed), seed[-1], "x", color=style["color"], markersize=9, markeredgewidth=2)
                ended = True
        drawn += [value for column in columns for value in column]
    whole_numbers(axes)
    if drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 8:
        logarithmic(axes, (1.0, 2.0, 5.0))
    return ended
