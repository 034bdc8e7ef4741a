"""The runs of the study ``unrolled``, and what is asked of trained networks with more loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import evaluate, reloop
from streamnorm.lab.runs.classifier.models import build
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.language.model import statistics_kept
from streamnorm.lab.studies.study import Record, reopened
from streamnorm.nn.timespecific import TimeSpecificNorm


@dataclass(frozen=True)
class Tier:
    """The size of a study: which data and how much of them, how large the networks and for how long.

    Attributes:
        width: of C; D, whose time step costs three times as much, has half of it.
        loops: k1, k2 and k.
    """

    data: str
    width: int
    loops: int
    epochs: int
    train_limit: int | None
    test_limit: int | None


TIERS = {
    "smoke": Tier("digits", 4, 2, 3, 128, 64),
    "reduced": Tier("cifar10", 16, 5, 4, 6_000, 1_000),  # at width 8 little is learned, and by tsbn alone
    "full": Tier("cifar10", 32, 5, 30, None, None),
}
BETAS = {
    "C streaming": (0.7, 0.0, 0.3),
    "C beta .7 .3 0": (0.7, 0.3, 0.0),
    "C beta 1 0 0": (1.0, 0.0, 0.0),
    "C beta 0 1 0": (0.0, 1.0, 0.0),
    "C beta 0 0 1": (0.0, 0.0, 1.0),
    "C beta 0 0 0": (0.0, 0.0, 0.0),
}
"""The choices of Figure 10."""
SLOWER = ("C streaming", "C beta 1 0 0", "C beta 0 0 0")
"""Those that are trained at a tenth of the learning rate as well: what comes an update late asks for smaller steps."""
FIGURES = {
    "Figure 8": ("D streaming", "D tsbn", "D streaming 64 x 1"),
    "Figure 9": ("C streaming", "C tsbn", "C batch", "C layer", "C streaming 64 x 1", "C streaming latest"),
    "Figure 10": tuple(BETAS),
    "Figure 10 at a tenth of the rate": tuple(f"{name}, rate .01" for name in SLOWER),
}
LONGER = ("C streaming", "C tsbn", "D streaming", "D tsbn")
"""What is tested with more loops than it was trained with."""


def runs(tier: Tier) -> dict[str, Run]:
    """Every run of the study by name."""
    shared = Run(
        data=tier.data,
        width=tier.width,
        epochs=tier.epochs,
        train_limit=tier.train_limit,
        test_limit=tier.test_limit,
        arm="streaming",
        beta=BETAS["C streaming"],
        samples_per_batch=32,
        batches_per_update=2,
    )
    c = replace(shared, architecture="C", loops=(tier.loops, tier.loops))
    d = replace(shared, architecture="D", loops=(tier.loops,), width=tier.width // 2)
    c64, d64 = (replace(run, samples_per_batch=64, batches_per_update=1) for run in (c, d))
    named = {
        "C streaming": c,
        "C tsbn": replace(c64, arm="tsbn"),
        "C batch": replace(c64, arm="batch"),
        "C layer": replace(c64, arm="layer"),
        "D streaming": d,
        "D tsbn": replace(d64, arm="tsbn"),
        **{name: replace(c, beta=beta) for name, beta in BETAS.items() if name != "C streaming"},
        "C streaming 64 x 1": c64,
        "C streaming latest": replace(c, backward_stats="latest"),
        "D streaming 64 x 1": d64,
    }
    slower = {
        f"{name}, rate .01": replace(named[name], learning_rate=named[name].learning_rate / 10) for name in SLOWER
    }
    return named | slower


def examine(records: Mapping[str, Sequence[Record]], data: Data, out: Path) -> None:
    """Add to the records of ``LONGER`` what is asked of their trained models: test loss by loops, up to twice as many
    as they were trained with, and how many numbers and sets of statistics their normalizations keep."""
    for name in LONGER:
        for record in (record for record in records[name] if not record["failed"]):
            trainer = reopened(record, data, out)
            run = trainer.run
            k = run.loops[0]
            along = [(k, record["metrics"][-1]["test_loss"])]
            for longer in range(k + 1, 2 * k + 1):
                model = reloop(trainer, (longer,) * len(run.loops))
                along.append((longer, evaluate(model, data.test_x, data.test_y)[0]))
            kept = {"statistics": statistics_kept(trainer.model), "sets": sets_kept(trainer.model)}
            record |= {"along": finite(along), **kept}


def sets_kept(model: nn.Module) -> int:
    """How many sets of statistics the layer has that has most: one, or one for each time step."""
    return max((len(module.times) for module in model.modules() if isinstance(module, TimeSpecificNorm)), default=1)


def mean_gradient(arm: str, batches: int, samples: int = 64) -> Tensor:
    """Of the weights of a small C(5, 5) in float64, over the same samples in so many mini-batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (samples,), generator=generator)
    model = build(Run(architecture="C", arm=arm, width=4), x[0], 10).double()
    for part, target in zip(x.chunk(batches), y.chunk(batches), strict=True):
        (F.cross_entropy(model(part), target) / batches).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
