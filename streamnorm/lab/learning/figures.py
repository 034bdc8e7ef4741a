"""What the record of a learned stream says, in words and cells. Imports the summary of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamnorm.lab.runs.summary import DASH, fixed, listed

Record = Mapping[str, Any]
"""What ``Session.record`` returns."""


def is_by_class(record: Record) -> bool:
    """Whether classes are predicted: figures are accuracies then, and mean absolute errors otherwise."""
    return record["task"] == "classification"


def names(record: Record) -> list[str]:
    """Everything that predicts: arms, then baselines."""
    return [*record["arms"], *record["baselines"]]


def said(name: str, record: Record) -> str:
    """What a predictor is called.

    >>> said("none", {"arms": ["none"]}), said("last class", {"arms": ["none"]})
    ('no normalization', 'always the last class')
    """
    if name in record["arms"]:
        return "no normalization" if name == "none" else f"{name} normalization"
    return f"always the {name}" if name != "mean so far" else "always the mean so far"


def figure(value: float | None, record: Record, unit: bool = True) -> str:
    """An accuracy in per cent, or an error in the units of the target.

    >>> figure(0.5, {"task": "classification"}), figure(0.5, {"task": "regression"})
    ('50.0 %', '0.5')
    """
    if value is None:
        return DASH
    return fixed(value, places=1) + " %" * unit if is_by_class(record) else f"{value:.4g}"


def title(record: Record) -> str:
    """Of a page."""
    return f"{record['target']} of {record['source']}, learned row by row"


def sentence(record: Record) -> str:
    """What came out."""
    of = record["so_far"]
    told = [name for name in names(record) if of[name] is not None and not _failed(name, record)]
    told.sort(key=lambda name: -of[name] if is_by_class(record) else of[name])
    rows = f"{record['rows']:,} row{'s' if record['rows'] != 1 else ''}"
    figures = listed([f"{said(name, record)} {figure(of[name], record)}" for name in told], most=9) if told else ""
    what = "The share predicted right" if is_by_class(record) else "Mean absolute error"
    text = f"{what} of {rows}, each predicted before it was learned: {figures}."
    if not told:
        text = f"{rows} were learned."
    for name, arm in record["arms"].items():
        if arm["failed"]:
            text += f" {said(name, record).capitalize()} {arm['failed'].split(':')[0]} at row {arm['rows'] + 1:,}."
    return text


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of figures."""
    what = "Accuracy" if is_by_class(record) else "Mean absolute error"
    unit = " (%)" if is_by_class(record) else ""
    head = ["Predictor", f"{what}{unit}", f"Last 1,000 rows{unit}", "Rows", "Rows a second", "Note"]
    lines = []
    for name in names(record):
        arm = record["arms"].get(name)
        speed = f"{arm['rows'] / arm['seconds']:,.0f}" if arm and arm["seconds"] else DASH if arm else ""
        lines.append([
            name,
            figure(record["so_far"][name], record, unit=False),
            figure(record["recent"][name], record, unit=False),
            f"{arm['rows'] if arm else record['rows']:,}",
            speed,
            (arm["failed"] or "") if arm else "baseline",
        ])  # fmt: skip
    return head, lines


def best(record: Record) -> list[str]:
    """The arms with the best figure over all rows."""
    of = {name: record["so_far"][name] for name, arm in record["arms"].items() if not arm["failed"]}
    of = {name: value for name, value in of.items() if value is not None}
    if not of:
        return []
    reached = max(of.values()) if is_by_class(record) else min(of.values())
    return [name for name, value in of.items() if value == reached]


def notes(record: Record) -> list[str]:
    """What a reader has to know of rows and values that were not used."""
    found = []
    if count := record["skipped"]["count"]:
        first = "; ".join(f"line {line:,}: {why}" for line, why in record["skipped"]["first"])
        found.append(f"{count:,} row{'s' if count > 1 else ''} could not be used and {_were(count)} skipped ({first}).")
    if count := record["not_finite"]:
        found.append(
            f"{count:,} number{'s' if count > 1 else ''} not finite or beyond 1e18 {_were(count)} taken as missing."
        )
    if unknown := record["unknown"]:
        found.append(
            "Columns that the first 100 rows did not have are no features: "
            + ", ".join(f"{name!r} ({count:,} rows)" for name, count in unknown.items())
            + "."
        )
    return found


def _were(count: int) -> str:
    return "were" if count > 1 else "was"


def _failed(name: str, record: Record) -> bool:
    return name in record["arms"] and bool(record["arms"][name]["failed"])
