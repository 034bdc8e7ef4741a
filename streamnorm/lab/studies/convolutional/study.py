"""Normalizations of a feed-forward convolutional network (paper, section 7.4: the arms of Figure 6 without windows).

    streamnorm reproduce convolutional --data-root DATA --out runs/convolutional

The first 10,000 images of CIFAR-10, architecture B with 16, then 32 features, 32 samples an update, 5 epochs.
"Figure 6" is streaming with the paper's values there: L2, Setting A, alpha = beta = (.5, .5).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.architecture_b import BASE, TIERS
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.study import Claim, Records, Verdict, carry_out, final, judge, spread

FIGURE_6 = replace(
    BASE, arm="streaming", samples_per_batch=32, batches_per_update=1, alpha=(0.5, 0.5), beta=(0.5, 0.5, 0.0)
)

RUNS: dict[str, Run] = {
    "batch 32 x 1": replace(BASE, arm="batch", samples_per_batch=32, batches_per_update=1),
    "layer 32 x 1": replace(BASE, arm="layer", samples_per_batch=32, batches_per_update=1),
    "streaming Figure 6, 32 x 1": replace(FIGURE_6, center="batch"),
    "streaming 1 x 32": replace(BASE, arm="streaming", samples_per_batch=1, batches_per_update=32),
    "streaming Figure 6 in Setting B, 32 x 1": replace(FIGURE_6, center="estimate"),
    "none 32 x 1": replace(BASE, arm="none", samples_per_batch=32, batches_per_update=1),
}


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


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the report."""
    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.studies.record import write_results

    size, out = begin(arguments, "convolutional", TIERS)
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out({name: replace(run, **size) for name, run in RUNS.items()}, arguments.seeds_or(), data, out)
    title = f"Convolutional network: {data.name}, architecture B, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title)
