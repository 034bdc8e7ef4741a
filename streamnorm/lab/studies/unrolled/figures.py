"""The study of unrolled networks as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from streamnorm.drawing import DASHES, colors_of, draw, finish, png, whole_numbers
from streamnorm.lab.studies.study import whole, with_failures

Record = Mapping[str, Any]


def picture(figures: Mapping[str, Mapping[str, Sequence[Record]]]) -> bytes:
    """A PNG with a row for each figure: training error and test error over the epochs, in per cent, and test loss over
    the loops where several were tested with more of them.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest; a seed that failed is
    left out, and said to be.

    Args:
        figures: title -> name -> the records of its seeds.
    """
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(15, 4.2 * len(figures)), dpi=120, layout="constrained")
    for panels, (title, named) in zip(sheet.subplots(len(figures), 3, squeeze=False), figures.items(), strict=True):
        compares = sum(any("along" in record for record in records) for records in named.values()) > 1
        for (name, records), color, dash in zip(
            named.items(), colors_of([records[0]["arm"] for records in named.values()]), cycle(DASHES), strict=False
        ):
            able = whole(records)
            style = {"color": color, "linestyle": dash, "label": with_failures(name, records)}
            if not able:
                for panel in panels[:2]:
                    panel.plot([], [], **style)
                continue
            epochs = [line["epoch"] for line in able[0]["metrics"]]
            for panel, key in zip(panels, ("train_error", "test_error"), strict=False):
                draw(panel, epochs, [[100 * line[key] for line in r["metrics"]] for r in able], style)
            if compares and "along" in able[0]:
                draw(panels[2], [k for k, _ in able[0]["along"]], [[y for _, y in r["along"]] for r in able], style)
        titles = ("training error, %", "test error, %", "test loss beyond the trained loops, nats")
        for panel, what, axis in zip(panels, titles, ("epoch", "epoch", "loops"), strict=True):
            whole_numbers(panel)
            finish(panel, f"{title}: {what}", axis)
    return png(sheet)
