"""The study of the small Inception network as a picture, drawn from records and never trained. Needs matplotlib when it
draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.drawing import COLORS, DASHES, OTHER_COLORS, draw, finish, png
from streamnorm.lab.studies.study import whole, with_failures

Record = Mapping[str, Any]


def picture(records: Mapping[str, Sequence[Record]], ensembles: Sequence[Record]) -> bytes:
    """A PNG of test errors in per cent: over the updates with ReLUs and with sigmoids, and of ensembles beside their
    members.

    A line is the mean over the seeds of a name, its band from the lowest to the highest; its color is the arm, its dash
    the learning rate. A seed that failed is left out, and said to be.

    Args:
        records: name -> the records of its seeds.
        ensembles: for each seed the ``members``' errors and the ensemble's ``test_error``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.2), dpi=120, layout="constrained")
    *panels, last = figure.subplots(1, 3)
    rates = sorted({record["run"]["learning_rate"] for seeds in records.values() for record in seeds})
    for panel, nonlinearity in zip(panels, ("relu", "sigmoid"), strict=True):
        for name, seeds in records.items():
            run = seeds[0]["run"]
            if run["nonlinearity"] != nonlinearity:
                continue
            dash = DASHES[rates.index(run["learning_rate"])]
            style = {"color": COLORS[run["arm"]], "linestyle": dash, "label": with_failures(name, seeds)}
            _curve(panel, seeds, style)
        finish(panel, f"Test error, %: {nonlinearity}", "weight update")
    _ensembles(last, ensembles)
    finish(last, "Test error, %: ensembles", "seed")
    return png(figure)


def _curve(panel: Any, records: Sequence[Record], style: dict[str, Any]) -> None:
    curves = [record["metrics"] for record in whole(records)]
    updates = [line["updates"] for line in curves[0]] if curves else []
    draw(panel, updates, [[100 * line["test_error"] for line in metrics] for metrics in curves], style)


def _ensembles(panel: Any, ensembles: Sequence[Record]) -> None:
    seeds = [str(ensemble["seed"]) for ensemble in ensembles]
    every = [
        (seed, 100 * error) for seed, ensemble in zip(seeds, ensembles, strict=True) for error in ensemble["members"]
    ]
    panel.scatter(*zip(*every, strict=True), color=COLORS["batch"], label="members")
    averages = [100 * ensemble["test_error"] for ensemble in ensembles]
    panel.scatter(seeds, averages, color=OTHER_COLORS[0], marker="D", label="their ensemble")
