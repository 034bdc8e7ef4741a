"""Cases of a training step of a network with the shape of ResNet-18 (He et al. 2016): its time and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from streamnorm.lab.bench.case import Case, Shared, Variant
from streamnorm.lab.bench.device import peak
from streamnorm.lab.bench.gate import MakeLayer, check_layer, check_network, draw
from streamnorm.lab.bench.layers import OURS, whole
from streamnorm.lab.bench.networks import OnlineStep, Samples, noise

MakeNorm = Callable[[int], nn.Module]
WIDTHS = (64, 128, 256, 512)


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """``ReLU(h + norm(conv(ReLU(norm(conv(h))))))``, with a projection of h where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(_conv(before, after, 3, stride), norm(after), nn.ReLU(inplace=True)),
            *(_conv(after, after, 3), norm(after)),
        )
        same = stride == 1 and before == after
        self.skip = nn.Identity() if same else nn.Sequential(_conv(before, after, 1, stride), norm(after))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.relu(self.branch(h) + self.skip(h))


def resnet(norm: MakeNorm, classes: int, widths: Sequence[int] = WIDTHS, blocks: int = 2) -> nn.Sequential:
    """``x (n, 3, height, width) -> (n, classes)``; the map is halved by the stem, its pooling, and each width but the
    first. With the defaults and 1,000 classes it has the 11,689,512 parameters of ResNet-18."""
    stem = [_conv(3, widths[0], 7, 2), norm(widths[0]), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    stages: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise((widths[0], *widths))):
        stages += [Block(before, after, 1 + (i > 0), norm), *(Block(after, after, 1, norm) for _ in range(blocks - 1))]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


@dataclass(frozen=True)
class Training:
    """Steps of training such a network on noise: forward, loss, backward and SGD with momentum."""

    device: str
    n: int = 8
    side: int = 64
    classes: int = 1000
    widths: Sequence[int] = WIDTHS
    blocks: int = 2

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.n, 3, self.side, self.side

    def make(self, norm: MakeNorm) -> nn.Module:
        return resnet(norm, self.classes, self.widths, self.blocks)

    def samples(self) -> Samples:
        """Of four steps, one after the other."""
        found = noise(4 * self.n, *self.shape[1:])
        return Samples(found.x.to(self.device), (found.y % self.classes).to(self.device))

    def step(self, norm: MakeNorm, compiled: bool, samples: Callable[[], Samples]) -> OnlineStep:
        model = self.make(norm).to(self.device)
        return OnlineStep(whole(model) if compiled else model, samples(), "SGD with momentum", self.n)

    def peak(self, norm: MakeNorm, compiled: bool) -> int:
        """The most bytes that a step holds beyond weights, statistics and the optimizer's averages."""
        subject = self.step(norm, compiled, self.samples)
        for _ in range(2):
            subject.step()
        subject.optimizer.zero_grad()
        return peak(subject.step, self.device)

    def check(self, norm: MakeLayer, compiled: bool) -> None:
        """The layer is right for the largest map and the smallest; the compiled network is the plain one, in float64,
        since a ReLU turns a rounding about 0 into a whole gradient.

        Raises:
            WrongError: if it is not.
        """
        if not compiled:
            for width, halvings in ((self.widths[0], 1), (self.widths[-1], 1 + len(self.widths))):
                check_layer(norm, (self.n, width, *[self.side >> halvings] * 2), device=self.device)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            slow = self.make(norm).double()
        batches = [(draw(self.shape, seed), draw((self.n, self.classes), seed + 1)) for seed in (0, 2, 4)]
        depth = 2 + 2 * self.blocks * len(self.widths)
        check_network(whole(deepcopy(slow).to(self.device)), slow, batches, depth)


def steps(quick: bool, device: str) -> Iterator[Case]:
    """8 images of 64 x 64; each network as it is, and compiled."""
    training = Training(device, 2, 16, 4, (4, 8), 1) if quick else Training(device)
    samples = Shared(training.samples)
    variants = {}
    for compiled, names in ((False, ("default", "full", "one-pass")), (True, ("default", "full"))):
        norms = {name: (OURS[name], partial(training.check, OURS[name], compiled)) for name in names}
        for name, (norm, check) in {**norms, "nn.BatchNorm2d": (nn.BatchNorm2d, None)}.items():
            variants[f"{name} compiled" if compiled else name] = Variant(
                partial(training.step, norm, compiled, samples), check, peak=partial(training.peak, norm, compiled)
            )
    yield Case("resnet", str(training), "nn.BatchNorm2d", variants)
