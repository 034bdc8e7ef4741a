"""What the paper says about Lp normalization and its settings, checked on the records of ``moments``."""

from __future__ import annotations

from streamnorm.lab.studies.moments.runs import ORDERS, PER_BATCH, SETTINGS, grid_name
from streamnorm.lab.studies.study import (
    Claim,
    Records,
    Verdict,
    alike,
    below,
    deviation,
    end_errors,
    final,
    mean,
    spread,
    together,
)

PAIRS = {
    "B": ("L1", "L2"),
    "A": ("A streaming L1, 1 x 64", "A streaming L2, 1 x 64"),
    "C": ("C streaming L1, 32 x 2", "C streaming L2, 32 x 2"),
    "RNN": ("RNN streaming L1, 32 x 2", "RNN streaming L2, 32 x 2"),
}
"""L1 and L2 in four networks."""
POINT, NATS = 0.01, 0.02
"""How far apart they may be: in error, and in validation loss."""


def _c06(records: Records) -> tuple[Verdict, str]:
    errors = {p: end_errors(records, f"L{p}") for p in ORDERS}
    near: list[Verdict] = [alike(below(errors[2], errors[p]), 1.5 * POINT) for p in ORDERS if p not in (2, 7)]
    worst = max(mean(errors[p]) for p in ORDERS if p != 7)
    last = mean(errors[7])
    slightly = last >= worst - deviation(errors[7]) and last - mean(errors[2]) < 3 * POINT
    figures = "test error " + ", ".join(f"L{p} {spread(of)}" for p, of in errors.items())
    seventh: Verdict = "reproduced" if slightly else "contradicted"
    return together([*near, seventh]), figures


def _c07(records: Records) -> tuple[Verdict, str]:
    figures, near = [], 0
    for network, (one, two) in PAIRS.items():
        speaks = network == "RNN"
        of = [final(records, name, "validation_loss") if speaks else end_errors(records, name) for name in (one, two)]
        apart = below(of[1], of[0])
        near += abs(mean(apart)) <= (NATS if speaks else POINT)
        figures.append(f"{network} {spread(apart)}{' nats' if speaks else ''}")
    verdict: Verdict = "reproduced" if near >= 3 else "partly" if near == 2 else "contradicted"
    return verdict, f"L1 above L2 in test error by {', '.join(figures)}; within the margin in {near} of {len(PAIRS)}"


def _c62(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for architecture in "AB":
        for m in PER_BATCH:
            names = [grid_name(architecture, setting, p, m) for setting in SETTINGS for p in (1, 2)]
            means = {name: mean(end_errors(records, name)) for name in names}
            apart = max(means.values()) - min(means.values())
            figures.append(f"{architecture} at {m} S/B {apart:.4f}")
            if m == max(PER_BATCH):
                verdict: Verdict = "reproduced" if apart <= 2 * POINT else "contradicted"
                parts.append(verdict)
    return together(parts), "test errors of settings and p apart by " + ", ".join(figures)


CLAIMS = [
    Claim("C-06", "All moments perform similarly well, L7 slightly worse (Figure 3, 7.2).", _c06, ("L1", "L7")),
    Claim(
        "C-07",
        "L1 works as well as L2 in almost all scenarios (1, 3.4, 7.2).",
        _c07,
        tuple(name for pair in PAIRS.values() for name in pair),
    ),
    Claim(
        "C-62",
        "Most variants of the settings perform alike, some are better in some situations (3.4).",
        _c62,
        tuple(grid_name(a, s, p, m) for a in "AB" for s in SETTINGS for p in (1, 2) for m in PER_BATCH),
    ),
]
