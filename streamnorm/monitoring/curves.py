"""Plots of a monitor's records. Needs matplotlib, from the extra ``cli``, to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.drawing import COLORS, png

Record = Mapping[str, Any]
COLUMNS = 4
MOST = 24
"""The most panels of each kind; of more modules, an evenly spaced selection is drawn."""
INPUT, SIGMA = COLORS["batch"], COLORS["streaming"]
WATCHED = "Watched values: percentiles 15, 50, 85"


def picture(records: Sequence[Record]) -> bytes:
    """A PNG over the steps: for each watched module the 15th, 50th and 85th percentile of its values, for each
    normalization layer its sigma, the median over its features in a band from the 15th to the 85th percentile.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are no records, or none that hold anything to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture of a monitor needs matplotlib: pip install 'streamnorm[cli]'") from error
    rows = {"preactivations": _inputs(records), "sigma": _sigmas(records)}
    shown = {what: _thinned(curves) for what, curves in rows.items() if curves}
    if not shown:
        raise ValueError("there is nothing to draw: no step was recorded")
    columns = min(COLUMNS, max(map(len, shown.values())))
    lines = {what: math.ceil(len(curves) / columns) for what, curves in shown.items()}
    figure = Figure(figsize=(3.6 * columns, 2.7 * sum(lines.values()) + 0.5), dpi=110, layout="constrained")
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=list(lines.values()))[:, 0]
    for part, (what, curves) in zip(parts, shown.items(), strict=True):
        left_out = len(rows[what]) - len(curves)
        title = WATCHED if what == "preactivations" else "Sigma of the normalizations"
        title += f" ({len(curves)} of {len(rows[what])} modules)" if left_out else ""
        part.suptitle(title, size=11, x=0.01, ha="left")
        panels = part.subplots(lines[what], columns, squeeze=False).flatten()
        for panel, (name, points) in zip(panels, curves.items(), strict=False):
            _draw(panel, _named(name, records), points, what)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
    return png(figure)


Points = list[tuple[int, float, float, float]]
"""Step and three percentiles."""


def _inputs(records: Sequence[Record]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for record in records:
        for name, seen in record["preactivations"].items():
            if seen["p50"] is not None:
                found.setdefault(name, []).append((record["step"], seen["p15"], seen["p50"], seen["p85"]))
    return found


def _sigmas(records: Sequence[Record]) -> dict[str, Points]:
    """The sigma that testing would use: the estimate of our layers, the running one of torch's."""
    found: dict[str, Points] = {}
    for record in records:
        for name, held in record["norms"].items():
            table = held.get("running") or held.get("H1", {}).get("estimate")
            if table and table["sigma"]:
                found.setdefault(name, []).append((record["step"], *table["sigma"]))
    return found


def _named(name: str, records: Sequence[Record]) -> str:
    """The name and the class of a module, as the name may be just a number. Old records lack the class."""
    kind = next((record["modules"][name] for record in records if name in record.get("modules", {})), "")
    return f"{name or 'the model itself'} {kind}".rstrip()


def _thinned(curves: dict[str, Points]) -> dict[str, Points]:
    names = list(curves)
    count = min(len(names), MOST)
    return {name: curves[name] for name in (names[i * len(names) // count] for i in range(count))}


def _draw(panel: Any, name: str, points: Points, what: str) -> None:
    steps, low, middle, high = zip(*points, strict=True)
    marker = "o" if len(points) == 1 else ""
    if what == "preactivations":
        for curve, width in ((low, 0.9), (middle, 1.6), (high, 0.9)):
            panel.plot(steps, curve, color=INPUT, linewidth=width, marker=marker)
    else:
        panel.fill_between(steps, low, high, color=SIGMA, alpha=0.2, linewidth=0)
        panel.plot(steps, middle, color=SIGMA, linewidth=1.6, marker=marker)
        if max(high) > 8 * min(low) > 0:
            panel.set_yscale("log")
    panel.set_title(name, loc="left", size=9).set_parse_math(False)
    panel.set_xlabel("weight update", size=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
