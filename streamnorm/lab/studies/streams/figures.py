"""The study of streams as pictures, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import math
from typing import Any

from streamnorm.drawing import COLORS, OTHER_COLORS, draw_columns, finish, png
from streamnorm.lab.studies.streams.claims import (
    VIEWS,
    WHOLE,
    accuracies,
    arms_of,
    best,
    mean,
    rows_of,
    settings,
    smooth,
)
from streamnorm.lab.studies.streams.runs import OPTIMIZERS
from streamnorm.lab.studies.study import Records

OWN = {"none": COLORS["none"], "layer": COLORS["layer"], "paper": COLORS["batch"], "default": COLORS["streaming"]}


def _colors(arms: list[str]) -> dict[str, str]:
    others = iter([color for color in (*OTHER_COLORS, "#000000", "#999933") if color not in OWN.values()])
    return {arm: OWN.get(arm) or next(others, "#444444") for arm in arms}


def heat_map(records: Records, features: str = "raw") -> bytes:
    """A PNG: the accuracy of each arm on each stream at its best setting, on the rows that all arms have, and beside it
    on all rows for the arms that have them."""
    from matplotlib.figure import Figure

    arms = arms_of(records)
    figure = Figure(figsize=(16, 1.2 + 0.55 * len(arms)), dpi=120, layout="constrained")
    for panel, same in zip(figure.subplots(1, 2), (True, False), strict=True):
        views, rows, table = [], [], []
        for view in VIEWS:
            cells = {arm: own for arm in arms if (own := settings(records, view, features, arm))}
            if not cells:
                continue
            reach = {arm: rows_of(view, own.values()) for arm, own in cells.items()}
            at = min(reach.values()) if same else max(reach.values())
            views.append(view)
            rows.append(at)
            table.append(
                [
                    mean(accuracies(cells[arm][best(cells[arm], at)], at)) if reach.get(arm, 0) >= at else math.nan
                    for arm in arms
                ]
            )
        _squares(panel, [f"{view.stream}\n{at:,} rows" for view, at in zip(views, rows, strict=True)], arms, table)
        which = "rows that all arms have" if same else "all rows"
        panel.set_title(f"Accuracy at the best rate, {features} features, {which}", loc="left", size=10)
    return png(figure)


def _squares(panel: Any, columns: list[str], arms: list[str], table: list[list[float]]) -> None:
    """Each column is colored by how far an arm is behind the best of it."""
    behind = [[(v - max(x for x in column if not math.isnan(x))) for v in column] for column in table]
    panel.imshow(
        [list(row) for row in zip(*behind, strict=True)], cmap="RdYlGn", vmin=-0.15, vmax=0, aspect="auto", alpha=0.6
    )
    for i, column in enumerate(table):
        for j, value in enumerate(column):
            if not math.isnan(value):
                panel.text(i, j, f"{value:.3f}", ha="center", va="center", size=8)
    panel.set_xticks(range(len(columns)), columns, size=7)
    panel.set_yticks(range(len(arms)), arms, size=8)


COLUMNS = 5
"""Panels beside each other."""


def over_rates(records: Records, features: str = "raw") -> bytes:
    """A PNG: accuracy against the rate, a panel for each stream and optimizer; bands over the seeds.
    All arms of a panel are compared on the rows that they all have."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    arms = arms_of(records)
    panels: dict[tuple[str, str, int], dict[str, dict[float, list[Any]]]] = {}
    for optimizer in OPTIMIZERS:
        for view in VIEWS:
            cells = {arm: settings(records, view, features, arm) for arm in arms}
            by_rate = {arm: {rate: own for (o, rate), own in c.items() if o == optimizer} for arm, c in cells.items()}
            if any(by_rate.values()):
                rows = rows_of(view, [own for c in by_rate.values() for own in c.values()])
                panels.setdefault((optimizer, view.stream, rows), by_rate)  # views that come to the same rows are one
    down = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.9 * down + 0.4), dpi=100, layout="constrained")
    grid = figure.subplots(down, COLUMNS, squeeze=False).flatten()
    for panel in grid[len(panels) :]:
        panel.set_axis_off()
    colors = _colors(arms)
    for panel, ((optimizer, stream, rows), by_rate) in zip(grid, panels.items(), strict=False):
        every = sorted({rate for cells in by_rate.values() for rate in cells})
        for arm, cells in by_rate.items():
            if cells:
                values = [accuracies(cells[rate], rows) for rate in sorted(cells)]
                draw_columns(panel, sorted(cells), values, {"color": colors[arm], "marker": "o", "markersize": 3})
        panel.set_xscale("log")
        panel.set_xticks(every, [f"{rate:g}" for rate in every])
        panel.minorticks_off()
        finish(panel, f"{stream}, {rows:,} rows", f"rate of {optimizer}")
    handles = [Line2D([], [], color=colors[arm], marker="o", markersize=3) for arm in arms]
    figure.legend(handles, arms, loc="outside upper center", ncols=len(arms), frameon=False, fontsize=9)
    return png(figure)


def around_drift(records: Records, features: str = "raw") -> bytes:
    """A PNG: accuracy over the last 200 rows on the streams that change, each arm at its best setting."""
    from matplotlib.figure import Figure

    arms = arms_of(records)
    views = [view for view in WHOLE if any(_drifts(settings(records, view, features, arm)) for arm in arms)]
    figure = Figure(figsize=(6 * max(1, len(views)), 4.2), dpi=120, layout="constrained")
    for panel, view in zip(figure.subplots(1, max(1, len(views)), squeeze=False)[0], views, strict=False):
        drift = 0
        for arm, color in _colors(arms).items():
            cells = settings(records, view, features, arm)
            if cells:
                own = cells[best(cells, rows_of(view, cells.values()))]
                drift = own[0]["drift"]
                curves = [smooth(record) for record in own]
                rows = [row for row, _ in curves[0]]
                columns = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
                panel.plot(rows, [mean(column) for column in columns], color=color, label=arm, linewidth=1.2)
        panel.axvline(drift, color="#444444", linewidth=0.8, linestyle=":")
        finish(panel, f"{view.name}: accuracy over the last 200 rows", "row")
    return png(figure)


def _drifts(cells: dict[Any, list[Any]]) -> bool:
    return any(own[0]["drift"] is not None for own in cells.values())
