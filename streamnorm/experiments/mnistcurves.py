"""The study of sigmoid units as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.experiments.textcurves import draw
from streamnorm.training.curves import COLOURS, DASHES, OTHER_COLOURS

Record = Mapping[str, Any]
TYPICAL = 0
"""The unit whose input is drawn."""
SHOWN = ("none", "batch", "streaming")
LINES = (*SHOWN, "streaming 1 x 60")


def picture(
    records: Mapping[str, Sequence[Record]],
    by_scale: Mapping[str, Mapping[float, Sequence[float]]],
    naive: Sequence[str],
) -> bytes:
    """A PNG: above, percentiles 15, 50 and 85 of the input of one sigmoid of the last hidden layer over the updates, of
    the first seed; below, test error over the updates and over the scale of the initial weights, norm of the weights.

    A line is the mean over the seeds, its band from the lowest to the highest; a seed that failed is left out, and said
    to be.

    Args:
        records: name -> the records of its seeds.
        by_scale: arm -> scale -> the last test error of each seed.
        naive: the names whose weights are drawn beside those of batch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.4), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 3)
    for panel, name in zip(above, SHOWN, strict=True):
        _percentiles(panel, name, records[name][0])
    low = min(panel.get_ylim()[0] for panel in above)
    high = max(panel.get_ylim()[1] for panel in above)
    for panel in above:
        panel.set_ylim(low, high)
    for name, style in _styles(LINES, records):
        _curve(below[0], records[name], "test_error", 100, style)
    _finish(below[0], "Test error, %", "weight update")
    _logarithmic(below[0])
    for (arm, errors), color in zip(by_scale.items(), (COLOURS[arm] for arm in by_scale), strict=True):
        seeds = list(zip(*([100 * e for e in errors[scale]] for scale in errors), strict=True))
        draw(below[1], list(errors), seeds, {"color": color, "label": arm, "marker": "o", "markersize": 4})
    below[1].set_xscale("log")
    _finish(below[1], "Last test error, % (90 for a run that diverged)", "scale of the initial weights")
    for name, style in _styles(("batch", *naive), records):
        _curve(below[2], records[name], "weights", 1, style)
    _logarithmic(below[2])
    _finish(below[2], "Norm of all weights", "weight update")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _percentiles(panel: Any, name: str, record: Record) -> None:
    updates = [look["updates"] for look in record["trace"]]
    color = COLOURS[name]
    for i, width in enumerate((0.9, 1.7, 0.9)):
        panel.plot(updates, [look["percentiles"][i][TYPICAL] for look in record["trace"]], color=color, linewidth=width)
    panel.set_title(f"{name}: input of one sigmoid, percentiles 15, 50, 85", loc="left", size=10)
    panel.set_xlabel("weight update")
    panel.grid(alpha=0.3)


def _styles(names: Sequence[str], records: Mapping[str, Sequence[Record]]) -> list[tuple[str, dict[str, Any]]]:
    """A color for each name, with how many of its seeds failed."""
    colors = [COLOURS.get(name) for name in names]
    others = iter(OTHER_COLOURS)
    styles = []
    for name, color, dash in zip(names, colors, cycle(DASHES), strict=False):
        lost = sum(bool(record["failed"]) for record in records[name])
        said = f" ({lost} of {len(records[name])} seeds diverged)" if lost else ""
        styles.append((name, {"color": color or next(others), "linestyle": dash, "label": name + said}))
    return styles


def _curve(panel: Any, records: Sequence[Record], key: str, unit: float, style: dict[str, Any]) -> None:
    whole = [record["trace"] for record in records if record["trace"] and not record["failed"]]
    if not whole:
        panel.plot([], [], **style)
        return
    draw(panel, [look["updates"] for look in whole[0]], [[unit * look[key] for look in t] for t in whole], style)


def _logarithmic(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _finish(panel: Any, title: str, axis: str) -> None:
    panel.set_title(title, loc="left", size=10)
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
