"""Cases of compiled networks: three times [linear or convolution, norm, activation], each compiled as a whole.

Where ours is compiled it is torch operations, which the compiler fuses with what stands around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from streamnorm.lab.bench.case import Case, Shared, Variant
from streamnorm.lab.bench.gate import FIRST_BATCH, check_network, draw
from streamnorm.lab.bench.layers import OURS, LayerStep, Pair, whole
from streamnorm.nn.norm import Norm

DEPTH = 3
CHANNELS = 3
"""Of an image."""
MakeNorm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Network:
    """What is compiled, but for the norms in it; its input is ``(n, width)``, or images of ``(n, 3, side, side)``.

    Attributes:
        n: samples.
        width: features of each layer.
        side: of an image; 0: there are none, and the layers are linear.
    """

    activation: type[nn.Module]
    layout: str
    n: int
    width: int
    side: int = 0

    def __str__(self) -> str:
        layer = "Conv" if self.side else "Linear"
        shape = "x".join(map(str, self._shape(CHANNELS if self.side else self.width)))
        words = [f"{DEPTH} x [{layer} {self.width}, norm, {self.activation.__name__}],", shape]
        return " ".join(words + [self.layout.replace("_", " ")] * bool(self.side))

    def make(self, norm: MakeNorm) -> nn.Module:
        """With statistics of a first mini-batch, since the first sigma of one sample would be 0."""
        parts: list[nn.Module] = []
        for before, after in pairwise((CHANNELS if self.side else self.width, *[self.width] * DEPTH)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            parts += [conv if self.side else nn.Linear(before, after, bias=False), norm(after), self.activation()]
        form = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        net = nn.Sequential(*parts).to(memory_format=form)  # type: ignore[call-overload]
        x, dy = self.batch(0, max(self.n, 1 if self.side else FIRST_BATCH))
        net(x).backward(dy)
        net.zero_grad()
        for module in net.modules():
            if isinstance(module, Norm):
                module.fold()
        return net

    def batch(self, seed: int, n: int = 0) -> tuple[Tensor, Tensor]:
        """An input, and the gradient of the output."""
        shapes = (self._shape(CHANNELS if self.side else self.width, n), self._shape(self.width, n))
        x, dy = (draw(shape, 2 * seed + i, layout=self.layout) for i, shape in enumerate(shapes))
        return x, dy

    def pair(self, device: str) -> Pair:
        x, dy = self.batch(0)
        return Pair(x.to(device).requires_grad_(), dy.to(device))

    def check(self, norm: MakeNorm, device: str) -> None:
        """Compiled on a device it is the plain one. A ReLU turns a rounding about 0 into a whole gradient, so networks
        with one are compared in float64.

        Raises:
            WrongError: if it is not.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fast = self.make(norm).to(torch.float64 if self.activation is nn.ReLU else torch.float32)
        slow = deepcopy(fast).double()
        check_network(whole(fast.to(device)), slow, [self.batch(seed) for seed in (1, 2, 3)], DEPTH)

    def _shape(self, features: int, n: int = 0) -> tuple[int, ...]:
        return (n or self.n, features, *[self.side] * (2 if self.side else 0))

    def case(self, peer: MakeNorm, ours: str, device: str) -> Case:
        shared = Shared(partial(self.pair, device))

        def step(norm: MakeNorm) -> LayerStep:
            return LayerStep(whole(self.make(norm)), shared())

        variants = {
            name: Variant(partial(step, OURS[name]), partial(self.check, OURS[name], device))
            for name in ("default", ours)
        }
        reference = f"nn.{peer.__name__}"
        return Case("compiled", str(self), reference, variants | {reference: Variant(partial(step, peer))})


def networks(quick: bool, device: str) -> Iterator[Case]:
    """One sample through linear layers, and images through convolutions in both layouts; with a ReLU, and with a Tanh,
    since torch's compiled ReLU may take longer than all norms."""
    yield Network(nn.Tanh, "contiguous", 1, 16 if quick else 256).case(nn.LayerNorm, "full B", device)
    n, width, side = (2, 4, 8) if quick else (16, 16, 64)
    for activation in (nn.ReLU, nn.Tanh):
        for layout in ("contiguous", "channels_last"):
            yield Network(activation, layout, n, width, side).case(nn.BatchNorm2d, "full", device)
