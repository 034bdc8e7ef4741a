"""A network that learns one sample at a time and grows, with inputs that appear later and with outputs.

What the estimators for river and scikit-learn have in common. Imports what steps, and what scales numbers.

Legend: ``n`` samples, ``d`` inputs, ``k`` outputs: the classes, or 1 for a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from streamnorm.checks import expect_choice, expect_finite, expect_whole
from streamnorm.nn.layers import StreamingNorm
from streamnorm.train.scaling import Standardizer
from streamnorm.train.stepping import Stepper, stepper

FARTHEST = 10.0
"""Standard deviations from its mean at which a number to be learned is taken to be, if it is farther."""
MOST = torch.finfo(torch.float32).max
"""The largest number to be learned, up to its sign: a larger one is infinite for the network."""
AT_ONCE = 1000
"""Samples in one call of compiled code, which cannot be interrupted."""
OPTIMIZERS = {"sgd": (SGD, 0.01), "adam": (Adam, 0.001)}
"""By name, each with the rate that it has if none is given."""

MakeModule = Callable[[int, int], nn.Module]
MakeOptimizer = Callable[[Any], Optimizer]


def perceptron(inputs: int, outputs: int, width: int = 64, depth: int = 2) -> nn.Sequential:
    """``depth`` times [linear without bias, StreamingNorm, ReLU], then a linear read-out that is 0 at first.

    A read-out of zeros treats all classes alike: in whichever order they come, the same is learned of them.

    >>> perceptron(3, 2)(torch.randn(1, 3))
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(before, after, bias=False), StreamingNorm(after), nn.ReLU()]
    readout = nn.Linear(width, outputs)
    with torch.no_grad():
        readout.weight.zero_()
        readout.bias.zero_()
    return nn.Sequential(*layers, readout)


class Learner:
    """A network with its optimizer, that learns classes or a number.

    A number is standardized with the mean and sd of all that were learned, and taken to be at most ``FARTHEST`` of
    them away. A sample that is not finite changes nothing.

    Args:
        inputs, outputs: d and k, so far.
        by_class: whether classes are learned, of which k are known; else a number.
        module: makes the network ``(n, d) -> (n, k)`` from d and k; None: a ``perceptron`` of ``width`` and ``depth``.
        optimizer: ``"adam"``, ``"sgd"``, or a function that makes one from parameters.
        lr: of an optimizer by name; None: 0.001 for adam, 0.01 for sgd.
        seed: of the initial weights; None: torch's generator draws them.

    Attributes:
        model, optimizer: of the network.
        learned, skipped: number of samples.

    Raises:
        ValueError, TypeError: for other arguments.

    >>> learner = Learner(2, 1, by_class=True, width=8, seed=0)
    >>> learner.learn(torch.randn(5, 2), [0] * 5)
    >>> learner.grow(3, 2)  # an input and a class more
    >>> learner.learn(torch.randn(5, 3), [0, 1, 1, 0, 1])
    >>> learner.learned, learner.outputs(torch.randn(4, 3)).shape
    (10, torch.Size([4, 2]))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        by_class: bool,
        module: MakeModule | None = None,
        width: int = 64,
        depth: int = 2,
        optimizer: str | MakeOptimizer = "adam",
        lr: float | None = None,
        seed: int | None = None,
    ) -> None:
        expect_whole("width", width)
        expect_whole("depth", depth)
        if not callable(optimizer):
            expect_choice("optimizer", optimizer, OPTIMIZERS)
        if lr is not None:
            expect_finite("lr", lr)
        with _seeded(seed):
            self.model = perceptron(inputs, outputs, width, depth) if module is None else module(inputs, outputs)
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"module makes a torch.nn.Module from d and k, got {type(self.model).__name__}")
        parameters = self.model.parameters()
        if callable(optimizer):
            if lr is not None:
                raise ValueError(f"lr is for an optimizer by name; give it to {optimizer!r} instead of {lr!r}")
            self.optimizer = optimizer(parameters)
        else:
            kind, rate = OPTIMIZERS[optimizer]
            self.optimizer = kind(parameters, lr=rate if lr is None else lr)
        self.by_class = by_class
        self.numbers = Standardizer(1)
        self.d, self.k = inputs, outputs
        self.learned = self.skipped = 0
        self._stepper: Stepper | None = None

    def grow(self, inputs: int, outputs: int) -> None:
        """More inputs and outputs. Their weights are 0, so that what the network says stays as it is; the optimizer
        keeps what it remembers.

        Raises:
            ValueError: if the network does not begin, or end, with a linear layer.
        """
        more_inputs, more_outputs = inputs - self.d, outputs - self.k
        layers = [(name, module) for name, module in self.model.named_modules() if _has_state(module)]
        first = _linear(layers[0], "begin", self.d) if more_inputs > 0 else None
        last = _linear(layers[-1], "end", self.k) if more_outputs > 0 else None
        if first is not None:
            grow(first, "weight", first.weight.new_zeros(first.out_features, more_inputs), 1, self.optimizer)
            first.in_features = self.d = inputs
        if last is not None:
            grow(last, "weight", last.weight.new_zeros(more_outputs, last.in_features), 0, self.optimizer)
            if last.bias is not None:
                grow(last, "bias", last.bias.new_zeros(more_outputs), 0, self.optimizer)
            last.out_features = self.k = outputs

    def learn(self, x: Tensor, targets: Sequence[float]) -> None:
        """Learn from the samples ``x (n, d)`` in their order, with an update for each.

        Raises:
            OverflowError: if weights are not finite any more.
        """
        if self.by_class:
            wanted = torch.tensor(targets, dtype=torch.int64)
        else:
            finite = x.isfinite().all(1).tolist()
            wanted = torch.tensor(
                [[self._standardized(y) if fine else y] for fine, y in zip(finite, targets, strict=True)]
            )
        if self._stepper is None:
            self._stepper = stepper(self.model, self.optimizer, F.cross_entropy if self.by_class else F.mse_loss)
        step, before = self._stepper, self._stepper.skipped
        try:
            if len(targets) == 1:
                step.steps(x, wanted)
            else:
                for start in range(0, len(targets), AT_ONCE):
                    step.steps(x[start : start + AT_ONCE], wanted[start : start + AT_ONCE])
        finally:
            skipped = step.skipped - before
            self.skipped += skipped
        self.learned += len(targets) - skipped

    def _standardized(self, y: float) -> float:
        if not abs(y) <= MOST:
            return math.nan
        self.numbers.see([y])
        return min(max(self.numbers.scaled([y])[0], -FARTHEST), FARTHEST)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """What the network says of the samples ``x (n, d)`` in eval mode, in float64: the logits ``(n, k)``, or numbers
        ``(n, 1)``. It changes nothing."""
        training = [module for module in self.model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            said = self.model(x).double()
        finally:
            for module in training:
                module.training = True
        return said if self.by_class else self.numbers.mean[0] + self.numbers.sd(0) * said

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stepper": None}


def grow(linear: nn.Linear, name: str, more: Tensor, dim: int, optimizer: Optimizer | None) -> None:
    """Put ``more`` behind a parameter of a linear layer, and 0 behind what the optimizer remembers of it."""
    old = linear.get_parameter(name)
    new = nn.Parameter(torch.cat([old.detach(), more], dim), old.requires_grad)
    setattr(linear, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    for key, held in optimizer.state.pop(old, {}).items():
        grows = isinstance(held, Tensor) and held.shape == old.shape
        optimizer.state[new][key] = torch.cat([held, torch.zeros_like(more)], dim) if grows else held


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _linear(named: tuple[str, nn.Module], what: str, size: int) -> nn.Linear:
    """The module that has to grow, or an error if it is not a linear layer of the right size."""
    name, module = named
    side = "inputs" if what == "begin" else "outputs"
    if isinstance(module, nn.Linear) and size == (module.in_features if what == "begin" else module.out_features):
        return module
    raise ValueError(
        f"the network {what}s with {name!r}, {module!r}, which cannot grow beyond {size} {side}: let it {what} with "
        "nn.Linear, or give all that there will be from the first sample on"
    )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch draws from this seed, and outside as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
