"""The runs of the study ``references``: every reference without a stream and with one, in B and in the loops of C."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamnorm.definition.ref import REFS
from streamnorm.definition.stats import Lp
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.nn.norm import Norm
from streamnorm.stream.policy import Streaming

SAMPLE = ("SP1", "SP2", "SP3", "SP4", "SP5")
BATCH = ("BA1", "BA2", "BA3", "BA4", "BA5", "BA6")
OURS = "BA1-S"
"""Streaming normalization as Figures 6 and 7 show it."""
PLAIN = {"BA1": "batch", "SP2": "layer"}
"""The arms by which other studies know a reference in its batch or sample form."""


@dataclass(frozen=True)
class Tier:
    """The size of a study: what it changes in the runs of B and of C(5, 1)."""

    B: dict[str, Any]
    C: dict[str, Any]


_DIGITS = {"data": "digits", "width": 4, "epochs": 1, "train_limit": 128, "test_limit": 64}
_CIFAR = {"data": "cifar10", "width": 16, "epochs": 4, "train_limit": 2000, "test_limit": 1000}
TIERS = {
    "smoke": Tier(B=_DIGITS, C={**_DIGITS, "loops": (2, 1)}),
    "reduced": Tier(B=_CIFAR, C={**_CIFAR, "loops": (5, 1), "epochs": 3}),
    "full": Tier(
        B={"data": "cifar10", "width": 32, "epochs": 30},
        C={"data": "cifar10", "width": 32, "epochs": 30, "loops": (5, 1)},
    ),
}


def _shared(architecture: str, size: dict[str, Any]) -> Run:
    shared = Run(architecture=architecture, samples_per_batch=32, batches_per_update=1, center="batch")  # type: ignore[arg-type]
    return replace(shared, **size)


def plain(tier: Tier) -> dict[str, Run]:
    """Figure 6 and the -B of Figure A1: B with the statistics of a sample or of a mini-batch."""
    shared = replace(_shared("B", tier.B), center=None)
    return {f"{name}-B": replace(shared, arm=PLAIN.get(name, f"{name}-B")) for name in REFS}


def streamed(tier: Tier) -> dict[str, Run]:
    """The -S of Figure A1: B with every reference streamed, by the values of Figure 6 (L2, Setting A)."""
    shared = replace(_shared("B", tier.B), alpha=(0.5, 0.5), beta=(0.5, 0.5, 0.0))
    return {f"{name}-S": replace(shared, arm="streaming" if name == "BA1" else f"{name}-S") for name in REFS}


def looped(tier: Tier) -> dict[str, Run]:
    """Figure 7: C(5, 1). Statistics of a mini-batch are tested with a running estimate of each time step (4.2)."""
    shared = _shared("C", tier.C)
    own = replace(shared, center=None)
    named = {f"C {name}-B": replace(own, arm=PLAIN.get(name, f"{name}-B")) for name in SAMPLE}
    named |= {f"C {name}-B": replace(own, arm="tsbn" if name == "BA1" else f"{name}-T") for name in BATCH}
    return {**named, f"C {OURS}": replace(shared, arm="streaming", alpha=(0.5, 0.5), beta=(0.5, 0.5, 0.0))}


def runs(tier: Tier) -> dict[str, Run]:
    """Every run of the study by name."""
    return {**plain(tier), **streamed(tier), **looped(tier)}


def locality(name: str, updates: int = 3) -> bool:
    """Whether anything that one neuron keeps or hands on moves when all other neurons' activations and gradients do:
    its H1, H2, output and gradient, in float64, over several weight updates; ``name`` is a reference of the own
    feature."""
    one, other = (_seen(name, updates, others) for others in (0, 1))
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _seen(name: str, updates: int, others: int) -> list[Tensor]:
    """What the neuron of feature 1 at the place (1, 2) keeps and hands on, with the others drawn from a seed."""
    layer = Norm(3, REFS[name], Lp(2, "estimate"), Streaming(beta=(0.5, 0.2, 0.3))).double()
    seen: list[Tensor] = []
    for update in range(updates):
        own = torch.Generator().manual_seed(update)
        rest = torch.Generator().manual_seed(1000 + 100 * others + update)
        x, dy = (torch.randn(4, 3, 4, 4, generator=rest, dtype=torch.float64) for _ in range(2))
        for of in (x, dy):
            of[:, 1, 1, 2] = torch.randn(4, generator=own, dtype=torch.float64)
        y = layer(x.requires_grad_())
        y.backward(dy)
        layer.fold()
        assert x.grad is not None
        seen += [y.detach()[:, 1, 1, 2], x.grad[:, 1, 1, 2]]
        for H in (layer.H1, layer.H2):
            assert H is not None
            seen += [of[..., 1, 1, 2] if of.ndim >= 3 else of[..., 1] for of in H.state().values() if of.ndim]
    return seen
