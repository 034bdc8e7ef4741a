"""What the paper says about normalizing convolutions, checked on the records of ``convolutional``."""

from __future__ import annotations

from streamnorm.lab.studies.convolutional.runs import RUNS
from streamnorm.lab.studies.study import Claim, Records, Verdict, final, judge, spread


def _c10(records: Records) -> tuple[Verdict, str]:
    a, b = final(records, "streaming Figure 6, 32 x 1"), final(records, "streaming Figure 6 in Setting B, 32 x 1")
    gap = [abs(x - y) for x, y in zip(a, b, strict=True)]
    difference = abs(sum(x - y for x, y in zip(a, b, strict=True)) / len(a))
    return ("reproduced" if difference <= 0.01 else "contradicted"), f"A {spread(a)}, B {spread(b)}, gaps {spread(gap)}"


def _c18(records: Records) -> tuple[Verdict, str]:
    layer = final(records, "layer 32 x 1")
    gaps = {n: [x - y for x, y in zip(layer, final(records, n), strict=True)] for n in list(RUNS)[:3:2]}
    verdicts = {judge(gap, 0.02) for gap in gaps.values()}
    learns = all(error < 0.8 for error in layer)
    verdict: Verdict = "reproduced" if verdicts == {"reproduced"} and learns else "partly" if learns else "contradicted"
    return verdict, f"layer {spread(layer)}; behind " + ", ".join(f"{n} by {spread(g)}" for n, g in gaps.items())


CLAIMS = [
    Claim("C-10", "With enough samples in a mini-batch Settings A and B perform alike (section 3.4).", _c10),
    Claim("C-18", "LN does not fail on convolutions and is clearly worse than the best (Table 1).", _c18),
]
