"""Shared by all plots: colors, dashes, lines over seeds, the style of a panel. Imports nothing of ours, and matplotlib
only through its arguments."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's color-blind safe colors, without their yellow, which is too faint on white.
COLORS = {"none": "#7f8793", "batch": "#0072B2", "layer": "#009E73", "streaming": "#D55E00"}
OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#8F6BD1")
PALETTE = (*OTHER_COLORS, *COLORS.values())
DASHES = ("-", "--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 3)))


def colors_of(arms: Sequence[str]) -> list[str]:
    """An arm's own color for its first line, another one for each further line and for arms without one.

    >>> colors_of(["batch", "batch", "group"])
    ['#0072B2', '#CC79A7', '#56B4E9']
    """
    colors: list[str] = []
    for arm in arms:
        own = COLORS.get(arm)
        others = (color for color in PALETTE if color not in colors)
        colors.append(own if own and own not in colors else next(others, PALETTE[len(colors) % len(PALETTE)]))
    return colors


def draw(panel: Any, x: Sequence[float], seeds: Sequence[Sequence[float | None]], style: dict[str, Any]) -> None:
    """A line at the mean over the seeds, in a band from the lowest to the highest; a gap where one is not finite.
    Without seeds the line appears only in the legend."""
    if seeds:
        draw_columns(panel, x, list(zip(*seeds, strict=True)), style)
    else:
        panel.plot([], [], **style)


def draw_columns(panel: Any, x: Sequence[float], of: Sequence[Sequence[float | None]], style: dict[str, Any]) -> None:
    """``draw`` from the seeds' values at each x, whose number may vary."""
    columns: list[Any] = [[math.nan] if None in column else column for column in of]
    panel.plot(x, [statistics.fmean(column) for column in columns], linewidth=1.4, **style)
    panel.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=style["color"], alpha=0.15, linewidth=0)


def finish(panel: Any, title: str, axis: str) -> None:
    """Title, name of the x axis, grid, and a legend if any line has a name; an empty panel is removed."""
    if not panel.has_data():
        panel.set_axis_off()
        return
    panel.set_title(title, loc="left", size=10)
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(frameon=False, fontsize=8)


def whole_numbers(panel: Any) -> None:
    """Ticks at whole numbers along x, however few there are."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def logarithmic(panel: Any, at: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers at ``at`` in each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=at))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def png(figure: Any) -> bytes:
    """The bytes of a figure's PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
