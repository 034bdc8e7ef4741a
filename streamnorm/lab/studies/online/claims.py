"""What the paper says about online learning and tiny mini-batches, checked on the records of ``online``."""

from __future__ import annotations

import math

from streamnorm.lab.studies.online.runs import DEGENERATE
from streamnorm.lab.studies.study import CHANCE, Claim, Records, Verdict, below, final, judge, mean, spread


def _c09(records: Records) -> tuple[Verdict, str]:
    own = final(records, DEGENERATE)
    learned = {n: final(records, n) for n in ("streaming 1 x 64", "streaming L1 about 0, 1 x 64")}
    chance = all(error != error or error > CHANCE - 0.02 for error in own)
    learns = all(error < 0.6 for errors in learned.values() for error in errors)
    figures = f"test error A {spread(own)}, B {spread(learned['streaming 1 x 64'])}, C (p = 1) " + spread(
        learned["streaming L1 about 0, 1 x 64"]
    )
    return ("reproduced" if chance and learns else "partly" if learns else "contradicted"), figures


def _c11(records: Records) -> tuple[Verdict, str]:
    large = final(records, "batch 64 x 1")
    verdicts, figures = [], [f"64 x 1: {spread(large)}"]
    for m, n in ((2, 32), (4, 16)):
        plain, dau = final(records, f"batch {m} x 1"), final(records, f"batch {m} x {n}")
        gain = below(dau, plain)
        left = [b - c for b, c in zip(dau, large, strict=True)]
        verdicts.append("reproduced" if judge(gain, 0.05) == judge(left, 0.01) == "reproduced" else judge(gain, 0.05))
        figures.append(f"{m} x 1: {spread(plain)}, {m} x {n}: {spread(dau)}")
    verdict: Verdict = "reproduced" if set(verdicts) == {"reproduced"} else "partly"
    return ("contradicted" if set(verdicts) == {"contradicted"} else verdict), "; ".join(figures)


def _c12(records: Records) -> tuple[Verdict, str]:
    layer, layer_loss = final(records, "layer 64 x 1"), final(records, "layer 64 x 1", "train_loss")
    figures, passed = [f"layer: error {spread(layer)}, train loss {spread(layer_loss)}"], []
    for name in ("streaming L1 1 x 64", "streaming L1 2 x 32"):
        error, loss = final(records, name), final(records, name, "train_loss")
        passed += [mean(error) <= mean(layer), mean(loss) < mean(layer_loss)]
        figures.append(f"{name}: error {spread(error)}, train loss {spread(loss)}")
    verdict: Verdict = "reproduced" if all(passed) else "partly" if any(passed) else "contradicted"
    return verdict, "; ".join(figures)


def _c13(records: Records) -> tuple[Verdict, str]:
    pairs = list(zip(final(records, "layer 64 x 1"), final(records, "layer 1 x 64"), strict=True))
    worst = max((abs(a - b) for a, b in pairs), key=lambda gap: (math.isnan(gap), gap))
    return ("reproduced" if worst < 0.01 else "contradicted"), f"largest difference in test error {worst:.4f}"


def _c14(records: Records) -> tuple[Verdict, str]:
    refused = all(r["failed"] for r in records["batch 1 x 64"])
    gap = below(final(records, "streaming 2 x 32"), final(records, "batch 2 x 32"))
    verdict = judge(gap, 0.03)
    figures = f"1 x 64 {'refused' if refused else 'ran'}; batch minus streaming at 2 x 32: {spread(gap)}"
    return (verdict if refused else "contradicted"), figures


CLAIMS = [
    Claim("C-09", "Setting A degenerates with one sample in the reference; B and C learn (section 3.4).", _c09),
    Claim("C-11", "Accumulating n batches mends most of what small batches break in BN, not all (Figure 4).", _c11),
    Claim("C-12", "Streaming (L1, B) works at 1 and 2 S/B and outperforms LN (Figure 5).", _c12),
    Claim("C-13", "The number of samples per batch does not matter to LN (Figure 5).", _c13),
    Claim("C-14", "BN is suboptimal at small batches and fails online (Table 1).", _c14),
]
