"""The study of two comments as a picture, drawn from records and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.drawing import COLORS, DASHES, OTHER_COLORS, draw, finish, png, whole_numbers
from streamnorm.lab.studies.study import with_failures

Record = Mapping[str, Any]
Named = Mapping[str, Sequence[Record]]


def picture(arranged: Named, curved: Named) -> bytes:
    """A PNG: test error of the convolutional networks; of the others the largest eigenvalue of the Hessian, the same of
    relative changes of the weights, and how much larger the error of the test data is than that of the training data.

    A line is the mean over the seeds, its band from the lowest to the highest; a seed that failed is left out, and said
    to be.

    Args:
        arranged: name -> the records of its seeds, with metrics.
        curved: name -> the records of its seeds, with a trace; of the arms none and batch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.4), dpi=120, layout="constrained")
    (errors, curvature), (gap, relative) = figure.subplots(2, 2)
    for (name, records), color in zip(arranged.items(), OTHER_COLORS, strict=True):
        whole = [[100 * line["test_error"] for line in r["metrics"]] for r in records if not r["failed"]]
        draw(errors, range(1, 1 + len(whole[0]) if whole else 1), whole, _style(name, records, color, "-"))
    whole_numbers(errors)
    finish(errors, "Architecture B: test error, %", "epoch")
    dashes = dict(zip(dict.fromkeys(r[0]["run"]["learning_rate"] for r in curved.values()), DASHES, strict=False))
    for name, records in curved.items():
        run = records[0]["run"]
        style = _style(name, records, COLORS[run["arm"]], dashes[run["learning_rate"]])
        traces = [r["trace"] for r in records if not r["failed"]]
        updates = [look["updates"] for look in traces[0]] if traces else []
        draw(curvature, updates, [[look["curvature"] for look in t] for t in traces], style)
        draw(relative, updates, [[look["relative"] for look in t] for t in traces], style)
        apart = [[100 * (look["test_error"] - look["train_error"]) for look in t] for t in traces]
        draw(gap, updates, apart, style)
    for panel in (curvature, relative):
        panel.set_yscale("log")
    finish(curvature, "Architecture A: largest eigenvalue of the Hessian", "weight update")
    finish(relative, "Architecture A: the same of relative changes of each weight matrix", "weight update")
    finish(gap, "Architecture A: test error less training error, points", "weight update")
    return png(figure)


def _style(name: str, records: Sequence[Record], color: str, dash: Any) -> dict[str, Any]:
    return {"color": color, "linestyle": dash, "label": with_failures(name, records)}
