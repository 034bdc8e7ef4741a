"""The runs of the study ``moments``: orders p, and Settings A, B and C."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.language.run import TextRun

ORDERS = (1, 2, 3, 4, 5, 6, 7)
"""p of Figure 3."""
SETTINGS = {"A": "batch", "B": "estimate", "C": "zero"}
"""The paper's letters, and the center of each."""
PER_BATCH = (1, 2, 32)
UPDATE = 32
"""Samples of a weight update."""


@dataclass(frozen=True)
class Tier:
    """The size of a study: what it changes in the runs of each architecture, and in those of the language model."""

    A: dict[str, Any]
    B: dict[str, Any]
    C: dict[str, Any]
    rnn: dict[str, Any]


_DIGITS = {"data": "digits", "epochs": 1, "train_limit": 128, "test_limit": 64}
_CIFAR = {"data": "cifar10", "epochs": 4, "train_limit": 2000, "test_limit": 1000}
TIERS = {
    "smoke": Tier(
        A={**_DIGITS, "width": 8},
        B={**_DIGITS, "width": 4},
        C={**_DIGITS, "width": 4, "loops": (2, 2)},
        rnn={"data": "pydoc", "limit": 4000, "hidden": 8, "steps": (10,), "epochs": 1, "validate_every": 5},
    ),
    "reduced": Tier(
        A={**_CIFAR, "width": 256, "train_limit": 10_000, "epochs": 3},
        B={**_CIFAR, "width": 16},
        C={**_CIFAR, "width": 16, "epochs": 3},
        rnn={"data": "tinyshakespeare", "epochs": 1},
    ),
    "full": Tier(
        A={"data": "cifar10", "width": 256, "epochs": 30},
        B={"data": "cifar10", "width": 32, "epochs": 30},
        C={"data": "cifar10", "width": 32, "epochs": 30},
        rnn={"data": "shakespeare"},
    ),
}


def grid_name(architecture: str, setting: str, p: int, m: int) -> str:
    """What a run in one of the settings is called.

    >>> grid_name("B", "C", 1, 2)
    'B setting C L1, 2 x 16'
    """
    return f"{architecture} setting {setting} L{p}, {m} x {UPDATE // m}"


def figure_3(tier: Tier) -> dict[str, Run]:
    """Batch normalization with every order of the moment."""
    shared = Run(architecture="B", arm="batch", samples_per_batch=UPDATE, batches_per_update=1)
    return {f"L{p}": replace(shared, p=float(p), **tier.B) for p in ORDERS}


def first_and_second(tier: Tier) -> dict[str, Run | TextRun]:
    """L1 beside L2 where streaming normalizes: online in A, in the loops of C, in an RNN."""
    a = Run(architecture="A", samples_per_batch=1, batches_per_update=64)
    c = Run(architecture="C", beta=(0.7, 0.0, 0.3), samples_per_batch=UPDATE, batches_per_update=2)
    rnn = TextRun(arch="rnn")
    named: dict[str, Run | TextRun] = {}
    for p in (1.0, 2.0):
        named |= {
            f"A streaming L{p:g}, 1 x 64": replace(a, p=p, **tier.A),
            f"C streaming L{p:g}, 32 x 2": replace(c, p=p, **tier.C),
            f"RNN streaming L{p:g}, 32 x 2": replace(rnn, p=p, **tier.rnn),
        }
    return named


def settings(tier: Tier) -> dict[str, Run]:
    """Streaming in every setting with p = 1 and 2 and three sizes of a mini-batch."""
    named: dict[str, Run] = {}
    for architecture in ("A", "B"):
        for m in PER_BATCH:
            shared = Run(architecture=architecture, samples_per_batch=m, batches_per_update=UPDATE // m)  # type: ignore[arg-type]
            shared = replace(shared, **getattr(tier, architecture))
            for setting, center in SETTINGS.items():
                for p in (1, 2):
                    named[grid_name(architecture, setting, p, m)] = replace(shared, center=center, p=float(p))  # type: ignore[arg-type]
    return named


def runs(tier: Tier) -> dict[str, Run | TextRun]:
    """Every run of the study by name."""
    return {**figure_3(tier), **first_and_second(tier), **settings(tier)}
