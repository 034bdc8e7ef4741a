"""What a comparison found: figures, one sentence, learning curves and one HTML file, from the records of its runs.

What lives here: reading runs (plain dicts, as ``streamnorm compare`` writes them) and showing them. Nothing is trained.
Importing this file needs the standard library alone; ``curves`` and ``write_report`` import matplotlib when called.

Legend: an arm is one normalization; a label is one arm under one setting, with one run per seed; S/B samples per batch,
B/U batches per update. Losses are in nats. Errors are fractions (0 to 1) in the records and in ``Row``, and per cent or
percentage points where they are shown. "Final" is a run's last epoch, sd the sample standard deviation over seeds.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import statistics
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

Run = Mapping[str, Any]
MINUS, DASH, CROSS = "\N{MINUS SIGN}", "\N{EM DASH}", "\N{MULTIPLICATION SIGN}"
# Okabe and Ito's colours, which colour-blind readers tell apart; without their yellow, too faint on white.
COLOURS = {"none": "#7f8793", "batch": "#0072B2", "layer": "#009E73", "streaming": "#D55E00"}
COLOURS |= {"instance": "#56B4E9", "group": "#CC79A7", "rms": "#E69F00"}
SPARE_COLOURS = ("#8F6BD1", "#56B4E9", "#CC79A7", "#E69F00")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Row:
    """The figures of one label; None where there is nothing finite to count, and for the sd of a single seed.

    Attributes:
        seeds: all of them; of these, ``failed_seeds`` could not train, and ``diverged`` trained to a loss or error that
            is not finite.
        counted: how many seeds ``test_error`` is the mean of.
        test_error, test_error_sd, train_loss, train_loss_sd: final, over the seeds that trained and are finite.
        best_test_error: the lowest of any epoch and seed.
        reference: the label that differences are taken to: the first that trained of arm "none", else of all.
        difference, difference_sd: test error minus the reference's, over the ``pairs`` seeds which both have, each pair
            at the last epoch that both runs reached.
        seconds: per epoch, the median over epochs and seeds.
        epochs: of the shortest and of the longest run that trained.
        failed: why ``failed_seeds`` could not train.
    """

    label: str
    arm: str
    seeds: tuple[int, ...]
    failed_seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    counted: int
    test_error: float | None
    test_error_sd: float | None
    train_loss: float | None
    train_loss_sd: float | None
    best_test_error: float | None
    reference: str | None
    difference: float | None
    difference_sd: float | None
    pairs: int
    seconds: float | None
    epochs: tuple[int, int] | None
    failed: str | None

    @property
    def whole(self) -> bool:
        """Every seed trained to a finite end."""
        return not self.failed_seeds and not self.diverged


def summarize(runs: Sequence[Run]) -> list[Row]:
    """One ``Row`` per label, in the order of first appearance.

    Raises:
        ValueError: for no runs, and for runs that do not have the shape of a record or cannot be compared.
    """
    groups = _groups(runs)
    trained = {label: {r["seed"]: r for r in group if not r.get("failed")} for label, group in groups.items()}
    able = [label for label, own in trained.items() if any(_final(r, "test_error") is not None for r in own.values())]
    reference = next(iter([label for label in able if groups[label][0]["arm"] == "none"] + able), None)
    return [_row(group, trained[label], reference, trained.get(reference or "", {})) for label, group in groups.items()]


def _row(group: Sequence[Run], trained: Mapping[int, Run], reference: str | None, others: Mapping[int, Run]) -> Row:
    label, done = group[0]["label"], list(trained.values())
    errors = _finite_ones(_final(r, "test_error") for r in done)
    losses = _finite_ones(_final(r, "train_loss") for r in done)
    shared = [] if label == reference else [s for s in trained if s in others]
    differences = _finite_ones(_difference(trained[s], others[s]) for s in shared)
    metrics = [m for r in done for m in r["metrics"]]
    seconds = _finite_ones(m.get("seconds") for m in metrics)
    lengths = [r["metrics"][-1]["epoch"] for r in done]
    ends = ("train_loss", "test_loss", "test_error")
    reasons = (" ".join(str(r["failed"]).split()).rstrip(".") for r in group if r.get("failed"))
    return Row(
        label=label,
        arm=group[0]["arm"],
        seeds=tuple(r["seed"] for r in group),
        failed_seeds=tuple(r["seed"] for r in group if r.get("failed")),
        diverged=tuple(r["seed"] for r in done if any(_finite(r["metrics"][-1].get(key, 0)) is None for key in ends)),
        counted=len(errors),
        test_error=_mean(errors),
        test_error_sd=_sd(errors),
        train_loss=_mean(losses),
        train_loss_sd=_sd(losses),
        best_test_error=min(_finite_ones(m["test_error"] for m in metrics), default=None),
        reference=reference,
        difference=_mean(differences),
        difference_sd=_sd(differences),
        pairs=len(differences),
        seconds=statistics.median(seconds) if seconds else None,
        epochs=(min(lengths), max(lengths)) if lengths else None,
        failed="; ".join(dict.fromkeys(reasons)) or None,
    )


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence made of the figures alone.

    Arms are ranked by final test error, and level with the best when the difference is less than the larger of the two
    sds. An arm that lost a seed (diverged, could not train) is told of and not ranked: the mean of the seeds that are
    left would flatter it.
    """
    if not rows:
        raise ValueError("no rows came: give sentence() what summarize(runs) returned")
    (names, setting), decimals = _names(rows), _decimals(rows)
    level, behind = _ranked(rows)
    lost = sorted((r for r in rows if not r.whole), key=lambda r: r.test_error is None)
    lead = (level + lost)[0]

    def told(row: Row, verb: str = "") -> str:
        if row.test_error is None:
            return names[row.label]
        figure = f"{_fixed(row.test_error, decimals, 100)} %" + " test error" * (row is lead)
        notes = [] if row.test_error_sd is None else [f"sd {_fixed(row.test_error_sd, decimals, 100)}"]
        if row is lead or row.counted != lead.counted:
            notes.append(f"{row.counted} seed{'s' * (row.counted > 1)}")
        if not verb:
            return f"{names[row.label]} ({', '.join([figure, *notes])})"
        return f"{names[row.label]} {verb} {figure}" + f" ({', '.join(notes)})" * bool(notes)

    if len(level) > 1:
        main = f"{_listed(map(told, level))} were level"
    elif behind and all(r.test_error_sd is None for r in level + behind):
        main = told(level[0], "was lowest, with no spread to judge it by, at")
    else:
        main = "".join(told(r, "was best with" if behind else "reached") for r in level)
    main += f", ahead of {_listed(told(r, 'with') for r in behind)}" if behind else ""
    fates = {fate: [told(r) for r in lost if _loss(r) == fate] for fate in map(_loss, lost)}
    text = ", and ".join(f"{_listed(those)} {fate}" for fate, those in fates.items())
    text = setting + ", while ".join(filter(None, [main, text]))
    lengths = [e for r in rows for e in r.epochs or ()]
    if len(set(lengths)) > 1:
        text += f"; the runs differ in length ({min(lengths)} to {max(lengths)} epochs)"
    return f"{text[0].upper()}{text[1:]}."


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table; in bold the best arm and those level with it."""
    head, body = _cells(rows)
    leading = _ranked(rows)[0]
    lines = [head, [":---", *["---:"] * (len(head) - 2), ":---"]]
    for row, cells in zip(rows, body, strict=True):
        safe = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        lines.append([f"**{cell}**" for cell in safe[:3]] + safe[3:] if row in leading else safe)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def curves(runs: Sequence[Run], path: str | Path, title: str, *, dark: bool = False) -> Path:
    """Draws training loss (nats) and test error (%) over the epochs into a PNG, 1800 pixels wide.

    Each label is a line, the mean over its seeds, in a band from the lowest seed to the highest. A cross marks where a
    seed ends before the longest run does, or where it stops being finite.

    Raises:
        ImportError: without matplotlib.
        ValueError: as ``summarize``.
    """
    return _write(path, _picture(runs, title, dark))


def _picture(runs: Sequence[Run], title: str, dark: bool) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the learning curves need matplotlib: pip install 'streamnorm[cli]'") from error
    rows, groups = summarize(runs), _groups(runs)
    ink, faint, paper = ("#e3e6eb", "#343a44", "#15181d") if dark else ("#1d2127", "#e3e6ea", "#ffffff")
    notes = [f"{r.label} {_loss(r)}" for r in rows if not r.whole]
    points = [_points(r, key) for r in runs for key in ("train_loss", "test_error")]
    longest = max((epoch for p in points for epoch in p), default=0)
    if any(max(p) < longest for p in points if p):
        notes.append(f"{CROSS} a seed ends here, interrupted or diverged; the mean goes on over the others")
    note = "\n".join(textwrap.fill(line, 135, subsequent_indent="    ") for line in notes)
    names = {r.label: f"{textwrap.fill(r.label, 24)}\n{_fixed(r.test_error, _decimals(rows), 100)} %" for r in rows}
    # In inches: a long note or many labels make the picture taller and leave the size of its type as it is.
    tall = max(3.9, sum(0.12 + 0.19 * len(name.splitlines()) for name in names.values()))
    below, width, heading = 0.8 + 0.19 * len(note.splitlines()), 12.0, textwrap.fill(title, 88)
    height = below + tall + 0.65 + 0.3 * len(heading.splitlines())
    figure = Figure(figsize=(width, height), dpi=150, facecolor=paper)
    FigureCanvasAgg(figure)
    texts = [figure.text(0.03, 1 - 0.22 / height, heading, size=15, weight="bold", color=ink, va="top")]
    texts.append(figure.text(0.03, 0.14 / height, note, size=10, color=ink, va="bottom", linespacing=1.3))
    handles: dict[str, Any] = {}
    for left, key, name in ((0.06, "train_loss", "Training loss, nats"), (0.45, "test_error", "Test error, %")):
        axes = figure.add_axes((left, below / height, 4.1 / width, tall / height), facecolor=paper)
        axes.set_title(name, loc="left", size=12, color=ink)
        axes.set_xlabel("epoch", size=11, color=ink)
        axes.tick_params(colors=ink, labelsize=10, which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.grid(color=faint, linewidth=0.8)
        handles |= _draw(axes, groups, key, longest)
    order = [r.label for r in sorted(rows, key=lambda r: (r.test_error is None, r.test_error)) if r.label in handles]
    place = {"loc": "upper left", "bbox_to_anchor": (0.8, (below + tall) / height), "borderaxespad": 0}
    legend = figure.legend(
        [handles[label] for label in order], [names[label] for label in order], **place, frameon=False, labelcolor=ink
    )
    for text in [*texts, *legend.get_texts()]:
        text.set_parse_math(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw(axes: Any, groups: Mapping[str, Sequence[Run]], key: str, longest: int) -> dict[str, Any]:
    """Draws one panel; returns the line of each label."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    lines, drawn, used = {}, [], list[str]()
    for label, group in groups.items():
        arm = group[0]["arm"]
        colour = COLOURS.get(arm) or SPARE_COLOURS[zlib.crc32(arm.encode()) % len(SPARE_COLOURS)]
        style = {"color": colour, "linestyle": DASHES[used.count(colour) % len(DASHES)]}
        used.append(colour)
        seeds = [_points(r, key) for r in group]
        epochs = sorted({epoch for seed in seeds for epoch in seed})
        if not epochs:
            continue
        columns = [[seed[epoch] for seed in seeds if epoch in seed] for epoch in epochs]
        drawn += [value for column in columns for value in column]
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.16, lw=0)
        dots = {"marker": "o" if longest <= 15 else "", "markersize": 3.5, "linewidth": 1.9}
        (lines[label],) = axes.plot(epochs, [statistics.fmean(c) for c in columns], **style, **dots)
        ends = [(max(seed), seed[max(seed)]) for seed in seeds if seed and max(seed) < longest]
        axes.plot([x for x, _ in ends], [y for _, y in ends], "x", color=colour, markersize=9, markeredgewidth=2)
    if not drawn:
        axes.text(0.5, 0.5, "nothing to draw", ha="center", color="#7f8793", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[], xlabel="")
        return lines
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if min(drawn) > 0 and max(drawn) / min(drawn) > 8:
        axes.set_yscale("log")
        wide = max(drawn) / min(drawn) > 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return lines


def _points(run: Run, key: str) -> dict[int, float]:
    """The finite values of a curve by epoch, errors in per cent."""
    unit = 100 if key.endswith("error") else 1
    return {m["epoch"]: m[key] * unit for m in run.get("metrics") or () if _finite(m[key]) is not None}


def write_report(runs: Sequence[Run], folder: str | Path, title: str) -> Path:
    """Writes ``report.html`` (one file that needs no other), ``results.json`` and ``curves.png`` into ``folder``.

    Each file appears whole or not at all. Figures that are not finite are null in ``results.json``.

    Returns:
        The path of ``report.html``.

    Raises:
        ImportError: without matplotlib; ``results.json`` is written by then.
        ValueError: as ``summarize``.
    """
    rows, folder = summarize(runs), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "sentence": sentence(rows), "rows": [asdict(row) for row in rows], "runs": list(runs)}
    # First, so that a long training is not lost to a missing matplotlib.
    _write(folder / "results.json", (json.dumps(_strict(record), indent=1, allow_nan=False) + "\n").encode())
    light, dark = _picture(runs, title, dark=False), _picture(runs, title, dark=True)
    _write(folder / "curves.png", light)
    return _write(folder / "report.html", _page(runs, rows, title, light, dark).encode())


def _page(runs: Sequence[Run], rows: Sequence[Row], title: str, light: bytes, dark: bytes) -> str:
    settings = _values([{"data": r.get("data", DASH), **(r.get("run") or {})} for r in runs])
    differing = [key for key, values in settings.items() if len(values) > 1]
    own = [(label, _values([r.get("run") or {} for r in group])) for label, group in _groups(runs).items()]
    made = [_values([r.get(part) or {} for r in runs]) for part in ("versions", "machine")]
    return PAGE.substitute(
        title=escape(title),
        sentence=escape(sentence(rows)).replace(" %", "&nbsp;%"),
        table=_html(*_cells(rows), strong={r.label for r in _ranked(rows)[0]}),
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(dark).decode(),
        seeds=_html(*_seed_cells(runs)),
        shared=_pairs({key: values for key, values in settings.items() if len(values) == 1}),
        differing=_html(["Arm", *differing], [[x, *(", ".join(v.get(k, [DASH])) for k in differing)] for x, v in own]),
        machine="".join(map(_pairs, made)),
    )


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of figures, as plain text."""
    decimals, reference = _decimals(rows), next((r.reference for r in rows), None)
    longest = max((r.epochs[1] for r in rows if r.epochs), default=0)
    least = min((abs(r.train_loss) for r in rows if r.train_loss), default=1.0)
    places = min(5, max(1, 2 - math.floor(math.log10(least))))
    lines = []
    for r in rows:
        pairs = f" ({r.pairs} seed{'s' * (r.pairs > 1)})" if r.pairs not in (0, len(r.seeds)) else ""
        notes = [] if r.whole else [_loss(r)]
        if r.epochs and r.epochs[0] < longest:
            notes.append(f"ended at epoch {r.epochs[0]} of {longest}")
        lines.append([
            r.label,
            str(r.counted) if r.counted == len(r.seeds) else f"{r.counted} of {len(r.seeds)}",
            _fixed(r.test_error, decimals, 100, r.test_error_sd),
            _fixed(r.best_test_error, decimals, 100),
            "reference" if r.label == reference else _fixed(r.difference, decimals, 100, r.difference_sd, "+") + pairs,
            _fixed(r.train_loss, places, 1, r.train_loss_sd),
            DASH if r.seconds is None else f"{r.seconds:.3g}",
            "; ".join(notes),
        ])  # fmt: skip
    difference = f"Difference to {reference} (points)" if reference else "Difference (points)"
    head = ["Arm", "Seeds", "Test error (%)", "Lowest (%)", difference]
    return [*head, "Training loss (nats)", "Time per epoch (s)", "Note"], lines


def _seed_cells(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    head = ["Arm", "Seed", "Epochs", "Updates", "Samples", "Training loss (nats)", "Training error (%)"]
    lines = []
    for r in runs:
        metrics = r.get("metrics") or [{}]
        end, seconds = metrics[-1], _finite_ones(m.get("seconds") for m in metrics)
        losses = [_fixed(_finite(end.get(f"{part}_loss")), 4) for part in ("train", "test")]
        errors = [_fixed(_finite(end.get(f"{part}_error")), 2, 100) for part in ("train", "test")]
        counts = [str(end.get(key, DASH)) for key in ("epoch", "updates", "samples")]
        figures = [losses[0], errors[0], losses[1], errors[1], f"{sum(seconds):.3g}" if seconds else DASH]
        lines.append([r["label"], str(r["seed"]), *counts, *figures])
    return [*head, "Test loss (nats)", "Test error (%)", "Time (s)"], lines


def _html(head: Sequence[str], body: Sequence[Sequence[str]], strong: Iterable[str] = ()) -> str:
    """A table; columns of figures stand to the right, columns without any content are left out."""
    kept = [i for i in range(len(head)) if any(line[i] for line in body)]
    figure = re.compile(rf"[-+{MINUS}]?\d|{DASH}$|reference$")
    marks = {i: ' class="n"' if all(figure.match(line[i]) for line in body) else "" for i in kept}

    def line(cells: Sequence[str], tag: str, mark: str = "") -> str:
        return f"<tr{mark}>{''.join(f'<{tag}{marks[i]}>{escape(cells[i])}</{tag}>' for i in kept)}</tr>"

    rows = [line(cells, "td", ' class="best"' if cells[0] in strong else "") for cells in body]
    return f'<div class="wide"><table>{line(head, "th")}{"".join(rows)}</table></div>' if rows and kept[1:] else ""


def _pairs(values: Mapping[str, Sequence[str]]) -> str:
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(', '.join(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(items)}</dl>" if values else ""


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each label, after a check of their shape."""
    if isinstance(runs, Mapping) or not runs:
        raise ValueError(f"no list of runs came but {runs!r:.60}: give one dict per arm and seed")
    groups: dict[str, list[Run]] = {}
    for i, r in enumerate(runs):
        if not isinstance(r, Mapping) or not {"arm", "label", "seed"} <= set(r):
            raise ValueError(f"runs[{i}] is {r!r:.80}: a run is a dict with arm, label, seed, metrics and failed")
        name, metrics = f"runs[{i}] ({r['label']!r}, seed {r['seed']})", r.get("metrics") or []
        if not metrics and not r.get("failed"):
            raise ValueError(f"{name} has no metrics: train one epoch, or say in 'failed' why it could not train")
        last = 0
        for m in metrics:
            values = [m.get(k, "") for k in ("train_loss", "test_error")] if isinstance(m, Mapping) else [""]
            numeric = all(isinstance(value, int | float | None) for value in values)
            if not numeric or not isinstance(m.get("epoch"), int) or m["epoch"] <= last:
                raise ValueError(
                    f"{name} has {m!r:.120}: an epoch needs a growing whole 'epoch', and in 'train_loss' and "
                    "'test_error' a number (None after divergence)"
                )
            last = m["epoch"]
        group = groups.setdefault(r["label"], [])
        if any(r["seed"] == other["seed"] for other in group):
            raise ValueError(f"{name} came twice: give each seed of a label once, or give the two different labels")
        if group and r["arm"] != group[0]["arm"]:
            raise ValueError(f"{name} has arm {r['arm']!r} and others have {group[0]['arm']!r}: give them two labels")
        if r.get("data") != runs[0].get("data"):
            raise ValueError(f"{name} has data {r.get('data')!r}, runs[0] {runs[0].get('data')!r}: report them apart")
        group.append(r)
    return groups


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite_ones(values: Iterable[Any]) -> list[float]:
    return [x for x in map(_finite, values) if x is not None]


def _final(run: Run, key: str) -> float | None:
    return _finite(run["metrics"][-1].get(key))


def _difference(run: Run, other: Run) -> float | None:
    """Test error of a run minus the other's, at the last epoch which both reached."""
    ours, theirs = ({m["epoch"]: _finite(m["test_error"]) for m in r["metrics"]} for r in (run, other))
    epoch = max(set(ours) & set(theirs), default=0)
    a, b = ours.get(epoch), theirs.get(epoch)
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ranked(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Of the rows that lost no seed: the best and those level with it, and those behind; lowest test error first."""
    whole = sorted((r for r in rows if r.whole), key=lambda r: r.test_error or 0.0)

    def level(row: Row) -> bool:
        gap = (row.test_error or 0.0) - (whole[0].test_error or 0.0)
        return gap == 0 or gap < max(row.test_error_sd or 0.0, whole[0].test_error_sd or 0.0)

    return [r for r in whole if level(r)], [r for r in whole if not level(r)]


def _names(rows: Sequence[Row]) -> tuple[dict[str, str], str]:
    """What to call each label in prose, and how to begin when all have the same S/B and B/U."""
    found = [re.search(r"(\d+) S/B(?: \S (\d+) B/U)?", r.label) for r in rows]
    settings = {match and match.groups() for match in found}
    if len(settings) > 1 or len({r.arm for r in rows}) < len(rows):
        return {r.label: r.label for r in rows}, ""
    names = {r.label: f"{'no' if r.arm == 'none' else r.arm} normalization" for r in rows}
    samples, batches = settings.pop() or (None, None)
    start = f"At {samples} sample{'s' * (samples != '1')} a batch" if samples else ""
    start += f" and {batches} batch{'es' * (batches != '1')} an update" if batches else ""
    return names, start + ", " * bool(start)


def _loss(row: Row) -> str:
    """What became of the seeds which a label lost, in words."""

    def of(seeds: Sequence[int]) -> str:
        some = f" with seed{'s' * (len(seeds) > 1)} {_listed(map(str, seeds), len(seeds))}"
        return some if len(seeds) < len(row.seeds) else ""

    failed = f"could not train{of(row.failed_seeds)} ({row.failed})" if row.failed_seeds else ""
    diverged = f"diverged{of(row.diverged)}" if row.diverged else ""
    return _listed(filter(None, [failed, diverged]))


def _listed(items: Iterable[str], most: int = 4) -> str:
    *first, last = list(items) or [""]
    if len(first) > most:
        first, last = first[:most], f"{len(first) + 1 - most} others"
    return f"{', '.join(first)} and {last}" if first else last


def _decimals(rows: Sequence[Row]) -> int:
    """Decimals of percentages: two where one would round a spread or an error away."""
    small = [r.test_error_sd for r in rows if r.test_error_sd] + [r.test_error / 10 for r in rows if r.test_error]
    return 2 if min(small, default=1.0) < 0.001 else 1


def _fixed(value: float | None, places: int, unit: float = 1, sd: float | None = None, sign: str = "") -> str:
    if value is None:
        return DASH
    text = f"{value * unit:{sign}z.{places}f}" if abs(value) < 1e6 else f"{value * unit:{sign}.3g}"
    return text.replace("-", MINUS) + ("" if sd is None else f" ± {sd * unit:.{places}f}")


def _values(dicts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The different values of each key, as text."""
    keys = list(dict.fromkeys(key for d in dicts for key in d))
    every = {key: [d.get(key, DASH) for d in dicts] for key in keys}
    texts = {key: [x if isinstance(x, str) else json.dumps(x) for x in values] for key, values in every.items()}
    return {key: list(dict.fromkeys(values)) for key, values in texts.items()}


def _strict(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _write(path: str | Path, content: bytes) -> Path:
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1d2127; --soft: #5a626e; --line: #dfe2e7; --paper: #fff; --mark: #f1f4f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6eb; --soft: #9aa3b0; --line: #343a44; --paper: #15181d; --mark: #20262f } }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
p { max-width: 46rem } .said { font-size: 1.2rem; max-width: 52rem; margin: 0 0 1.75rem }
.wide { overflow-x: auto; margin: 0 0 1.25rem } summary { cursor: pointer; margin: 0 0 .75rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums lining-nums }
th, td { padding: .4rem .8rem .4rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th, dt, summary { color: var(--soft); font-weight: 500 } th { vertical-align: bottom } .n { text-align: right }
td.n { white-space: nowrap } td:first-child, td:last-child:not(.n) { min-width: 11.5rem }
.best td { font-weight: 650; background: var(--mark) } img { display: block; width: 100%; min-width: 44rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem 1rem; margin: 0 0 1.5rem }
dt, dd { font-size: .9rem; margin: 0; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>$title</h1>
<p class="said">$sentence</p>
$table
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,$dark">
<img alt="Training loss and test error of each arm over the epochs; the table above has the final figures."
src="data:image/png;base64,$light">
</picture></div>
<h2>How to read this</h2>
<p>Figures are the mean over seeds ± the sample standard deviation at each run&rsquo;s last epoch; &ldquo;lowest&rdquo;
is the best of any epoch and seed, picked on the test set and so too good. In bold: the lowest test error and all that
are level with it, nearer than the larger of the two deviations; an arm which lost a seed is not ranked. Differences
pair runs of the same seed, at the last epoch both have; below zero is better than the reference.</p>
<details><summary>Each seed</summary>
$seeds
</details>
<h2>Settings</h2>
<p>The same in all runs:</p>
$shared
$differing
<h2>Versions and machine</h2>
$machine
</body>
</html>
""")
