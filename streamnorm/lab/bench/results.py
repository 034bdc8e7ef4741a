"""What the times of a case say: ratios, their spread, distances to the memory floor, exponents."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamnorm.lab.bench import floor
from streamnorm.lab.bench.journal import Timed
from streamnorm.lab.bench.targets import TARGETS, Target, geometric_mean
from streamnorm.lab.bench.timing import backward, exponent, quartiles, ratios

LARGE = 1 << 22
"""Bytes of all tensors of a step from which on its distance to the memory floor is told: below, calls count more."""
TUNED, DEFAULT = "tuned", "default"


@dataclass(frozen=True)
class Row:
    """A variant of a case.

    Attributes:
        seconds: of a step, the median over rounds.
        ratio: quartile, median, quartile of the ratios to the reference in the same rounds.
        forward, backward: median ratios of the halves; None if the variant or the reference has none.
        ideal: the bytes that an ideal implementation moves, with stores past the cache and through it; None where
            that says nothing.
        floor: how many times longer than moving them alone, likewise.
        peak: the most bytes that a step holds; None where memory is not compared.
    """

    variant: str
    is_ours: bool
    seconds: float
    ratio: tuple[float, float, float]
    forward: float | None
    backward: float | None
    ideal: tuple[int, int] | None
    floor: tuple[float, float] | None
    peak: int | None = None


def rows(case: Timed) -> list[Row]:
    """A row for each variant, in the order of the registry."""
    found, base = [], case.times[case.reference]
    for variant, times in case.times.items():
        seconds = statistics.median(times["both"])
        has_halves = "forward" in times and "forward" in base
        traffic = case.traffic.get(variant)
        ideal = far = None
        if traffic is not None and traffic.resident >= LARGE and case.floor:
            ideal = traffic.bytes(False), traffic.bytes(True)
            far = tuple(floor.distance(seconds, traffic, case.floor, allocate) for allocate in (False, True))
        found.append(
            Row(
                variant=variant,
                is_ours=variant in case.ours,
                seconds=seconds,
                ratio=quartiles(ratios(times["both"], base["both"])),
                forward=statistics.median(ratios(times["forward"], base["forward"])) if has_halves else None,
                backward=statistics.median(ratios(backward(times), backward(base))) if has_halves else None,
                ideal=ideal,
                floor=far,  # type: ignore[arg-type]
                peak=case.peaks.get(variant),
            )
        )
    return found


def median_ratio(case: Timed, variant: str, reference: str) -> float:
    """Of the rounds of one case."""
    return statistics.median(ratios(case.times[variant]["both"], case.times[reference]["both"]))


def peak_ratio(case: Timed, variant: str, reference: str) -> float:
    """Of the most bytes that a step holds."""
    return case.peaks[variant] / case.peaks[reference]


@dataclass(frozen=True)
class Total:
    """A variant over the cases of a group.

    Attributes:
        mean: the geometric mean of the median ratios.
        worst: the largest of them, and ``worst_case`` where.
    """

    variant: str
    reference: str
    cases: int
    mean: float
    worst: float
    worst_case: str


def totals(cases: Sequence[Timed]) -> list[Total]:
    """A total for each variant and reference of a group's cases under one allocator."""
    seen: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases:
        for variant in case.times:
            if variant != case.reference:
                ratio = median_ratio(case, variant, case.reference)
                seen.setdefault((variant, case.reference), {})[case.name] = ratio
    return [total(*key, values) for key, values in seen.items()]


def total(variant: str, reference: str, values: dict[str, float]) -> Total:
    worst = max(values, key=lambda name: values[name])
    return Total(variant, reference, len(values), geometric_mean([*values.values()]), values[worst], worst)


def verdicts(cases: Sequence[Timed]) -> list[tuple[Target, Total, bool]]:
    """The targets that were measured, what came out, and whether they are met; for cases under one allocator."""
    results = []
    for target in TARGETS:
        mine = [case for case in cases if case.group == target.group and target.cases in case.name]
        ratio = median_ratio if target.of == "time" else peak_ratio
        values = {
            case.name: ratio(case, target.variant, target.reference)
            for case in mine
            if {target.variant, target.reference} <= set(case.times if target.of == "time" else case.peaks)
        }
        if values:
            results.append((target, total(target.variant, target.reference, values), target.met([*values.values()])))
    return results


@dataclass(frozen=True)
class Curve:
    """What a variant costs as something grows.

    Attributes:
        seconds: the median of a step, by size.
        exponent: the slope of log seconds over log size between the sizes ``low`` and ``high``; None for one size.
    """

    series: str
    variant: str
    is_ours: bool
    seconds: dict[int, float]
    exponent: float | None
    low: int
    high: int


def curves(cases: Iterable[Timed]) -> list[Curve]:
    """A curve for each series and variant."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    ours = set()
    for case in cases:
        for variant, times in case.times.items():
            if case.series:
                points.setdefault((case.series, variant), {})[case.size] = statistics.median(times["both"])
                ours |= {variant} & set(case.ours)
    drawn = []
    for (series, variant), seconds in points.items():
        slope, low, high = exponent(seconds) if len(seconds) > 1 else (None, min(seconds), max(seconds))
        drawn.append(Curve(series, variant, variant in ours, seconds, slope, low, high))
    return drawn


def allocators(cases: Iterable[Timed]) -> list[str]:
    """Those that were used, the tuned one first."""
    used = {case.allocator for case in cases}
    return [allocator for allocator in (TUNED, DEFAULT) if allocator in used]
