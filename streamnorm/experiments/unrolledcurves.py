"""The study of unrolled networks as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.experiments.study import with_failures
from streamnorm.experiments.textcurves import draw
from streamnorm.training.curves import COLOURS, DASHES, OTHER_COLOURS

Record = Mapping[str, Any]
PALETTE = (*OTHER_COLOURS, *COLOURS.values())


def picture(figures: Mapping[str, Mapping[str, Sequence[Record]]]) -> bytes:
    """A PNG with a row for each figure: training error and test error over the epochs, in per cent, and test loss over
    the loops where several were tested with more of them.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest; a seed that failed is
    left out, and said to be.

    Args:
        figures: title -> name -> the records of its seeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sheet = Figure(figsize=(15, 4.2 * len(figures)), dpi=120, layout="constrained")
    for panels, (title, named) in zip(sheet.subplots(len(figures), 3, squeeze=False), figures.items(), strict=True):
        compares = sum(any("along" in record for record in records) for records in named.values()) > 1
        for (name, records), color, dash in zip(named.items(), _colors(named), cycle(DASHES), strict=False):
            whole = [record for record in records if record["metrics"] and not record["failed"]]
            style = {"color": color, "linestyle": dash, "label": with_failures(name, records)}
            if not whole:
                for panel in panels[:2]:
                    panel.plot([], [], **style)
                continue
            epochs = [line["epoch"] for line in whole[0]["metrics"]]
            for panel, key in zip(panels, ("train_error", "test_error"), strict=False):
                draw(panel, epochs, [[100 * line[key] for line in r["metrics"]] for r in whole], style)
            if compares and "along" in whole[0]:
                draw(panels[2], [k for k, _ in whole[0]["along"]], [[y for _, y in r["along"]] for r in whole], style)
        titles = ("training error, %", "test error, %", "test loss beyond the trained loops, nats")
        for panel, what, axis in zip(panels, titles, ("epoch", "epoch", "loops"), strict=True):
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set_title(f"{title}: {what}", loc="left", size=10)
            panel.set_xlabel(axis)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    sheet.savefig(out, format="png")
    return out.getvalue()


def _colors(named: Mapping[str, Sequence[Record]]) -> list[str]:
    """An arm's own color for its first name, another one for each that follows."""
    colors: list[str] = []
    for records in named.values():
        own = COLOURS.get(records[0]["arm"])
        colors.append(own if own and own not in colors else next(c for c in PALETTE if c not in colors))
    return colors
