"""Online learning and tiny mini-batches on a fully connected network (paper, section 7.3, Figures 4 and 5).

    streamnorm reproduce online --data-root DATA --out runs/online

CIFAR-10, architecture A (3 layers of 256), 64 samples an update unless a name says otherwise, 4 epochs in the place of
the paper's 30 (``--tier full``). The paper's Figure 5 uses L1 and Setting B with alpha = beta = (.7, .3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.study import (
    CHANCE,
    Claim,
    Record,
    Records,
    Verdict,
    below,
    carry_out,
    final,
    judge,
    mean,
    spread,
)
from streamnorm.nn.norm import norms

BASE = Run(data="cifar10", architecture="A", width=256, epochs=4)
TIERS: dict[str, dict[str, Any]] = {
    "smoke": {"data": "digits", "width": 8, "epochs": 1, "train_limit": 256, "test_limit": 64},
    "reduced": {},
    "full": {"epochs": 30},
}
"""What the sizes of the study change in every run."""


def _run(arm: str, m: int, n: int, p: float = 2, center: str | None = None) -> Run:
    return replace(BASE, arm=arm, samples_per_batch=m, batches_per_update=n, p=p, center=center)  # type: ignore[arg-type]


RUNS: dict[str, Run] = {
    "batch 64 x 1": _run("batch", 64, 1),
    "batch 4 x 16": _run("batch", 4, 16),
    "batch 2 x 32": _run("batch", 2, 32),
    "batch 1 x 64": _run("batch", 1, 64),
    "layer 64 x 1": _run("layer", 64, 1),
    "layer 1 x 64": _run("layer", 1, 64),
    "none 64 x 1": _run("none", 64, 1),
    "streaming 1 x 64": _run("streaming", 1, 64),
    "streaming 2 x 32": _run("streaming", 2, 32),
    "streaming L1 1 x 64": _run("streaming", 1, 64, p=1),
    "streaming L1 2 x 32": _run("streaming", 2, 32, p=1),
    "streaming L1 about 0, 1 x 64": _run("streaming", 1, 64, p=1, center="zero"),
    "batch 4 x 1": _run("batch", 4, 1),
    "batch 2 x 1": _run("batch", 2, 1),
}
DEGENERATE = "streaming about its own mean, 1 x 64"


@dataclass(frozen=True)
class Unchecked(Lp):
    """Lp without the refusal of a reference that holds one activation, to see what Setting A does there (C-09)."""

    def check_size(self, ref: NormRef, count: int) -> None:
        pass


def degenerate(run: Run, data: Data, seeds: Sequence[int], epochs: int = 1) -> list[Record]:
    """A run with one sample a batch in Setting A, which the layers refuse there, trained all the same."""
    records = []
    for seed in seeds:
        trainer = Trainer(replace(run, center="batch", warmup=0, seed=seed, epochs=epochs), data)
        for norm in norms(trainer.model):
            norm.definition = replace(norm.definition, moment=Unchecked(2, "batch"))
        while not trainer.finished:
            trainer.step()
        records.append({**trainer.record(), "label": DEGENERATE})
    return records


def own_sigma_of_one_sample(x: Tensor) -> float:
    """The largest sigma of Setting A over a mini-batch of one, eps left out."""
    view = NormRef("own", "all", "batch").view(x[:1].flatten(1))
    moment = Lp(2, "batch", eps=0)
    mu = moment.mean(view, NormRef("own", "all", "batch"))
    return moment.sigma(view, NormRef("own", "all", "batch"), mu, None).max().item()


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


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the report."""
    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.studies.record import write_results

    size, out = begin(arguments, "online", TIERS)
    runs = {name: replace(run, **size) for name, run in RUNS.items()}
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out(runs, arguments.seeds_or(), data, out)
    records[DEGENERATE] = degenerate(runs["streaming 1 x 64"], data, arguments.seeds_or())
    note = f"sigma of Setting A for one sample, without eps: {own_sigma_of_one_sample(data.train_x)}"
    title = f"Online learning: {data.name}, architecture A, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title, note)
