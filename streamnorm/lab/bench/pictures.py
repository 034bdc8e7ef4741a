"""The pictures of a benchmark: ratios as dots, a panel a case, and growth as lines. Needs matplotlib when it draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from streamnorm.drawing import COLORS, OTHER_COLORS, png
from streamnorm.lab.bench.journal import Timed
from streamnorm.lab.bench.results import DEFAULT, TUNED, Curve, Row, allocators, curves, rows

INK, SOFT, FAINT, PAPER = "#1d2127", "#5a626e", "#e3e6ea", "#ffffff"
OURS, PEERS = COLORS["streaming"], COLORS["batch"]
LINES_OF_OURS = (OURS, OTHER_COLORS[2], OTHER_COLORS[0])
LINES_OF_PEERS = (PEERS, COLORS["layer"], COLORS["none"])
PANELS = 3
"""In a row, at most."""
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MORE_TICKS = (0.3, 0.4, 0.7, 1.5, 3)
WAYS = {TUNED: "memory kept by the process", DEFAULT: "default allocator"}


def picture(cases: Sequence[Timed], title: str) -> bytes:
    """A PNG of one group: lines where its cases are points of curves, else dots.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the pictures of a benchmark need matplotlib: pip install 'streamnorm[cli]'") from error
    return _growth(cases, title) if cases[0].series else _dots(cases, title)


def _dots(cases: Sequence[Timed], title: str) -> bytes:
    """Median ratios to the reference, with a bar from quartile to quartile; a panel a case, a line a variant."""
    names = list(dict.fromkeys(case.name for case in cases))
    panels = {name: {case.allocator: rows(case) for case in cases if case.name == name} for name in names}
    references = {case.name: case.reference for case in cases}
    alike = len({tuple(row.variant for row in next(iter(own.values()))) for own in panels.values()}) == 1
    # Panels that list the same variants stand side by side and share the names at the left.
    columns = (2 if len(names) == 4 else min(len(names), PANELS)) if alike else 1
    lines = [max(map(len, panels[name].values())) for name in names][::columns]
    figure = _figure((12, 0.9 + sum(0.35 + 0.27 * count for count in lines)), title)
    grid = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": lines})
    low, high = _range(panels.values())
    ticks = [tick for tick in sorted(TICKS + MORE_TICKS * (high < 6 * low)) if low <= tick <= high]
    one = len(set(references.values())) == 1
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.set_visible(False)
            continue
        _frame(axes, names[i] if one else f"{names[i]}, to {references[names[i]]}")
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.axvline(1, color=INK, linewidth=1)
        _panel(axes, panels[names[i]], named=i % columns == 0)
    figure.supxlabel(f"time of a step / {references[names[0]] if one else 'reference'}", size=10, color=SOFT)
    _legend(figure, allocators(cases))
    return png(figure)


def _range(panels: Iterable[dict[str, list[Row]]]) -> tuple[float, float]:
    """From below the lowest to above the highest, with room for figures at the right."""
    found = [row.ratio for own in panels for rows_ in own.values() for row in rows_]
    highest = max(middle for _, middle, _ in found)
    low = min(*(a for a, _, _ in found), 0.9) / 1.15
    high = max(*(min(b, 1.5 * highest) for *_, b in found), 1.1)
    return low, high * (high / low) ** 0.16


def _panel(axes: Any, by_allocator: dict[str, list[Row]], named: bool) -> None:
    first = next(iter(by_allocator.values()))
    shown = [row.variant for row in first if row.ratio != (1.0, 1.0, 1.0)]
    for allocator, found in by_allocator.items():
        filled = allocator == next(iter(by_allocator))
        for row in found:
            if row.variant not in shown:
                continue
            at, color = shown.index(row.variant) + (0 if filled else 0.3), OURS if row.is_ours else PEERS
            a, middle, b = row.ratio
            axes.plot([a, b], [at, at], color=color, linewidth=2.2, alpha=0.45, solid_capstyle="butt")
            face = color if filled else PAPER
            axes.plot(middle, at, "o", color=color, markerfacecolor=face, markersize=6 if filled else 4.5)
            if filled:
                label = f"{middle:.2f}" if middle < 10 else f"{middle:.0f}"
                axes.annotate(label, (1, at), xycoords=("axes fraction", "data"), xytext=(-3, 0), **_WORDS)
    axes.set_yticks(range(len(shown)), shown if named else [""] * len(shown))
    axes.set_ylim(len(shown) - 0.35, -0.65)


_WORDS: dict[str, Any] = {
    "textcoords": "offset points",
    "ha": "right",
    "va": "center",
    "size": 8.5,
    "color": SOFT,
    "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 1},
}


def _growth(cases: Sequence[Timed], title: str) -> bytes:
    """Microseconds of a step over what grows; a panel a series, a line a variant."""
    from matplotlib.ticker import LogLocator, NullLocator

    allocator = allocators(cases)[0]
    drawn = curves(case for case in cases if case.allocator == allocator)
    series = list(dict.fromkeys(curve.series for curve in drawn))
    columns = min(len(series), 2)
    rows_ = math.ceil(len(series) / columns)
    figure = _figure((12, 0.7 + 3.7 * rows_), f"{title}, {WAYS[allocator]}")
    grid = figure.subplots(rows_, columns, squeeze=False)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, series, strict=False):
        _frame(axes, name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylabel("µs", size=10, color=SOFT)
        mine = [curve for curve in drawn if curve.series == name]
        _lines(axes, mine)
        values = [seconds * 1e6 for curve in mine for seconds in curve.seconds.values()]
        # Room for the legend above the lines.
        axes.set_ylim(min(values) / 1.3, max(values) * max(max(values) / min(values), 10) ** (0.09 * len(mine)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if max(values) > 200 * min(values) else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left")
    return png(figure)


def _lines(axes: Any, drawn: Sequence[Curve]) -> None:
    ours, peers = iter(LINES_OF_OURS * 9), iter(LINES_OF_PEERS * 9)
    for curve in drawn:
        color = next(ours) if curve.is_ours else next(peers)
        slope = "" if curve.exponent is None else f": exponent {curve.exponent:.2f}, {curve.low} to {curve.high}"
        values = [seconds * 1e6 for seconds in curve.seconds.values()]
        axes.plot(list(curve.seconds), values, "o-", color=color, markersize=3.5, label=curve.variant + slope)


def _figure(size: tuple[float, float], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, facecolor=PAPER, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=13, color=INK)
    return figure


def _frame(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=10.5, color=INK)
    axes.tick_params(colors=INK, labelsize=9, which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Any, used: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    entries = [(OURS, OURS, "ours"), (PEERS, PEERS, "peers")]
    if len(used) > 1:
        entries += [(SOFT, SOFT if i == 0 else PAPER, WAYS[name]) for i, name in enumerate(used)]
    marks = [Line2D([], [], color=edge, markerfacecolor=face, marker="o", linestyle="") for edge, face, _ in entries]
    words = [word for *_, word in entries]
    figure.legend(marks, words, loc="outside upper right", ncols=len(marks), frameon=False, labelcolor=INK)
