"""What the text says about testing with batch normalization, checked on the records of ``pipeline``."""

from __future__ import annotations

import math
from itertools import pairwise

from streamnorm.lab.studies.pipeline.runs import BATCH, EPSILONS, NORMALIZED, PLAIN, SMALL, expected_ratio
from streamnorm.lab.studies.study import (
    Claim,
    Records,
    Verdict,
    alike,
    below,
    final,
    judge,
    mean,
    number,
    spread,
    together,
)


def figure(records: Records, way: str, key: str) -> list[float]:
    """A figure of each seed; nan for a run that failed."""
    return [number(r["measures"][way][key]) if not r["failed"] else math.nan for r in records[NORMALIZED]]


def sizes_of(records: Records) -> list[int]:
    """The sizes of the mini-batches of the passes."""
    ways = {way for record in records[NORMALIZED] if not record["failed"] for way in record["measures"]}
    return sorted(int(way.split()[1]) for way in ways if way.startswith("moving"))


def _c42(records: Records) -> tuple[Verdict, str]:
    one, exact = figure(records, "one", "test_error"), figure(records, "exact", "test_error")
    two = figure(records, f"moving {BATCH}", "test_error")
    same = alike(below(two, one), 0.005)
    figures = [f"test error: ONE {spread(one)}, TWO {spread(two)}, exact {spread(exact)}"]
    closer: list[Verdict] = []
    for key, what in (("mean", "means off by (sigmas)"), ("sigma", "sigmas off by (log)")):
        first, second = figure(records, "one", key), figure(records, f"moving {BATCH}", key)
        closer.append(judge(below(second, first), 0.0))
        figures.append(f"{what}: ONE {spread(first)}, TWO {spread(second)}")
    return together([same, *closer]), "; ".join(figures)


def _c43(records: Records) -> tuple[Verdict, str]:
    sizes, figures = sizes_of(records), []
    errors = {m: mean(figure(records, f"moving {m}", "sigma")) for m in sizes}
    grows = bool(sizes) and all(errors[a] > errors[b] for a, b in pairwise(sizes))
    for m in sizes:
        ratio = mean(figure(records, f"corrected {m}", "first"))
        figures.append(
            f"m = {m}: test error {spread(figure(records, f'moving {m}', 'test_error'))}, "
            f"sigmas off by {errors[m]:.3f} (log), "
            f"in the first layer {ratio:.3f} of the exact ones ({expected_ratio(m):.3f} if normal)"
        )
    small, usual = (figure(records, f"moving {m}", "test_error") for m in (SMALL, BATCH))
    hurt = below(usual, small)
    figures = figures or [spread(hurt)]
    return together(["reproduced" if grows else "contradicted", judge(hurt, 0.005)]), "; ".join(figures)


def _c44(records: Records) -> tuple[Verdict, str]:
    losses = {eps: [record["epsilon"][f"{eps:g}"] for record in records[NORMALIZED]] for eps in EPSILONS}
    breaks = all(loss is None for loss in losses[0.0])
    holds = all(loss is not None for eps in EPSILONS[1:] for loss in losses[eps])
    lost = {eps: sum(loss is None for loss in of_seeds) for eps, of_seeds in losses.items()}
    figures = [
        f"eps = {eps:g}: " + (f"not finite in {lost[eps]} of {len(of_seeds)} seeds" if lost[eps] else spread(of_seeds))
        for eps, of_seeds in losses.items()
    ]
    return together([("reproduced" if good else "contradicted") for good in (breaks, holds)]), (
        f"loss after 20 updates on normalized pixels, {', '.join(figures)}"
    )


def _c45(records: Records) -> tuple[Verdict, str]:
    costs = {name: [record["cost"] for record in records[name]] for name in (NORMALIZED, PLAIN)}
    a, b = costs[NORMALIZED][0], costs[PLAIN][0]
    seconds = {name: mean(final(records, name, "seconds")) for name in costs}
    test = {name: mean([one["test_seconds"] for one in costs[name]]) for name in costs}
    passes, took = _passes(records)
    return "reported", (
        f"{a['parameters']} parameters with BN, {b['parameters']} with gain and bias alone; {a['kept']} numbers kept "
        f"beside them, {b['kept']}; an epoch takes {seconds[NORMALIZED] / seconds[PLAIN]:.2f} times as long, testing "
        f"{test[NORMALIZED] / test[PLAIN]:.2f} times; exact statistics took {passes:g} passes, {took:.2f} of the time "
        "of a training epoch"
    )


def _passes(records: Records) -> tuple[float, float]:
    whole = [record for record in records[NORMALIZED] if not record["failed"]]
    if not whole:
        return math.nan, math.nan
    took = mean([record["measures"]["seconds"] / record["metrics"][-1]["seconds"] for record in whole])
    return mean([record["measures"]["passes"] for record in whole]), took


CLAIMS = [
    Claim("C-42", "Methods ONE and TWO test alike, and TWO is closer to the statistics of all data (001).", _c42),
    Claim("C-43", "Mini-batches of 4 or 8 are too small for the statistics of training with 64 (001).", _c43),
    Claim("C-44", "BN needs an epsilon: without one some networks end in NaN (001).", _c44),
    Claim("C-45", "BN costs space, parameters and time, and its postprocessing passes (001).", _c45),
]
