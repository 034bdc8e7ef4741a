"""What is claimed of the default on streams, and how the records of runs are compared. Never trains.

Two arms are compared on the same rows of a stream, with the same seeds, and over those rates that both were run with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from streamnorm.lab.studies.streams.data import REAL, STREAMS
from streamnorm.lab.studies.streams.runs import STEP, accuracy, common, name_of
from streamnorm.lab.studies.study import Claim, Record, Records, Verdict, judge, mean, spread

Setting = tuple[str, float]
"""Optimizer and rate."""
STABLE = "many seeds: "
"""What the names begin with of runs that are there to see whether any seed diverges."""
BEHIND, AHEAD = 0.005, 0.03


@dataclass(frozen=True)
class View:
    """A stream, or the first rows of it."""

    name: str
    stream: str
    first: int | None = None


WHOLE = tuple(View(stream, stream) for stream in STREAMS)
EARLY = View("Elec2, first 5,000", "Elec2", 5000)
VIEWS = (EARLY, *WHOLE)
TARGETS: dict[tuple[str, float], float] = {
    **{("Bananas", rate): target for rate, target in ((0.01, 0.84), (0.03, 0.835), (0.1, 0.82))},
    **{(EARLY.name, rate): target for rate, target in ((0.01, 0.82), (0.03, 0.815), (0.1, 0.785))},
    **{("Elec2", rate): target for rate, target in ((0.003, 0.82), (0.01, 0.82), (0.03, 0.81), (0.1, 0.78))},
}
"""What the default should reach with raw features and SGD at these rates."""


# --- Comparing


def settings(records: Records, view: View, features: str, arm: str) -> dict[Setting, list[Record]]:
    """The records of an arm on a stream, by optimizer and rate."""
    return {
        (own[0]["optimizer"], own[0]["rate"]): list(own)
        for name, own in records.items()
        if not name.startswith(STABLE)
        and (own[0]["stream"], own[0]["features"], own[0]["arm"]) == (view.stream, features, arm)
    }


def arms_of(records: Records) -> list[str]:
    """The arms that were run, in their order."""
    return list(dict.fromkeys(own[0]["arm"] for own in records.values()))


def rows_of(view: View, cells: Iterable[list[Record]]) -> int:
    """How many rows several runs on a stream can be compared on."""
    rows = common(cells)
    return min(rows, view.first or rows)


def accuracies(own: Iterable[Record], rows: int | None = None) -> list[float]:
    """Of each seed, over the first rows."""
    return [accuracy(record, rows) for record in own]


def best(cells: dict[Setting, list[Record]], rows: int) -> Setting:
    """The optimizer and rate with the highest mean accuracy over the first rows."""
    return max(cells, key=lambda setting: mean(accuracies(cells[setting], rows)))


def shared(records: Records, view: View, features: str, arms: tuple[str, str]) -> list[dict[Setting, list[Record]]]:
    """The records of two arms at those settings that both have."""
    both = [settings(records, view, features, arm) for arm in arms]
    return [{key: own[key] for key in own if all(key in other for other in both)} for own in both]


def gains(records: Records, view: View, features: str, arm: str, other: str) -> list[float]:
    """By how much ``arm`` is ahead of ``other``, each at its best setting, seed by seed; empty if not both were run."""
    a, b = shared(records, view, features, (arm, other))
    if not a:
        return []
    rows = rows_of(view, [*a.values(), *b.values()])
    one, two = (accuracies(own[best(own, rows)], rows) for own in (a, b))
    return [x - y for x, y in zip(one, two, strict=True)]


def over_streams(records: Records, features: str, arm: str, other: str) -> list[float]:
    """``gains``, the mean over all streams, seed by seed."""
    each = [own for view in WHOLE if (own := gains(records, view, features, arm, other))]
    return [mean(seed) for seed in zip(*each, strict=True)]


def signed(values: list[float]) -> str:
    """Mean and sd of paired differences, with its sign.

    >>> signed([0.01, 0.03])
    '+0.0200 ± 0.0141'
    """
    return ("+" if mean(values) >= 0 else "") + spread(values)


# --- Claims


def cells_behind(records: Records, limit: float = BEHIND) -> tuple[int, list[tuple[str, list[float]]]]:
    """How many cells there are, and those where the default is more than ``limit`` behind layer normalization."""
    count, found = 0, []
    for view in VIEWS:
        for features in dict.fromkeys(own[0]["features"] for own in records.values()):
            a, b = shared(records, view, features, ("default", "layer"))
            for optimizer, rate in a:
                pair = a[optimizer, rate], b[optimizer, rate]
                rows = rows_of(view, pair)
                one, two = (accuracies(own, rows) for own in pair)
                apart = [x - y for x, y in zip(one, two, strict=True)]
                count += 1
                if mean(apart) < -limit:
                    found.append((name_of(view.name, features, "default", optimizer, rate), apart))
    return count, found


def _never_behind(records: Records) -> tuple[Verdict, str]:
    count, behind = cells_behind(records)
    verdict: Verdict = "reproduced" if not behind else "partly" if len(behind) <= 0.05 * count else "contradicted"
    listed = "".join(f"; {name}: {signed(apart)}" for name, apart in behind)
    return verdict, f"{len(behind)} of {count} cells are{listed}"


def _ahead_of_layer(records: Records) -> tuple[Verdict, str]:
    ahead = over_streams(records, "raw", "default", "layer")
    figures = [f"raw {signed(ahead)}"]
    if other := over_streams(records, "standardized", "default", "layer"):
        figures.append(f"standardized {signed(other)}")
    return judge(ahead, AHEAD), ", ".join(figures)


def _ahead_of_none(records: Records) -> tuple[Verdict, str]:
    found = {v.name: own for v in WHOLE if v.stream in REAL and (own := gains(records, v, "raw", "default", "none"))}
    ahead = sum(mean(own) > 0 for own in found.values())
    verdict: Verdict = (
        "reproduced" if ahead >= len(found) - 1 else "partly" if ahead > len(found) / 2 else "contradicted"
    )
    told = ", ".join(f"{name} {signed(own)}" for name, own in found.items())
    return verdict, f"ahead on {ahead} of {len(found)}: {told}"


def _targets(records: Records) -> tuple[Verdict, str]:
    reached, figures = [], []
    for view in VIEWS:
        cells = settings(records, view, "raw", "default")
        for (name, rate), target in TARGETS.items():
            if name == view.name and (own := cells.get(("SGD", rate))):
                rows = rows_of(view, [own])
                values = accuracies(own, rows)
                reached.append(mean(values) >= target)
                short = rows < min(view.first or math.inf, own[0]["of"])
                where = f"{name}{f' ({rows} rows of it)' if short else ''}, {rate:g}"
                figures.append(f"{where}: {spread(values)} of {target:g}")
    share = sum(reached) / len(reached) if reached else 0
    verdict: Verdict = "reproduced" if share == 1 else "partly" if share >= 0.5 else "contradicted"
    return verdict, f"{sum(reached)} of {len(reached)} reached; " + "; ".join(figures)


def diverged(records: Iterable[Record]) -> int:
    """How many of them."""
    return sum(record["diverged"] is not None for record in records)


def _nothing_diverges(records: Records) -> tuple[Verdict, str]:
    many = {name: own for name, own in records.items() if name.startswith(STABLE)}
    lost = {arm: (diverged(own), len(own)) for arm in arms_of(records) if (own := of_arm(records, arm))}
    figures = [f"{name.removeprefix(STABLE)}: {diverged(own)} of {len(own)} seeds" for name, own in many.items()]
    figures.append("of all runs " + ", ".join(f"{arm} {n} of {of}" for arm, (n, of) in lost.items()))
    alone = sum(diverged(own) for own in many.values()) + lost.get("default", (0, 0))[0]
    return ("reproduced" if not alone else "contradicted"), "; ".join(figures)


def of_arm(records: Records, arm: str) -> list[Record]:
    """All records of an arm, those of many seeds left out."""
    return [r for name, own in records.items() if own[0]["arm"] == arm and not name.startswith(STABLE) for r in own]


def _others(records: Records) -> tuple[Verdict, str]:
    others = [arm for arm in arms_of(records) if arm not in ("default", "layer")]
    told = {arm: over_streams(records, "raw", "default", arm) for arm in others}
    return "reported", "default ahead of " + ", ".join(f"{arm} by {signed(own)}" for arm, own in told.items() if own)


CLAIMS = [
    Claim(
        "ST-1",
        f"The default is nowhere more than {BEHIND} behind layer normalization, setting by setting.",
        _never_behind,
    ),
    Claim("ST-2", f"At each one's best rates it is {AHEAD} ahead of it, the mean over all streams.", _ahead_of_layer),
    Claim("ST-3", "At best rates it is ahead of no normalization on all real streams but one.", _ahead_of_none),
    Claim("ST-4", "It reaches the targets for Bananas and Elec2 (raw, SGD).", _targets),
    Claim("ST-5", "It never diverges, at SGD 0.1 in many seeds either.", _nothing_diverges),
    Claim("ST-6", "Beside the other normalizations at best rates, raw, the mean over all streams.", _others),
]


# --- Around a drift


def around(record: Record, window: int) -> tuple[float, float, float]:
    """The accuracy over the ``window`` rows before the drift, and over one and two windows after it."""
    drift = record["drift"]
    return (
        accuracy(record, drift, drift - window),
        accuracy(record, drift + window, drift),
        accuracy(record, drift + 2 * window, drift),
    )


def smooth(record: Record, steps: int = 4) -> list[tuple[int, float]]:
    """Rows and the accuracy over the last ``steps`` counts up to them."""
    right = record["right"]
    whole = record["learned"] // STEP
    return [(STEP * i, sum(right[i - steps : i]) / (STEP * steps)) for i in range(steps, whole + 1)]
