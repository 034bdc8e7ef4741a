"""What the paper says about references, checked on the records of ``references``."""

from __future__ import annotations

from streamnorm.definition.ref import REFS
from streamnorm.lab.studies.references.runs import BATCH, OURS, SAMPLE, locality
from streamnorm.lab.studies.study import (
    CHANCE,
    Claim,
    Records,
    Verdict,
    below,
    deviation,
    end_errors,
    final,
    judge,
    mean,
    spread,
    together,
)

PLACES = {"B": "", "C(5, 1)": "C "}
"""The networks of Figures 6 and 7, and how the names of their runs begin."""
PLAIN = tuple(f"{prefix}{name}-B" for prefix in PLACES.values() for name in (*SAMPLE, *BATCH))
SEPARATE = (("BA4", "BA3"), ("BA1", "BA2"), ("BA6", "BA5"))
"""References of one feature map, and those of all of them."""


def _c15(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for network, prefix in PLACES.items():
        means = {name: mean(end_errors(records, f"{prefix}{name}-B")) for name in (*SAMPLE, "BA1", "BA4")}
        of = [means[name] for name in SAMPLE]
        apart, gap = max(of) - min(of), mean(of) - min(means["BA1"], means["BA4"])
        verdict: Verdict = "reproduced" if apart <= 0.03 or apart < gap else "contradicted"
        parts.append(verdict)
        figures.append(f"{network}: apart by {apart:.4f}, behind the better of BA1 and BA4 by {gap:.4f}")
    return together(parts), "test error, " + "; ".join(figures)


def _c16(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for network, prefix in PLACES.items():
        for own, together_ in SEPARATE:
            gain = below(end_errors(records, f"{prefix}{own}-B"), end_errors(records, f"{prefix}{together_}-B"))
            parts.append(judge(gain, 0.005))
            figures.append(f"{network} {own} below {together_} by {spread(gain)}")
    return together(parts), "test error, " + "; ".join(figures)


def _c17(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for network, prefix in PLACES.items():
        behind = below(end_errors(records, f"{prefix}BA1-B"), end_errors(records, f"{prefix}BA6-B"))
        parts.append(judge([-gap for gap in behind], -0.02, sign_alone_is_partly=False))
        figures.append(f"{network} BA6 above BA1 by {spread(behind)}")
    return together(parts), "test error, " + "; ".join(figures)


def _c31(records: Records) -> tuple[Verdict, str]:
    gains = {}
    for name in REFS:
        of = [final(records, f"{name}-{form}", "train_error") for form in "SB"]
        gains[name] = below(*([1.0 if x != x else x for x in errors] for errors in of))
    lower = [name for name, gain in gains.items() if mean(gain) > max(0.0, deviation(gain))]
    named = [name in lower for name in ("BA1", "BA4", "BA6")]
    most = len(lower) > len(REFS) / 2
    verdict: Verdict = "reproduced" if all(named) and most else "partly" if any(named) or most else "contradicted"
    return verdict, "training error, -S below -B by " + ", ".join(f"{name} {spread(of)}" for name, of in gains.items())


def _c60(records: Records) -> tuple[Verdict, str]:
    moved = {name: locality(name) for name in ("BA6", "BA1")}
    figures = ", ".join(f"{name} {'moves' if of else 'does not move'}" for name, of in moved.items())
    return (
        "contradicted" if moved["BA6"] else "reproduced"
    ), f"with all other neurons changed, what one keeps: {figures}"


def _c64(records: Records) -> tuple[Verdict, str]:
    failed = {name: sum(bool(r["failed"]) for r in records[f"{name}-S"]) for name in REFS}
    errors = {name: end_errors(records, f"{name}-S") for name in REFS}
    able = [name for name in REFS if not failed[name] and mean(errors[name]) < CHANCE - 0.05]
    verdict: Verdict = "reproduced" if len(able) == len(REFS) else "partly" if able else "contradicted"
    return verdict, "test error " + ", ".join(f"{name}-S {spread(of)}" for name, of in errors.items())


CLAIMS = [
    Claim("C-15", "Sample Normalizations all work similarly (Figures 6 and 7).", _c15, PLAIN),
    Claim("C-16", "It is better to normalize each feature map separately (Figures 6 and 7).", _c16, PLAIN),
    Claim("C-17", "Neuron-wise normalization performs very well (8, Figures 6 and 7).", _c17, PLAIN),
    Claim(
        "C-31",
        "Streaming significantly lowers training errors (Figure A1).",
        _c31,
        tuple(f"{name}-{form}" for name in REFS for form in "BS"),
    ),
    Claim("C-60", "In neuron-wise streaming a neuron keeps nothing of any other (8).", _c60),
    Claim("C-64", "Every reference can be streamed (1, 3.3.3).", _c64, tuple(f"{name}-S" for name in REFS)),
]
FIGURES = {
    "Figure 6": (*(f"{name}-B" for name in REFS), OURS),
    "Figure 7": (*(f"C {name}-B" for name in REFS), f"C {OURS}"),
    "Figure A1": tuple(f"{name}-{form}" for name in REFS for form in "BS"),
}
"""The names of each figure's runs."""
