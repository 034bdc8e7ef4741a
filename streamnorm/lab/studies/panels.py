"""The panels that studies share: training and testing over the course of training, a row for each figure. Drawn from
records, never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.drawing import DASHES, colors_of, draw, finish, png, whole_numbers
from streamnorm.lab.studies.study import whole, with_failures

Record = Mapping[str, Any]
ERRORS = {"train_error": "training error, %", "test_error": "test error, %"}
LOSSES = {"train_loss": "training loss, smoothed, nats", "validation_loss": "validation loss, nats"}


def picture(figures: Mapping[str, Mapping[str, Sequence[Record]]]) -> bytes:
    """A PNG with a row for each figure: errors of networks over the epochs, losses of language models over the
    characters, in training at the left and in testing at the right, as the paper has them.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest; a seed that failed is
    left out, and said to be.

    Args:
        figures: title -> name -> the records of its seeds; each kind of run in rows of its own.
    """
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(13, 4.6 * len(figures)), dpi=120, layout="constrained")
    for panels, (title, named) in zip(sheet.subplots(len(figures), 2, squeeze=False), figures.items(), strict=True):
        _row(panels, title, named)
    return png(sheet)


def _row(panels: Sequence[Any], title: str, named: Mapping[str, Sequence[Record]]) -> None:
    speaks = any("validation_loss" in line for of in named.values() for r in of for line in r["metrics"][:1])
    shown, x, unit = (LOSSES, "characters", 1e-6) if speaks else (ERRORS, "epoch", 1)
    for (name, records), color, dash in zip(named.items(), colors_of([*named]), cycle(DASHES), strict=False):
        able = whole(records)
        style = {"color": color, "linestyle": dash, "label": with_failures(name, records)}
        at = [line[x] * unit for line in able[0]["metrics"]] if able else []
        scale = 1 if speaks else 100
        for panel, key in zip(panels, shown, strict=True):
            seeds = [[None if line[key] is None else scale * line[key] for line in r["metrics"]] for r in able]
            draw(panel, at, seeds, style)
    for panel, what in zip(panels, shown.values(), strict=True):
        if not speaks:
            whole_numbers(panel)
        finish(panel, f"{title}: {what}", "million characters" if speaks else "epoch")
