"""Perceptrons trained online beside twins in an ordinary loop: what the tests of online steps stand on.

The ordinary loop runs on the generic backend, so that nothing compiled is compared with itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import rounding
from torch import Tensor, nn

from streamnorm import Lp, Norm, OnlineTrainer, Streaming, StreamingNorm, Warmup
from streamnorm.definition.ref import BA1, SP1
from streamnorm.ops import backends, library

STEPS = 30
WIDTHS = (19, 37, 5, 3)
"""No width is a multiple of a vector's, some are less than one."""

MIXED = {"alpha": (0.6, 0.4), "beta": (0.5, 0.2, 0.3), "kappa": (0.8, 0.2, 0.9, 0.1)}
LAGGED = {"alpha": (1.0, 0.0), "beta": (1.0, 0.0, 0.0), "kappa": (0.5, 0.5, 0.6, 0.4)}
OWN = {"alpha": (0.0, 1.0), "beta": (0.0, 0.0, 1.0), "kappa": (0.5, 0.5, 0.5, 0.5)}

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    **{
        f"p{p}-{center}": lambda c, p=p, center=center: StreamingNorm(c, p=p, center=center)
        for p in (1, 2)
        for center in ("estimate", "zero")
    },
    "mixed": lambda c: StreamingNorm(c, **MIXED),
    "mixed-p1": lambda c: StreamingNorm(c, p=1, center="zero", **MIXED),
    "lagged": lambda c: StreamingNorm(c, center="zero", **LAGGED),
    "own": lambda c: StreamingNorm(c, center="zero", eps=0.5, **OWN),
    "one-sample": lambda c: StreamingNorm(c, SP1),
    "bare": lambda c: Norm(c, BA1, Lp(2, "zero"), Streaming()),
    "layer": nn.LayerNorm,
    "none": None,
}
RATES = {
    "plain": {"lr": 0.02},
    "decay": {"lr": 0.02, "weight_decay": 0.1},
    "momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.2},
    "nesterov": {"lr": 0.01, "momentum": 0.8, "nesterov": True},
    "adam": {"kind": torch.optim.Adam, "lr": 0.01, "weight_decay": 0.1, "betas": (0.4, 0.9), "eps": 1e-2},
    "adamw": {"kind": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1, "eps": 1e-2},
}
"""An eps this large keeps the rounding of small gradients small."""

compiled = pytest.mark.skipif(library.library() is None, reason="there are no compiled kernels")


def mlp(norm: Callable[[int], nn.Module] | None, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    modules: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(pairwise(widths[:-1])):
        modules += [nn.Linear(inputs, outputs, bias=k > 0), *([norm(outputs)] if norm else []), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(*widths[-2:]))


def optimizer_of(model: nn.Module, rates: dict[str, Any]) -> Any:
    options = dict(rates)
    return options.pop("kind", torch.optim.SGD)(model.parameters(), **options)


def online(
    model: nn.Sequential, rates: dict[str, Any], loss: Any = F.cross_entropy, warmup: Any = "auto"
) -> OnlineTrainer:
    return OnlineTrainer(model, optimizer_of(model, rates), loss, warmup)


def samples(n: int = STEPS, widths: tuple[int, ...] = WIDTHS, loss: Any = F.cross_entropy) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, widths[0], dtype=torch.float64) + 0.3
    y = torch.randint(widths[-1], (n,)) if loss is F.cross_entropy else torch.randn(n, widths[-1], dtype=torch.float64)
    return x, y


class Pair:
    """One model trained by an ``OnlineTrainer`` and its twin trained by an ordinary loop."""

    def __init__(self, model: nn.Sequential, rates: dict[str, Any], loss: Any = F.cross_entropy, warmup: Any = "auto"):
        self.twin = copy.deepcopy(model)
        self.loss = loss
        self.trainer = online(model, rates, loss, warmup)
        self.optimizer = optimizer_of(self.twin, rates)
        self.warmup = Warmup(self.twin, self.optimizer, warmup)

    def ordinary(self, x: Tensor, y: Tensor, bad: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        results = []
        with backends.using("generic"):
            for i, (one, target) in enumerate(zip(x.split(1), y.split(1), strict=True)):
                if i in bad:
                    results.append((x.new_tensor(nan), x.new_full((self.twin[-1].out_features,), nan)))
                    continue
                output = self.twin(one)
                loss = self.loss(output, target)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                results.append((loss.detach(), output.detach()[0]))
        losses, outputs = map(torch.stack, zip(*results, strict=True))
        return losses, outputs

    def compare(self, x: Tensor, y: Tensor, terms: int, bad: Sequence[int] = ()) -> None:
        """Train both on the samples, the twin without the bad ones, and hold everything that they have against one
        another."""
        skipped = self.trainer.skipped
        losses, outputs = self.trainer.steps(x, y)
        self.same(x, y, losses, outputs, terms, bad)
        assert self.trainer.skipped - skipped == len(bad)

    def same(self, x: Tensor, y: Tensor, losses: Tensor, outputs: Tensor, terms: int, bad: Sequence[int] = ()) -> None:
        want_losses, want_outputs = self.ordinary(x, y, bad)
        close("losses", losses, want_losses, terms)
        close("outputs", outputs, want_outputs, terms)
        for name, value in self.twin.state_dict().items():
            close(name, self.trainer.model.state_dict()[name], value, terms)
        assert self.trainer.warmup.state_dict() == self.warmup.state_dict()
        got, want = self.trainer.optimizer.state_dict()["state"], self.optimizer.state_dict()["state"]
        assert got.keys() == want.keys()
        for key, state in want.items():
            assert state.keys() == got[key].keys()
            for name, value in state.items():
                if value is not None:
                    close(name, got[key][name], value, terms)
                    assert got[key][name].dtype is value.dtype, name


def close(name: str, got: Tensor, want: Tensor, terms: int) -> None:
    """Equal up to rounding, what is not finite in the same places."""
    assert got.shape == want.shape, name
    if not got.is_floating_point():
        assert torch.equal(got, want), name
        return
    finite = want.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(got.isnan(), want.isnan())
    assert same, f"{name}: not finite at other places"
    if finite.any():
        bound = rounding(want.dtype, terms, max(want[finite].abs().max().item(), 1.0))
        worst = (got[finite].double() - want[finite].double()).abs().max().item()
        assert worst <= bound, f"{name}: off by {worst:.2e}, rounding allows {bound:.2e}"


TERMS = STEPS * max(WIDTHS)
"""Sums over a layer's inputs, once more at each step."""
