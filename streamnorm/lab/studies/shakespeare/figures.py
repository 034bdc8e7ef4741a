"""The curves of language models as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.drawing import DASHES, PALETTE, colors_of, draw, finish, png
from streamnorm.lab.studies.shakespeare.runs import CELLS, SETTINGS
from streamnorm.lab.studies.study import whole, with_failures

Record = Mapping[str, Any]
FIGURES = {
    "RNN": [f"rnn {arm}" for arm in ("tsbn", "layer", "streaming", "batch")],
    "RNN, settings": [f"rnn {arm}" for arm in (*SETTINGS, "streaming, 1 B/U", "streaming, latest statistics back")],
    "RNN, cells": [f"rnn {arm}" for arm in (*CELLS, "batch", "batch, vertical")],
    "RNN, state reset": ["rnn streaming, state reset", "rnn tsbn, state reset"],
    "RNN, mixed lengths": [f"rnn {arm}, mixed lengths, {n} B/U" for arm in ("streaming", "layer") for n in (1, 3)],
    "GRU": [f"gru {arm}" for arm in ("tsbn", "layer", "streaming")],
    "GRU, settings": [f"gru {arm}" for arm in SETTINGS],
    "GRU, larger first weights": [f"gru {arm}, weights x 5" for arm in ("tsbn", "layer", "streaming")],
    "GRU, cells": [f"gru {arm}" for arm in CELLS],
}
"""The rows of the picture: runs that are drawn together."""
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
        colors = colors_of([records[0]["arm"] for records in named.values()])
        for (name, records), color, dash in zip(named.items(), colors, cycle(DASHES), strict=False):
            able = whole(records)
            style = {"color": color, "linestyle": dash, "label": with_failures(name, records)}
            if not able:
                for panel in panels[:2]:
                    panel.plot([], [], **style)
                continue
            run = able[0]["run"]
            each = run["samples_per_batch"] * statistics.fmean(run["steps"]) / 1e6
            train = [smooth([x for line in r["metrics"] for x in line["train_losses"]]) for r in able]
            draw(panels[0], [each * (i + 1) for i in range(len(train[0]))], train, style)
            seen = [line["characters"] / 1e6 for line in able[0]["metrics"]]
            draw(panels[1], seen, [[line["validation_loss"] for line in r["metrics"]] for r in able], style)
            along = [smooth(r["along"], 10) for r in able if r.get("along")]
            if along:
                draw(panels[2], range(1, len(along[0]) + 1), along, style)
        titles = ("training loss, smoothed", "validation loss", "loss along long sequences")
        axes = ("million characters", "million characters", "time step, from a state of 0")
        for panel, what, along_axis in zip(panels, titles, axes, strict=True):
            finish(panel, f"{title}: {what}, nats", along_axis)
    return png(figure)


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
        finish(panel, title, "time step, from a state of 0")
        # Of n values, the mean strays by sigma / sqrt(n), and sigma itself by sigma / sqrt(2 n).
        center, noise = (0, record["noise"]) if key == "mu" else (1, record["noise"] / 2**0.5)
        panel.axhspan(center - 2 * noise, center + 2 * noise, color="#7f8793", alpha=0.25, linewidth=0)
    figure.suptitle(
        f"{record['label']}: statistics of W_h h, five units from the steadiest to the least steady", size=10
    )
    return png(figure)
