"""The study of sigmoid units as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.drawing import COLORS, DASHES, colors_of, draw, finish, logarithmic, png
from streamnorm.lab.studies.study import with_failures

Record = Mapping[str, Any]
TYPICAL = 0
"""The unit whose input is drawn."""
SHOWN = ("none", "batch", "streaming")
LINES = (*SHOWN, "streaming 1 x 60")
TICKS = (1.0, 2.0, 3.0, 5.0)


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
    finish(below[0], "Test error, %", "weight update")
    logarithmic(below[0], TICKS)
    for (arm, errors), color in zip(by_scale.items(), (COLORS[arm] for arm in by_scale), strict=True):
        seeds = list(zip(*([100 * e for e in errors[scale]] for scale in errors), strict=True))
        draw(below[1], list(errors), seeds, {"color": color, "label": arm, "marker": "o", "markersize": 4})
    below[1].set_xscale("log")
    finish(below[1], "Last test error, % (90 for a run that diverged)", "scale of the initial weights")
    for name, style in _styles(("batch", *naive), records):
        _curve(below[2], records[name], "weights", 1, style)
    logarithmic(below[2], TICKS)
    finish(below[2], "Norm of all weights", "weight update")
    return png(figure)


def _percentiles(panel: Any, name: str, record: Record) -> None:
    updates = [look["updates"] for look in record["trace"]]
    color = COLORS[name]
    for i, width in enumerate((0.9, 1.7, 0.9)):
        panel.plot(updates, [look["percentiles"][i][TYPICAL] for look in record["trace"]], color=color, linewidth=width)
    finish(panel, f"{name}: input of one sigmoid, percentiles 15, 50, 85", "weight update")


def _styles(names: Sequence[str], records: Mapping[str, Sequence[Record]]) -> list[tuple[str, dict[str, Any]]]:
    """A color for each name, with how many of its seeds failed."""
    return [
        (name, {"color": color, "linestyle": dash, "label": with_failures(name, records[name])})
        for name, color, dash in zip(names, colors_of(names), cycle(DASHES), strict=False)
    ]


def _curve(panel: Any, records: Sequence[Record], key: str, unit: float, style: dict[str, Any]) -> None:
    whole = [record["trace"] for record in records if record["trace"] and not record["failed"]]
    updates = [look["updates"] for look in whole[0]] if whole else []
    draw(panel, updates, [[unit * look[key] for look in t] for t in whole], style)
