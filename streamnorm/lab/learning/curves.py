"""The curve of a learned stream as a picture. Needs matplotlib, from the extra ``cli``, when it draws."""

from __future__ import annotations

import math
from typing import Any

from streamnorm.drawing import colors_of, png
from streamnorm.lab.learning.figures import Record, figure, is_by_class, names


def picture(record: Record, *, dark: bool = False) -> bytes:
    """A PNG, 1800 pixels wide: each predictor over the rows, on the last 1,000 rows and on all so far. Baselines are
    dashed; a cross marks where an arm failed.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("the curves need matplotlib: pip install 'streamnorm[cli]'") from error
    ink, faint, paper = ("#e3e6eb", "#343a44", "#15181d") if dark else ("#1d2127", "#e3e6ea", "#ffffff")
    curve, by_class = record["curve"], is_by_class(record)
    styles = _styles(record, ink)
    canvas = Figure(figsize=(12, 4.6), dpi=150, facecolor=paper, layout="constrained")
    what = "Accuracy, %" if by_class else "Mean absolute error"
    panels = canvas.subplots(1, 2, sharey=True)
    for panel, key, title in zip(panels, ("recent", "so_far"), ("last 1,000 rows", "all rows so far"), strict=True):
        panel.set_facecolor(paper)
        panel.set_title(f"{what}, {title}", loc="left", size=12, color=ink)
        panel.set_xlabel("row", size=11, color=ink)
        panel.tick_params(colors=ink, labelsize=10, which="both", length=0)
        panel.spines[:].set_visible(False)
        panel.grid(color=faint, linewidth=0.8)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}"))
        for name in names(record):
            line = [math.nan if value is None else value * (100 if by_class else 1) for value in curve[key][name]]
            panel.plot(curve["rows"], line, **styles[name])
            _mark_end(panel, curve["rows"], line, styles[name]["color"])
    _limit(panels[0], record)
    handles = [Line2D([], [], **styles[name]) for name in names(record)]
    labels = [f"{name}\n{figure(record['so_far'][name], record)}" for name in names(record)]
    legend = canvas.legend(
        handles, labels, loc="outside right upper", frameon=False, labelcolor=ink, handlelength=2.8, title="all rows"
    )
    legend.get_title().set_color(ink)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(canvas)


def _styles(record: Record, ink: str) -> dict[str, dict[str, Any]]:
    arms = [*record["arms"]]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": color, "linewidth": 1.8} for name, color in zip(arms, colors_of(arms), strict=True)
    }
    for name, dash in zip(record["baselines"], ("--", ":"), strict=True):
        styles[name] = {"color": ink, "linestyle": dash, "linewidth": 1.3, "alpha": 0.75}
    return styles


def _mark_end(panel: Any, rows: list[int], line: list[float], color: str) -> None:
    known = [i for i, value in enumerate(line) if not math.isnan(value)]
    if known and known[-1] < len(line) - 1:
        panel.plot(rows[known[-1]], line[known[-1]], "x", color=color, markersize=9, markeredgewidth=2)


def _limit(panel: Any, record: Record) -> None:
    """The first points are of few rows, and may lie anywhere: the axis is for what came after them."""
    curve, unit = record["curve"], 100 if is_by_class(record) else 1
    start = next((i for i, row in enumerate(curve["rows"]) if row >= min(200, record["rows"] // 4)), 0)
    later = [v for key in ("recent", "so_far") for line in curve[key].values() for v in line[start:] if v is not None]
    if not later:
        return
    low, high = min(later) * unit, max(later) * unit
    if not is_by_class(record):  # an arm on its way to divergence is off by any factor
        ends = [v for key in ("recent", "so_far") for n in record["baselines"] if (v := record[key][n]) is not None]
        high = min(high, 5 * max(ends, default=high) or high)
    room = 0.06 * (high - low) or 1.0
    panel.set_ylim(max(low - room, -0.5 * room), min(high + room, 100.5) if is_by_class(record) else high + room)
