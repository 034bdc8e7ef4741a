"""Every case that a law is tested over, listed once: references x moments x policies x shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import streamnorm as sn
from streamnorm import Batch, Evidence, Lp, Norm, NormRef, Policy, Sample, Streaming
from streamnorm.definition.ref import REFS
from streamnorm.oracle import Oracle

ALL_REFS = {
    **{n: r.with_window(3) for n, r in REFS.items()},
    "groups": NormRef(2, "all", "one"),
    "groups-B": NormRef(3, "all", "batch"),
}
MOMENTS = [Lp(p, center) for p in (1, 2, 3, 1.5) for center in ("batch", "estimate", "zero")]
MIXED = Streaming(alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1))
SHORT = Evidence(memory=11)
"""Of the mini-batches that a test gives, the first few are remembered in full and the later ones are not."""
SHAPES = {"fc": (4, 6), "1d": (3, 6, 5), "2d": (3, 6, 3, 4), "3d": (2, 6, 3, 2, 3)}
"""A window of 3 has places inside and at the border of a map, and the axes of each are told apart by their lengths."""


@dataclass(frozen=True)
class Case:
    """One layer; its name is the test's id."""

    ref: str
    moment: Lp
    policy: Policy
    shape: str = "2d"

    def __str__(self) -> str:
        setting = {"batch": "A", "estimate": "B", "zero": "C"}[self.moment.center]
        return f"{self.ref}-{setting}{self.moment.p:g}-{type(self.policy).__name__}-{self.shape}"

    @property
    def norm_ref(self) -> NormRef:
        return ALL_REFS[self.ref]

    def layer(self) -> Norm:
        return Norm(6, self.norm_ref, self.moment, self.policy).double()

    def oracle(self) -> Oracle:
        ref, policy = self.norm_ref, self.policy
        rules = {"memory": policy.memory} if isinstance(policy, Evidence) else {}
        if isinstance(policy, Streaming):
            rules = {"alpha": policy.alpha, "beta": policy.beta, "kappa": policy.kappa}
        return Oracle(
            features=ref.features,
            place=ref.place,
            samples=ref.samples,
            window=ref.window,
            p=self.moment.p,
            center=self.moment.center,
            eps=self.moment.eps,
            policy=type(policy).__name__.lower(),
            **rules,
        )

    def input(self, seed: int) -> Tensor:
        return draw(SHAPES[self.shape], seed)

    def is_degenerate(self) -> bool:
        view = self.norm_ref.view(torch.empty(SHAPES[self.shape]))
        return self.moment.center == "batch" and self.norm_ref.size(view.shape) == 1


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """A skewed sample with an offset and scale of its own in every feature: nothing cancels by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    c = torch.arange(shape[1], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    return (x + 0.4 * x**2) * (0.5 + 0.3 * c) + 0.7 * c - 1


def policies_for(ref: NormRef, moment: Lp) -> list[Policy]:
    """The policies that a reference and a moment can stand with."""
    own: list[Policy] = [Sample()] if ref.samples == "one" else [Batch()]
    if moment.center == "estimate" and ref.samples == "one":
        own = []
    return [*own, MIXED, SHORT]


def cases() -> Iterator[Case]:
    """Every layer that can stand, with p = 1, 2, and one of the others in turns; each in one rank, in turns."""
    for r, ref in enumerate(ALL_REFS):
        for m, moment in enumerate(MOMENTS):
            for k, policy in enumerate(policies_for(ALL_REFS[ref], moment)):
                if moment.p in (3, 1.5) and (moment.p == 3) != ((r // 2 + k) % 2):
                    continue
                ranks = [*SHAPES, "2d"][(r + m + k) % len(SHAPES) :]
                yield next(case for rank in ranks if not (case := Case(ref, moment, policy, rank)).is_degenerate())


CASES = [*cases()]
"""Any two of reference, setting, p, policy and rank meet; every reference has each setting with each p and policy."""


# Layers as people write them

LAYERS = {
    "streaming": lambda c: sn.StreamingNorm(c),
    "batch": lambda c: sn.BatchNorm(c),
    "sample": lambda c: sn.SampleNorm(c),
    "place-wise": lambda c: sn.StreamingNorm(c, sn.BA6),
}


def trained(layer: Norm, *shape: int) -> Norm:
    layer(draw(shape, 0).float())
    layer.fold()
    return layer
