"""Cases of networks: training on one sample at a time, cycles of many small mini-batches, a convolutional network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.lab.bench.case import Case, Shared, Variant, WrongError
from streamnorm.lab.bench.gate import check_layer, compare
from streamnorm.lab.bench.layers import OURS, LayerStep, Pair
from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.models import Convolutional, FullyConnected
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.monitoring.monitor import monitor
from streamnorm.nn.layers import BatchNorm, StreamingNorm
from streamnorm.train.dau import DAU
from streamnorm.train.online.trainer import OnlineTrainer

MakeNorm = Callable[[int], nn.Module]
MakeModel = Callable[[MakeNorm], nn.Module]
INPUTS, CLASSES = 3072, 10
RATE = 1e-3
UPDATES = 20
"""Weight updates whose samples differ, one after the other."""
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(torch.optim.SGD, lr=RATE),
    "SGD with momentum": partial(torch.optim.SGD, lr=RATE, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=RATE),
}
EVERY = 100
"""Weight updates from one record of a monitor to the next, its default."""


@dataclass
class Samples:
    """Inputs and their labels, both noise."""

    x: Tensor
    y: Tensor


def noise(n: int, *shape: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    return Samples(torch.randn(n, *shape, generator=generator), torch.randint(CLASSES, (n,), generator=generator))


class OnlineStep:
    """A whole step of training, on one sample or on ``size`` of them: forward, loss, backward, optimizer."""

    def __init__(self, model: nn.Module, samples: Samples, optimizer: str = "SGD", size: int = 1) -> None:
        self.model = model
        self.pairs = list(zip(samples.x.split(size), samples.y.split(size), strict=True))
        self.at = 0
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())

    def step(self) -> None:
        x, y = self.pairs[self.at]
        self.at = (self.at + 1) % len(self.pairs)
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class FusedStep(OnlineStep):
    """The same step, or ``count`` of them, in one call of compiled code."""

    def __init__(self, model: nn.Module, samples: Samples, count: int = 1, optimizer: str = "SGD") -> None:
        super().__init__(model, samples, optimizer)
        self.trainer = OnlineTrainer(model, self.optimizer)
        self.count = count
        self.samples = samples

    def step(self) -> None:
        if self.count > 1:
            self.trainer.steps(self.samples.x[: self.count], self.samples.y[: self.count])
        else:
            self.trainer.step(*self.pairs[self.at])
            self.at = (self.at + 1) % len(self.pairs)


def online(quick: bool) -> Iterator[Case]:
    """A perceptron 3072-256-256-10, one sample a step, beside layer normalization."""
    inputs, width = (64, 16) if quick else (INPUTS, 256)
    samples = Shared(partial(noise, 64, inputs))

    def variant(norm: MakeNorm, check: Callable[[], None] | None = None) -> Variant:
        return Variant(lambda: OnlineStep(_perceptron(inputs, width, norm, depth=2), samples()), check)

    def fused(norm: MakeNorm, count: int = 1) -> Variant:
        make = partial(_perceptron, inputs, width, depth=2)
        check = partial(_check_fused, make, norm, inputs, count)
        return Variant(lambda: FusedStep(make(norm), samples(), count), check)

    variants = {
        "streaming": variant(StreamingNorm, partial(check_layer, StreamingNorm, (1, width))),
        "streaming fused": fused(StreamingNorm),
        "streaming fused, 64 a call": fused(StreamingNorm, 64),
        "nn.LayerNorm": variant(nn.LayerNorm),
        "none": variant(lambda c: nn.Identity()),
        "nn.BatchNorm1d eval": variant(lambda c: nn.BatchNorm1d(c).eval()),
    }
    yield Case("online", f"{inputs}-{width}-{width}-{CLASSES}, SGD", "nn.LayerNorm", variants)

    def by(optimizer: str, width: int) -> Variant:
        make = partial(_perceptron, inputs, width, depth=2)
        check = partial(_check_fused, make, StreamingNorm, inputs, 16, optimizer)
        is_checked = optimizer != "SGD"  # that one is above
        return Variant(lambda: FusedStep(make(StreamingNorm), samples(), 64, optimizer), check if is_checked else None)

    for width in (8, 16) if quick else (64, 256):
        yield Case(
            "online",
            f"{inputs}-{width}-{width}-{CLASSES} fused, 64 a call, by optimizer",
            "SGD",
            {optimizer: by(optimizer, width) for optimizer in OPTIMIZERS},
        )


def _check_fused(make: MakeModel, norm: MakeNorm, inputs: int, count: int, optimizer: str = "SGD") -> None:
    """Compiled steps leave the weights and the state where the ordinary loop in float64 leaves them. Those of Adam are
    in float64 too: it divides small gradients by their own size, and so their rounding."""
    samples, steps, ends = noise(64, inputs), 16 if count == 1 else 1, []
    wide = Samples(samples.x.double(), samples.y)
    for fused in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(norm)
        if optimizer == "Adam":
            model, samples = model.double(), wide
        subject = FusedStep(model, samples, count, optimizer) if fused else OnlineStep(model.double(), wide, optimizer)
        for _ in range(steps if fused else steps * count):
            subject.step()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        compare(name, value, ends[1][name], inputs, torch.float32, steps * count)


class Updates:
    """A weight update after a cycle of mini-batches (``DAU``)."""

    def __init__(self, dau: DAU, samples: Samples) -> None:
        self.dau = dau
        size = dau.m * dau.n
        self.cycles = list(zip(samples.x.split(size), samples.y.split(size), strict=True))
        self.at = 0

    def step(self) -> None:
        x, y = self.cycles[self.at]
        self.at = (self.at + 1) % len(self.cycles)
        self.dau.update(x, y)


class Epoch:
    """An epoch of the training loop, with its access to the data, its metrics and its test."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def step(self) -> None:
        done = len(self.trainer.metrics)
        while len(self.trainer.metrics) == done:
            self.trainer.step()
            if self.trainer.failed:
                raise RuntimeError(f"the epoch to be timed ended early: {self.trainer.failed}")


def dau(model: nn.Module, m: int, n: int, vectorize: bool = True) -> DAU:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    return DAU(
        model, optimizer, F.cross_entropy, samples_per_batch=m, batches_per_update=n, vectorize=vectorize, warmup=0
    )


def cycle(quick: bool) -> Iterator[Case]:
    """Training with one sample a batch, many batches an update, beside a large batch of ``nn`` batch normalization."""
    inputs, width, size, per_epoch = (64, 16, 8, 4) if quick else (INPUTS, 256, 64, 100)
    perceptron = partial(_perceptron, inputs, width)
    yield _epoch(perceptron, inputs, width, size, per_epoch)
    yield _update(f"update of A, {size} samples", perceptron, nn.BatchNorm1d, nn.LayerNorm, size, (inputs,))
    size, side = (4, 8) if quick else (32, 32)
    convolutional = partial(_convolutional, 4 if quick else 16)
    layer = partial(nn.GroupNorm, 1)
    yield _update(f"update of B, {size} images", convolutional, nn.BatchNorm2d, layer, size, (3, side, side))


def _perceptron(inputs: int, width: int, norm: MakeNorm, depth: int = 3) -> nn.Module:
    # Without nn.Flatten, which samples (n, d) do not need and OnlineTrainer does not take.
    return nn.Sequential(*list(FullyConnected(inputs, CLASSES, norm, width, depth))[1:])


def _convolutional(width: int, norm: MakeNorm) -> nn.Module:
    return Convolutional(3, CLASSES, norm, width)


def _epoch(model: MakeModel, inputs: int, width: int, size: int, updates: int) -> Case:
    samples = Shared(partial(noise, size * updates, inputs))

    def epochs(arm: str, m: int, n: int, norm: MakeNorm | None = None) -> Epoch:
        s = samples()
        data = Data("noise", s.x, s.y, s.x[: 10 * size], s.y[: 10 * size], CLASSES, "torch.randn")
        run = Run(arm=arm, width=width, samples_per_batch=m, batches_per_update=n, epochs=1 << 20, learning_rate=RATE)
        trainer = Trainer(run, data)
        if norm is not None:
            trainer.model = model(norm)
            trainer.dau = dau(trainer.model, m, n)
        return Epoch(trainer)

    check = partial(_check, model, StreamingNorm, (inputs,))
    variants = {
        f"streaming 1 x {size} vectorized": Variant(partial(epochs, "streaming", 1, size), check),
        f"nn.BatchNorm1d {size} x 1": Variant(partial(epochs, "batch", size, 1, nn.BatchNorm1d)),
    }
    return Case("cycle", f"epoch of A, {size * updates} samples", f"nn.BatchNorm1d {size} x 1", variants)


def _update(name: str, model: MakeModel, batch: MakeNorm, layer: MakeNorm, size: int, shape: tuple[int, ...]) -> Case:
    samples = Shared(partial(noise, size * UPDATES, *shape))

    def variant(norm: MakeNorm, m: int, check: Callable[[], None] | None = None, vectorize: bool = True) -> Variant:
        return Variant(lambda: Updates(dau(model(norm), m, size // m, vectorize), samples()), check)

    def cycles(norm: MakeNorm, vectorize: bool = True) -> Variant:
        return variant(norm, 1, partial(_check, model, norm, shape), vectorize)

    reference, like = f"nn batch norm {size} x 1", (size, 16, *(8 for _ in shape[1:]))
    variants = {
        f"streaming 1 x {size} vectorized": cycles(StreamingNorm),
        f"streaming L1 1 x {size} vectorized": cycles(partial(StreamingNorm, p=1)),
        f"streaming L1 about 0, 1 x {size} vectorized": cycles(partial(StreamingNorm, p=1, center="zero")),
        f"streaming 1 x {size} loop": cycles(StreamingNorm, vectorize=False),
        f"streaming {size} x 1": variant(StreamingNorm, size, partial(check_layer, StreamingNorm, like)),
        f"BatchNorm {size} x 1": variant(BatchNorm, size, partial(check_layer, BatchNorm, like)),
        reference: variant(batch, size),
        f"nn layer norm {size} x 1": variant(layer, size),
    }
    return Case("cycle", name, reference, variants)


def _check(model: MakeModel, norm: MakeNorm, shape: Sequence[int], size: int = 8) -> None:
    """A vectorized cycle leaves the same weights and state as the loop over its mini-batches, in float64."""
    samples, ends = noise(size, *shape), []
    for vectorize in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trainer = dau(model(norm).double(), 1, size, vectorize)
        trainer.warm_up(samples.x.double())
        trainer.update(samples.x.double(), samples.y)
        ends.append(trainer.model.state_dict().values())
    off = max((a - b).abs().max().item() for a, b in zip(*ends, strict=True))
    if not off < 1e-9:  # float64 keeps 16 digits, of which a network this deep may lose 7
        raise WrongError(f"the vectorized cycle is off from the loop by {off:.1e}")


class Watched:
    """So many weight updates that one record of a monitor falls among them, with the monitor or without."""

    def __init__(self, training: OnlineStep | Updates, is_watched: bool) -> None:
        self.training, self.count = training, EVERY
        self.loop = training.dau if isinstance(training, Updates) else training
        if is_watched:
            monitor(self.loop.model, self.loop.optimizer, os.devnull, every=EVERY)

    def step(self) -> None:
        for _ in range(self.count):
            self.training.step()


def watched(quick: bool) -> Iterator[Case]:
    """The smallest step of training, and an update of a whole cycle, with a monitor and alone."""
    inputs, width, size = (64, 16, 8) if quick else (INPUTS, 256, 64)
    samples = Shared(partial(noise, size * UPDATES, inputs))

    def single() -> OnlineStep:
        return OnlineStep(_perceptron(inputs, width, StreamingNorm, depth=2), samples())

    def cycles() -> Updates:
        return Updates(dau(_perceptron(inputs, width, StreamingNorm), 1, size), samples())

    makes: dict[str, Callable[[], OnlineStep | Updates]] = {
        f"{inputs}-{width}-{width}-{CLASSES}, one sample": single,
        f"update of A, {size} samples": cycles,
    }
    for name, make in makes.items():
        alone = Variant(lambda make=make: Watched(make(), False))
        with_monitor = Variant(lambda make=make: Watched(make(), True), partial(_check_unnoticed, make))
        yield Case("monitor", name, "alone", {"watched": with_monitor, "alone": alone})


def _check_unnoticed(make: Callable[[], OnlineStep | Updates]) -> None:
    """A monitored training leaves the same weights and state, bit for bit."""
    ends = []
    for is_watched in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            subject = Watched(make(), is_watched)
        for _ in range(2):
            subject.step()
        ends.append(subject.loop.model.state_dict())
    if different := [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]:
        raise WrongError(f"a monitored training ends with another {different[0]}")


def convnet(quick: bool, device: str) -> Iterator[Case]:
    """Four convolutions on 64 images of 32 x 32, forward and backward."""
    n, side, widths = (4, 8, (4, 4, 8, 8)) if quick else (64, 32, (32, 64, 64, 128))
    for layout in ("contiguous", "channels_last"):
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def pair(form: torch.memory_format = form) -> Pair:
            images = noise(n, 3, side, side).x
            return Pair(images.contiguous(memory_format=form).to(device), noise(n, CLASSES).x.to(device))

        def make(norm: MakeNorm, shared: Shared[Pair], form: torch.memory_format = form) -> LayerStep:
            parts: list[nn.Module] = []
            for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
                parts += [nn.Conv2d(before, after, 3, 1 + i % 2, 1, bias=False), norm(after), nn.ReLU()]
            model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))
            return LayerStep(model.to(memory_format=form), shared())  # type: ignore[call-overload]

        shared = Shared(pair)
        variants = {
            name: Variant(
                partial(make, OURS[name], shared),
                partial(check_layer, OURS[name], (8, widths[0], side, side), layout=layout, device=device),
            )
            for name in ("default", "full", "full L1", "one-pass", "BatchNorm")
        }
        peers: dict[str, MakeNorm] = {
            "nn.BatchNorm2d": nn.BatchNorm2d,
            "nn.GroupNorm(1)": partial(nn.GroupNorm, 1),
            "none": lambda c: nn.Identity(),
        }
        variants |= {name: Variant(partial(make, norm, shared)) for name, norm in peers.items()}
        yield Case("convnet", f"{n}x3x{side}x{side} {layout.replace('_', ' ')}", "nn.BatchNorm2d", variants)
