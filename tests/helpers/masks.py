"""References as matrices, which share no idea with the oracle's loops: what the tests of the oracle stand on.

A reference is a matrix (statistics x activations), built as a Kronecker product of a feature part and a place part.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

REFS = {
    "SP1": ("own", "all", "one"),
    "SP2": ("all", "all", "one"),
    "SP3": ("all", "local", "one"),
    "SP4": ("own", "local", "one"),
    "SP5": ("all", "here", "one"),
    "BA1": ("own", "all", "batch"),
    "BA2": ("all", "all", "batch"),
    "BA3": ("all", "local", "batch"),
    "BA4": ("own", "local", "batch"),
    "BA5": ("all", "here", "batch"),
    "BA6": ("own", "here", "batch"),
}
CENTERS = ("batch", "estimate", "zero")
EPS = 1e-5
SHAPE = (3, 2, 3, 4)


def ref(name: str) -> dict:
    return dict(zip(("features", "place", "samples"), REFS[name], strict=True))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


def close(a: Tensor, b: Tensor) -> None:
    # Sums of under 10^3 numbers of order 1 in two different orders: a few hundred roundings of 1e-16.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Masks:
    """A reference: the matrix ``R`` (statistics, activations of a sample) and the statistic that ``serves`` each."""

    def __init__(self, features: str | int, place: str, samples: str, shape: tuple[int, ...], window: int) -> None:
        _, c, *lengths = shape
        groups = {"own": c, "all": 1}.get(features, features)
        feature = torch.eye(groups, dtype=torch.float64).repeat_interleave(c // groups, 1)
        where = torch.tensor(list(itertools.product(*map(range, lengths))), dtype=torch.float64)
        far = torch.zeros(max(1, len(where)), max(1, len(where)))
        if lengths:
            far = (where[:, None] - where[None]).abs().amax(2)
        within = {"all": torch.ones_like(far[:1]), "local": far <= window // 2, "here": far == 0}[place]
        served = torch.ones_like(far[:1]) if place == "all" else far == 0
        self.R = torch.kron(feature, within.double())
        self.serves = torch.kron(feature, served.double()).argmax(0)
        self.joint = samples == "batch"
        self.shape_of_s = (groups, *(() if place == "all" else lengths))
        self.shape = shape

    def blocks(self, x: Tensor) -> Tensor:
        """(blocks, samples of a block, activations of a sample)."""
        flat = x.reshape(self.shape[0], -1)
        return flat[None] if self.joint else flat[:, None]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (blocks, samples, statistics or 1, activations) over each reference."""
        return (values * self.R).sum((1, 3)) / (self.R.sum(1) * values.shape[1])

    def S(self, x: Tensor, p: float, center: str, mu_hat: Tensor | None = None, eps: float = EPS) -> Tensor:
        """s (blocks, 2, statistics)."""
        values = self.blocks(x)[:, :, None]
        mu = self.mean(values)
        c = {"batch": mu, "zero": torch.zeros_like(mu), "estimate": mu_hat}[center]
        assert c is not None
        d = values - c.expand_as(mu)[:, None, :, None]
        return torch.stack((mu, (self.mean(d.abs() ** p) + eps ** (p / 2)) ** (1 / p)), 1)

    def N(self, x: Tensor, s: Tensor, subtract_mean: bool = True) -> Tensor:
        mu, sigma = s[:, :, self.serves].unbind(1)
        return ((self.blocks(x) - mu[:, None] * subtract_mean) / sigma[:, None]).reshape(self.shape)
