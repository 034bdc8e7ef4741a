"""The study of small batches as a picture, drawn from errors and never trained. Needs matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm.drawing import PALETTE, draw_columns, finish, png

ORDER = ("batch", "layer", "default", "paper", "group", "instance", "batchrenorm", "onlinenorm")
COLOR: dict[str, str] = dict(zip(ORDER, ("#0072B2", "#009E73", "#D55E00", *PALETTE[:4], "#7f8793"), strict=True))

Errors = Mapping[int, tuple[Sequence[float], Sequence[float]]]
"""Samples a batch -> the errors of each seed in testing mode and in training mode."""


def picture(shown: Mapping[str, Mapping[str, Errors]], by_sample: Sequence[str], per_batch: Sequence[int]) -> bytes:
    """A PNG: a row for each architecture, errors in testing and in training mode over the samples a batch. A band goes
    from the lowest to the highest seed; what does not see the batch is a level line.

    Args:
        shown: architecture -> arm -> its errors.
        by_sample: the arms that do not see the batch.
        per_batch: the numbers of samples a batch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2 * len(shown)), dpi=120, layout="constrained")
    lines: dict[str, Any] = {}
    for panels, (architecture, arms) in zip(figure.subplots(len(shown), 2, squeeze=False), shown.items(), strict=True):
        for panel, mode, i in zip(panels, ("testing", "training"), (0, 1), strict=True):
            for arm, errors in arms.items():
                style = {"color": COLOR[arm], "label": arm}
                if arm in by_sample:
                    (both,) = errors.values()
                    draw_columns(
                        panel, per_batch, [[100 * e for e in both[i]]] * len(per_batch), style | {"linestyle": ":"}
                    )
                else:
                    columns = [[100 * e for e in errors[m][i]] for m in errors]
                    draw_columns(panel, list(errors), columns, style | {"marker": "o", "markersize": 3})
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(per_batch), [str(m) for m in per_batch])
            handles, names = panel.get_legend_handles_labels()
            lines |= dict(zip(names, handles, strict=True))
            finish(panel, f"Architecture {architecture}: test error in {mode} mode, %", "samples a batch")
            panel.get_legend().remove()  # one serves all panels
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
    return png(figure)
