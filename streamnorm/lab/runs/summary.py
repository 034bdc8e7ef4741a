"""What the records of runs say: figures (``Row``), one sentence, one table. Imports the standard library alone.

A run is the record that ``streamnorm.lab.runs.classifier.loop.train`` returns. An arm is one normalization; a label is
one arm under one setting, with a run for each seed. Losses are in nats; errors are fractions in records and rows, and
per cent or percentage points where they are shown. A figure is a run's at its last epoch; sd is the sample standard
deviation over seeds.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]
MINUS, DASH = "\N{MINUS SIGN}", "\N{EM DASH}"


@dataclass(frozen=True)
class Row:
    """The figures of one label, over the seeds that trained to their end; None without such a seed.

    Attributes:
        label: of the runs.
        arm: their normalization.
        seeds: all of them.
        counted: how many of them trained to their end.
        failed: what became of the others, None if there are none.
        epochs: that the runs were trained for.
        test_error: mean over seeds.
        test_error_sd: None for a single seed, as every sd here.
        best_test_error: the lowest of any epoch and seed.
        train_loss: mean over seeds.
        train_loss_sd: of it.
        reference: the label that differences are taken to: the first that trained, of arm "none" if there is one.
        difference: test error minus the reference's, seed by seed, at the last epoch that both runs have.
        difference_sd: of it.
        pairs: how many seeds the difference is of.
        seconds_per_epoch: the median over epochs and seeds.
    """

    label: str
    arm: str
    seeds: tuple[int, ...]
    counted: int
    failed: str | None
    epochs: int | None
    test_error: float | None
    test_error_sd: float | None
    best_test_error: float | None
    train_loss: float | None
    train_loss_sd: float | None
    reference: str | None
    difference: float | None
    difference_sd: float | None
    pairs: int
    seconds_per_epoch: float | None


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each label, in the order of first appearance.

    Raises:
        ValueError: for no runs, and for a seed that came twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    if not groups:
        raise ValueError("no runs came to report on; give at least one arm and one seed")
    for label, group in groups.items():
        seeds = [run["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{label!r} came with seeds {seeds}; give each seed once")
    return groups


def summarize(runs: Sequence[Run]) -> list[Row]:
    """One ``Row`` for each label.

    Raises:
        ValueError: as ``by_label``.
    """
    groups = by_label(runs)
    trained = {k: {run["seed"]: run["metrics"] for run in group if not run["failed"]} for k, group in groups.items()}
    able = [label for label, own in trained.items() if own]
    plain = [label for label in able if groups[label][0]["arm"] == "none"]
    reference = next(iter(plain + able), None)
    rows = []
    for label, group in groups.items():
        own, others = trained[label], {} if reference in (None, label) else trained[reference]
        metrics, ends = [m for run in own.values() for m in run], [run[-1] for run in own.values()]
        errors, losses = [m["test_error"] for m in ends], [m["train_loss"] for m in ends]
        differences = [_difference(own[seed], others[seed]) for seed in own if seed in others]
        row = Row(
            label=label,
            arm=group[0]["arm"],
            seeds=tuple(run["seed"] for run in group),
            counted=len(own),
            failed=_failure(group),
            epochs=max((m["epoch"] for m in ends), default=None),
            test_error=_mean(errors),
            test_error_sd=_sd(errors),
            best_test_error=min((m["test_error"] for m in metrics), default=None),
            train_loss=_mean(losses),
            train_loss_sd=_sd(losses),
            reference=reference,
            difference=_mean(differences),
            difference_sd=_sd(differences),
            pairs=len(differences),
            seconds_per_epoch=statistics.median(m["seconds"] for m in metrics) if metrics else None,
        )
        rows.append(row)
    return rows


def ranked(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The best arm and those level with it, and those behind; lowest test error first.

    Level is a difference in test error below the larger of the two sds. An arm that lost a seed is in neither list: the
    mean of the seeds that are left would flatter it.
    """
    whole = [(row.test_error or 0.0, row.test_error_sd or 0.0, row) for row in rows if not row.failed]
    whole.sort(key=lambda entry: entry[0])
    level, behind = [], []
    for error, sd, row in whole:
        best, best_sd, _ = whole[0]
        (level if error == best or error - best < max(sd, best_sd) else behind).append(row)
    return level, behind


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence made of the figures alone."""
    names, setting = _names(rows)
    level, behind = ranked(rows)
    lost = sorted((row for row in rows if row.failed), key=lambda row: row.counted == 0)
    first = (level + lost)[0]

    def told(row: Row) -> str:
        if row.test_error is None:
            return names[row.label]
        figures = f"{fixed(row.test_error, row.test_error_sd)} %" + " test error" * (row is first)
        if row is first or row.counted != first.counted:
            figures += f", {'mean ± sd over ' * (row.counted > 1)}{_count(row.counted, 'seed')}"
        return f"{names[row.label]} ({figures})"

    seeds = min((row.counted for row in level + behind), default=0)
    if len(level) > 1:
        verdict = " were level"
    elif not behind:
        verdict = " trained to the end"
    elif seeds < 3:
        verdict = f" was lowest, of too few seeds to rank by ({seeds})"
    else:
        verdict = " was best"
    parts = [listed(map(told, level)) + verdict] if level else []
    if behind:
        spread = " than the lowest by more than the spread" if seeds > 1 else ""
        parts[0] += f"; higher{spread}: {listed(map(told, behind))}"
    fates = dict.fromkeys(row.failed for row in lost)
    if fates:
        parts.append(", and ".join(f"{listed(told(r) for r in lost if r.failed == fate)} {fate}" for fate in fates))
    text = setting + ", while ".join(parts)
    lengths = [row.epochs for row in rows if row.epochs]
    if len(set(lengths)) > 1:
        text += f"; the runs differ in length ({min(lengths)} to {max(lengths)} epochs)"
    return f"{text[0].upper()}{text[1:]}."


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of figures, as plain text."""
    reference, longest = rows[0].reference, max(row.epochs or 0 for row in rows)
    head = ["Arm", "Seeds", "Test error (%)", "Lowest (%)", f"Difference to {reference or 'reference'} (points)"]
    head += ["Training loss (nats)", "Time (s/epoch)", "Note"]
    lines = []
    for row in rows:
        difference = "reference" if row.label == reference else fixed(row.difference, row.difference_sd, sign="+")
        if 0 < row.pairs < len(row.seeds):
            difference += f" ({_count(row.pairs, 'seed')})"
        short = f"ended at epoch {row.epochs} of {longest}" if row.epochs and row.epochs < longest else ""
        lines.append([
            row.label,
            f"{row.counted} of {len(row.seeds)}" if row.failed else str(row.counted),
            fixed(row.test_error, row.test_error_sd),
            fixed(row.best_test_error),
            difference,
            fixed(row.train_loss, row.train_loss_sd, unit=1, places=4),
            fixed(row.seconds_per_epoch, unit=1),
            "; ".join(filter(None, [row.failed, short])),
        ])  # fmt: skip
    return head, lines


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table; in bold the best arm and those level with it."""
    head, lines = cells(rows)
    level, _ = ranked(rows)
    for row, line in zip(rows, lines, strict=True):
        if row in level:
            line[:3] = [f"**{cell}**" for cell in line[:3]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, [":---", *["---:"] * 6, ":---"], *lines])


def fixed(value: float | None, sd: float | None = None, unit: float = 100, places: int = 2, sign: str = "") -> str:
    """``value ± sd`` in units of 1 / ``unit``, by default per cent; a dash for None."""
    if value is None:
        return DASH
    text = f"{value * unit:{sign}z.{places}f}" if abs(value) < 1e6 else f"{value * unit:{sign}.3g}"
    return text.replace("-", MINUS) + ("" if sd is None else f" ± {sd * unit:.{places}f}")


def listed(items: Iterable[str], most: int = 5) -> str:
    """``a, b and c``; of more than ``most`` the first, and how many others."""
    every = list(items)
    if len(every) > most:
        every[most - 1 :] = [f"{len(every) - most + 1} others"]
    return " and ".join(filter(None, [", ".join(every[:-1]), every[-1]]))


def _failure(group: Sequence[Run]) -> str | None:
    fates: dict[str, list[int]] = {}
    for run in group:
        if reason := run["failed"]:
            fate = "diverged" if reason.startswith("diverged") else f"could not train because {reason}"
            fates.setdefault(fate, []).append(run["seed"])
    if not fates:
        return None
    some = {fate: f" (seed{'s' * (len(own) > 1)} {listed(map(str, own))})" for fate, own in fates.items()}
    return listed(fate + some[fate] * (len(own) < len(group)) for fate, own in fates.items())


def _difference(metrics: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> float:
    last = min(len(metrics), len(others)) - 1
    return metrics[last]["test_error"] - others[last]["test_error"]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _names(rows: Sequence[Row]) -> tuple[dict[str, str], str]:
    """What to call each label in prose, and how to begin: with the setting, if the arms differ in nothing else."""
    found = [re.fullmatch(r".+ (\d+) S/B x (\d+) B/U", row.label) for row in rows]
    settings = {match and match.groups() for match in found}
    setting = settings.pop()
    if setting is None or settings or len({row.arm for row in rows}) < len(rows):
        return {row.label: row.label for row in rows}, ""
    names = {row.label: f"{'no' if row.arm == 'none' else row.arm} normalization" for row in rows}
    samples, batches = map(int, setting)
    return names, f"At {_count(samples, 'sample')} a batch and {_count(batches, 'batch', 'es')} an update, "


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
