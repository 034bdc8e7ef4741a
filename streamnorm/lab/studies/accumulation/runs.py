"""The runs of the study ``accumulation``: how many mini-batches a weight update takes together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.language.run import TextRun

PER_UPDATE = (1, 2, 4, 8)
"""n, B/U."""
SAMPLES = 8
"""m, S/B, the same for every n, so that n = 8 are the 64 samples of an update in the paper's Figures 9 to 12."""


@dataclass(frozen=True)
class Tier:
    """The size of a study: what it changes in the runs of C(5, 5) and of the RNN."""

    C: dict[str, Any]
    rnn: dict[str, Any]


TIERS = {
    "smoke": Tier(
        C={"data": "digits", "width": 4, "epochs": 1, "train_limit": 128, "test_limit": 64, "loops": (2, 2)},
        rnn={"data": "pydoc", "limit": 20_000, "hidden": 8, "steps": (10,), "epochs": 1, "validate_every": 40},
    ),
    "reduced": Tier(
        C={"data": "cifar10", "width": 16, "epochs": 3, "train_limit": 2000, "test_limit": 1000},
        rnn={"data": "tinyshakespeare", "epochs": 1, "validate_every": 80},
    ),
    "full": Tier(C={"data": "cifar10", "width": 32, "epochs": 30}, rnn={"data": "shakespeare", "validate_every": 80}),
}


def name_of(architecture: str, n: int) -> str:
    """What a run is called.

    >>> name_of("C", 2)
    'C 8 x 2'
    """
    return f"{architecture} {SAMPLES} x {n}"


def runs(tier: Tier) -> dict[str, Run | TextRun]:
    """Every run of the study by name: streaming as Figures 9 and 11 have it, but for the mini-batches."""
    c = replace(Run(architecture="C", beta=(0.7, 0.0, 0.3), samples_per_batch=SAMPLES), **tier.C)
    rnn = replace(TextRun(arch="rnn", samples_per_batch=SAMPLES), **tier.rnn)
    named: dict[str, Run | TextRun] = {}
    for n in PER_UPDATE:
        named[name_of("C", n)] = replace(c, batches_per_update=n)
        named[name_of("RNN", n)] = replace(rnn, batches_per_update=n)
    return named
