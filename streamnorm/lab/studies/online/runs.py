"""The runs of the study ``online``, one of them in Setting A with one sample a batch, which our layers refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamnorm.definition.ref import NormRef
from streamnorm.definition.stats import Lp
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.study import Record
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
