"""The study of auto-encoders as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.drawing import COLORS, DASHES, OTHER_COLORS, draw, draw_columns, finish, png, whole_numbers
from streamnorm.lab.studies.study import whole, with_failures

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def picture(records: Records, dropouts: Sequence[float]) -> bytes:
    """A PNG of four panels: costs and norms of W by epoch one document at a time, cost by learning rate, dropout.

    A line is the mean over the seeds of a name, its band from the lowest seed to the highest; a seed that failed is
    left out, and said to be.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.5), dpi=120, layout="constrained")
    (costs, norms), (rates, dropout) = figure.subplots(2, 2)
    online = {name: whole(seeds) for name, seeds in records.items() if "online" in name}
    for name, style in zip(online, _styles([records[name][0]["arm"] for name in online]), strict=True):
        for panel, key in ((costs, "test_cost"), (norms, "norm")):
            values = [[line[key] for line in record["metrics"]] for record in online[name]]
            epochs = range(1, max(map(len, values), default=0) + 1)
            label = with_failures(name.replace(" online", ""), records[name])
            draw(panel, epochs, values, {**style, "marker": "o", "markersize": 4, "label": label})
            whole_numbers(panel)
    for arm in ("none", "layer"):
        own = sorted(
            (n for n in online if n.startswith(f"{arm} online, rate") and online[n]), key=lambda n: _rate(online[n])
        )
        ends = [[r["metrics"][-1]["test_cost"] for r in online[n]] for n in own]
        style = {"color": COLORS[arm], "marker": "o", "markersize": 4, "label": arm}
        draw_columns(rates, [_rate(online[n]) for n in own], ends, style)
    for arm in ("none", "batch"):
        for share, dash in zip(dropouts, DASHES, strict=False):
            name = f"{arm}, dropout {share}"
            values = [[m["test_cost"] for m in r["metrics"]] for r in whole(records[name])]
            style = {"color": COLORS[arm], "linestyle": dash, "label": with_failures(name, records[name])}
            draw(dropout, range(1, max(map(len, values), default=0) + 1), values, style)
    rates.set_xscale("log")
    tried = sorted({_rate(records[name]) for name in online})
    rates.set_xticks(tried, labels=[f"{rate:g}" for rate in tried])
    rates.minorticks_off()
    whole_numbers(dropout)
    titles = {
        costs: ("One document at a time: test cost, nats a document", "epoch"),
        norms: ("One document at a time: norm of W", "epoch"),
        rates: ("One document at a time: test cost after the last epoch", "learning rate"),
        dropout: ("Mini-batches, few documents: test cost, nats a document", "epoch"),
    }
    for panel, (title, axis) in titles.items():
        finish(panel, title, axis)
    return png(figure)


def _rate(seeds: Sequence[Mapping[str, Any]]) -> float:
    return seeds[0]["run"]["learning_rate"]


def _styles(arms: Sequence[str]) -> list[dict[str, Any]]:
    """An arm is a color, each of its runs another dash."""
    return [
        {"color": COLORS.get(arm, OTHER_COLORS[0]), "linestyle": DASHES[arms[:i].count(arm) % len(DASHES)]}
        for i, arm in enumerate(arms)
    ]
