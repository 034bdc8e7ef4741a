"""The curves of language models as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.training.curves import COLOURS, DASHES, OTHER_COLOURS

Record = Mapping[str, Any]
SPAN = 50
"""Neighbors in the moving average of the training loss (paper, section 7.6)."""


def smooth(values: Sequence[float], span: int = SPAN) -> list[float]:
    """A moving average whose span is made odd, and shrinks towards both ends so that it stays centered.

    As the function that the paper names does it: of 50 it takes 49, at the second value 3, at the first 1.

    >>> smooth([1.0, 2.0, 6.0, 4.0, 8.0], 4)
    [1.0, 3.0, 4.0, 6.0, 8.0]
    """
    half = (span - 1) // 2
    last = len(values) - 1
    reach = [min(i, last - i, half) for i in range(len(values))]
    return [statistics.fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def picture(groups: Mapping[str, Mapping[str, Sequence[Record]]]) -> bytes:
    """A PNG with a row for each group: smoothed training loss, validation loss, and loss along longer sequences.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest.

    Args:
        groups: title -> name -> the records of its seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4 * len(groups)), dpi=120, layout="constrained")
    for panels, (title, named) in zip(figure.subplots(len(groups), 3, squeeze=False), groups.items(), strict=True):
        others: list[str] = []
        for name, records in named.items():
            whole = [record for record in records if record["metrics"] and not record["failed"]]
            if not whole:
                continue
            arm = whole[0]["arm"]
            color = COLOURS.get(arm, OTHER_COLOURS[0])
            style = {"color": color, "linestyle": DASHES[others.count(arm) % len(DASHES)], "label": name}
            others.append(arm)
            run = whole[0]["run"]
            each = run["samples_per_batch"] * run["steps"] / 1e6
            train = [smooth([x for line in r["metrics"] for x in line["train_losses"]]) for r in whole]
            _draw(panels[0], [each * (i + 1) for i in range(len(train[0]))], train, style)
            seen = [line["characters"] / 1e6 for line in whole[0]["metrics"]]
            _draw(panels[1], seen, [[line["validation_loss"] for line in r["metrics"]] for r in whole], style)
            along = [smooth(r["along"], 10) for r in whole if r.get("along")]
            if along:
                _draw(panels[2], range(1, len(along[0]) + 1), along, style)
        titles = ("training loss, smoothed", "validation loss", "validation loss at each time step of long sequences")
        axes = ("million characters", "million characters", "time step, from a state of 0")
        for panel, what, along_axis in zip(panels, titles, axes, strict=True):
            panel.set_title(f"{title}: {what}, nats", loc="left", size=10)
            panel.set_xlabel(along_axis)
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw(panel: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    columns = list(zip(*seeds, strict=True))
    panel.plot(x, [statistics.fmean(column) for column in columns], linewidth=1.4, **style)
    panel.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=style["color"], alpha=0.15, linewidth=0)
