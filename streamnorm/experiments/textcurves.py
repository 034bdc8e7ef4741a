"""The curves of language models as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.experiments.study import with_failures
from streamnorm.training.curves import COLOURS, DASHES, OTHER_COLOURS

Record = Mapping[str, Any]
PALETTE = (*OTHER_COLOURS, *COLOURS.values())
SPAN = 50
"""Neighbors in the moving average of the training loss (paper, section 7.6)."""


def smooth(values: Sequence[float | None], span: int = SPAN) -> list[float | None]:
    """A moving average whose span is made odd, and shrinks towards both ends so that it stays centered.

    As the function that the paper names does it: of 50 it takes 49, at the second value 3, at the first 1. An average
    with None is None.

    >>> smooth([1.0, 2.0, 6.0, 4.0, 8.0], 4)
    [1.0, 3.0, 4.0, 6.0, 8.0]
    """
    half = (span - 1) // 2
    last = len(values) - 1
    reach = [min(i, last - i, half) for i in range(len(values))]
    spans = (values[i - r : i + r + 1] for i, r in enumerate(reach))
    return [None if None in span else statistics.fmean(span) for span in spans]  # type: ignore[arg-type]


def picture(groups: Mapping[str, Mapping[str, Sequence[Record]]]) -> bytes:
    """A PNG with a row for each group: smoothed training loss, validation loss, and loss along longer sequences.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest; a seed that failed is
    left out, and said to be. The first run of an arm has the arm's color.

    Args:
        groups: title -> name -> the records of its seeds, up to 6 names.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4 * len(groups)), dpi=120, layout="constrained")
    for panels, (title, named) in zip(figure.subplots(len(groups), 3, squeeze=False), groups.items(), strict=True):
        colors: list[str] = []
        for name, records in named.items():
            whole = [record for record in records if record["metrics"] and not record["failed"]]
            own = COLOURS.get(records[0]["arm"])
            colors.append(own if own and own not in colors else next(c for c in PALETTE if c not in colors))
            style = {"color": colors[-1], "linestyle": DASHES[len(colors) - 1], "label": with_failures(name, records)}
            if not whole:
                for panel in panels[:2]:
                    panel.plot([], [], **style)
                continue
            run = whole[0]["run"]
            each = run["samples_per_batch"] * statistics.fmean(run["steps"]) / 1e6
            train = [smooth([x for line in r["metrics"] for x in line["train_losses"]]) for r in whole]
            draw(panels[0], [each * (i + 1) for i in range(len(train[0]))], train, style)
            seen = [line["characters"] / 1e6 for line in whole[0]["metrics"]]
            draw(panels[1], seen, [[line["validation_loss"] for line in r["metrics"]] for r in whole], style)
            along = [smooth(r["along"], 10) for r in whole if r.get("along")]
            if along:
                draw(panels[2], range(1, len(along[0]) + 1), along, style)
        titles = ("training loss, smoothed", "validation loss", "loss along long sequences")
        axes = ("million characters", "million characters", "time step, from a state of 0")
        for panel, what, along_axis in zip(panels, titles, axes, strict=True):
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set_title(f"{title}: {what}, nats", loc="left", size=10)
            panel.set_xlabel(along_axis)
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def over_time(record: Record) -> bytes:
    """A PNG of mu_t and sigma_t at the time steps from the second on, a line for each unit that the record shows.

    mu_t is drawn about its mean over time, both in the unit's mean sigma: a layer with one set of statistics for all
    time steps takes every line for its average. Gray is how far a mean strays by chance, twice its deviation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    titles = {"mu": "mu_t about its mean over time, in mean sigma", "sigma": "sigma_t, in mean sigma"}
    for panel, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for unit, color in zip(record[key], PALETTE, strict=False):
            panel.plot(range(2, len(unit) + 2), unit, linewidth=1.2, color=color)
        panel.set_title(title, loc="left", size=10)
        panel.set_xlabel("time step, from a state of 0")
        panel.grid(alpha=0.3)
        # Of n values, the mean strays by sigma / sqrt(n), and sigma itself by sigma / sqrt(2 n).
        center, noise = (0, record["noise"]) if key == "mu" else (1, record["noise"] / 2**0.5)
        panel.axhspan(center - 2 * noise, center + 2 * noise, color="#7f8793", alpha=0.25, linewidth=0)
    figure.suptitle(
        f"{record['label']}: statistics of W_h h, five units from the steadiest to the least steady", size=10
    )
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def draw(panel: Any, x: Sequence[float], seeds: Sequence[Sequence[float | None]], style: dict[str, Any]) -> None:
    """A line at the mean over the seeds, in a band from the lowest to the highest; a gap where one is not finite."""
    draw_columns(panel, x, list(zip(*seeds, strict=True)), style)


def draw_columns(panel: Any, x: Sequence[float], of: Sequence[Sequence[float | None]], style: dict[str, Any]) -> None:
    """``draw`` from the seeds' values at each x, which may be more at one than at another."""
    columns: list[Any] = [[math.nan] if None in column else column for column in of]
    panel.plot(x, [statistics.fmean(column) for column in columns], linewidth=1.4, **style)
    panel.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=style["color"], alpha=0.15, linewidth=0)
