"""Cases of single layers: feature maps in both layouts, bfloat16, features without a map, one sample, and growth.

Legend: ``n`` samples, ``c`` features, ``place`` the map; a tensor is ``(n, c, *place)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.bench.case import Case, Shared, Traffic, Variant
from streamnorm.lab.bench.device import CPU, free_memory
from streamnorm.lab.bench.gate import MakeLayer, check_cycle, check_layer, draw, using
from streamnorm.lab.bench.machine import second_cache
from streamnorm.nn.layers import BatchNorm, StreamingNorm
from streamnorm.nn.norm import Norm

MAPS = (
    *((32, 64, 56, 56), (16, 512, 28, 28), (64, 256, 14, 14)),
    *((32, 128, 32, 32), (2, 64, 128, 128), (1, 64, 224, 224)),
)
NARROW = ((32, 64, 56, 56), (64, 256, 14, 14))
QUICK_MAPS = ((2, 8, 8, 8),)
LARGEST = 1 << 25
"""Elements of the largest tensors of growth curves, if memory allows: past every cache, a tenth of a second a step."""
SHARE_OF_MEMORY = 1 / 64
"""Of the free memory, for one tensor of a growth curve; a step holds a dozen of its size."""
MOST_IN_A_LOOP = 64
"""Mini-batches of the longest cycle that is compared with a loop."""

MOST_COMPILED = 256
"""Networks that one process compiles."""

MIX = (0.7, 0.2, 0.1)
OURS: dict[str, MakeLayer] = {
    "default": StreamingNorm,
    "full": lambda c: StreamingNorm(c, center="batch", beta=MIX),
    "full B": lambda c: StreamingNorm(c, beta=MIX),
    "full L1": lambda c: StreamingNorm(c, p=1, beta=MIX),
    "full L1 A": lambda c: StreamingNorm(c, p=1, center="batch", beta=MIX),
    "one-pass": lambda c: StreamingNorm(c, alpha=(1, 0), beta=(1, 0, 0), kappa=(0.9, 0.1, 0.9, 0.1)),
    "BatchNorm": BatchNorm,
}
"""What is timed of ours: ``default`` as it comes, whose memory counts samples, about the estimate (B). The others have
the paper's rule, alpha = (.7, .3) unless it says otherwise, with the mini-batch's share in both directions, so that
statistics come before the map; about the mini-batch's mean (A) or the estimate (B); L1 is p = 1. In ``one-pass``
estimates are of earlier updates alone, and each direction can be one pass over memory."""

READS = {"one-pass": (1, 2), "full L1 A": (3, 4)}
"""How often forward and backward read a tensor that no cache holds; what is not listed, 2 and 4."""


Peer = tuple[Callable[[], nn.Module], bool]
"""What makes a layer of another library, and whether it normalizes each sample by itself."""


@dataclass
class Pair:
    """An input and the gradient that comes back to its output."""

    x: Tensor
    dy: Tensor


class LayerStep:
    """A layer, forward and backward, on the device of what arrives."""

    def __init__(self, layer: nn.Module, pair: Pair, parameters: Sequence[nn.Parameter] | None = None) -> None:
        self.layer, self.pair = layer.to(pair.x.device), pair
        self.x, self.dy = pair.x, pair.dy
        self.parameters = list(layer.parameters() if parameters is None else parameters)
        self.streams = [module for module in layer.modules() if isinstance(module, Norm)]
        for _ in range(2):  # long is filled from the first weight update on
            self.step()
            self.rest()

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        self.forward().backward(self.dy)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def rest(self) -> None:
        for layer in self.streams:
            layer.fold()


@dataclass(frozen=True)
class Input:
    """What a layer is timed on."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = CPU

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        return " ".join(words + [self.layout.replace("_", " ")] * (len(self.shape) > 2))

    def pair(self) -> Pair:
        x, dy = (draw(self.shape, seed, self.dtype, self.layout).to(self.device) for seed in (0, 1))
        return Pair(x.requires_grad_(), dy)

    def traffic(self, reads: tuple[int, int], slab: int) -> Traffic:
        """x and dy are read, y and dx written; more often than once where a reference of ``slab`` elements does not
        stay in the second cache between its statistics and its map."""
        size = math.prod(self.shape) * self.dtype.itemsize
        fits = min(slab * self.dtype.itemsize, size) <= second_cache(self.device)
        return Traffic((3 if fits else sum(reads)) * size, 2 * size, 4 * size)

    def ours(self, name: str, pair: Shared[Pair], backend: str | None = None) -> Variant:
        make, (n, c, *place) = OURS[name], self.shape
        slab = n * math.prod(place) * (1 if self.layout == "contiguous" and place else c)
        return Variant(
            lambda: LayerStep(make(c), pair()),
            partial(check_layer, make, self.shape, self.dtype, self.layout, backend, self.device),
            partial(using, backend),
            self.traffic(READS.get(name, (2, 4)), slab),
        )

    def peer(self, make: Callable[[], nn.Module], pair: Shared[Pair], per_sample: bool) -> Variant:
        n, c, *place = self.shape
        slab = math.prod(self.shape[1:]) if per_sample else n * math.prod(place)
        slab = slab if per_sample or (self.layout == "contiguous" and place) else n * c * math.prod(place)
        return Variant(lambda: LayerStep(make(), pair()), traffic=self.traffic((2, 4), slab))

    def case(
        self,
        group: str,
        reference: str,
        peers: Mapping[str, Peer],
        ours: Sequence[str],
        eager: Sequence[str] = (),
        series: str = "",
        size: int = 0,
    ) -> Case:
        pair = Shared(self.pair)
        variants = {name: self.ours(name, pair) for name in ours}
        # Elsewhere there are no compiled kernels, and what is eager is there already.
        variants |= {f"{name} eager": self.ours(name, pair, "eager") for name in eager if self.device == CPU}
        variants |= {name: self.peer(make, pair, per_sample) for name, (make, per_sample) in peers.items()}
        name = f"{series} {size}" if series else str(self)
        return Case(group, name, reference, variants, series, size)


def maps(group: str, layout: str, quick: bool, compiled: bool, device: str) -> Iterator[Case]:
    """float32 feature maps beside ``nn.BatchNorm2d``."""
    for shape in QUICK_MAPS if quick else MAPS:
        c = shape[1]
        peers: dict[str, Peer] = {
            "nn.BatchNorm2d": (partial(nn.BatchNorm2d, c), False),
            "nn.GroupNorm(1)": (partial(nn.GroupNorm, 1, c), True),
            "nn.InstanceNorm2d": (partial(nn.InstanceNorm2d, c, affine=True), True),
        }
        if compiled:
            peers["nn.BatchNorm2d compiled"] = (lambda c=c: whole(nn.BatchNorm2d(c)), False)
        yield Input(shape, layout=layout, device=device).case(
            group, "nn.BatchNorm2d", peers, list(OURS), ["default", "full"]
        )


def whole(net: nn.Module) -> nn.Module:
    """``net``, which compiles as a whole when it is called, for the sizes that it is called with."""
    # To the compiler all networks are one piece of code, of which it would make eight versions and then give up.
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    # Module.compile() would skip the code of torch's own modules, and with it their graph.
    net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False)
    return net


def narrow(quick: bool, device: str) -> Iterator[Case]:
    """bfloat16 feature maps; parameters stay float32 where the layer allows it."""
    for shape in QUICK_MAPS if quick else NARROW:
        for layout in ("contiguous", "channels_last"):
            peers = {
                "nn.BatchNorm2d": (partial(nn.BatchNorm2d, shape[1]), False),
                "nn.GroupNorm(1)": (partial(nn.GroupNorm, 1, shape[1], dtype=torch.bfloat16), True),
            }
            ours = [name for name in OURS if "L1" not in name]
            yield Input(shape, torch.bfloat16, layout, device).case("bfloat16", "nn.BatchNorm2d", peers, ours)


def features(quick: bool, device: str) -> Iterator[Case]:
    """Features without a map beside ``nn.BatchNorm1d``."""
    for shape in ((16, 32),) if quick else ((128, 1024), (32, 4096)):
        peers = {
            "nn.BatchNorm1d": (partial(nn.BatchNorm1d, shape[1]), False),
            "nn.LayerNorm": (partial(nn.LayerNorm, shape[1]), True),
            "nn.RMSNorm": (partial(nn.RMSNorm, shape[1]), True),
        }
        yield Input(shape, device=device).case("features", "nn.BatchNorm1d", peers, list(OURS), ["default", "full"])


def single(quick: bool, device: str) -> Iterator[Case]:
    """One sample beside ``nn.LayerNorm``: what a call costs."""
    for c in (16,) if quick else (1024, 256):
        peers = {
            "nn.LayerNorm": (partial(nn.LayerNorm, c), True),
            "nn.RMSNorm": (partial(nn.RMSNorm, c), True),
            "nn.BatchNorm1d eval": (lambda c=c: nn.BatchNorm1d(c).eval(), False),
        }
        ours = ["default", "full B", "full L1", "one-pass"]
        yield Input((1, c), device=device).case("single", "nn.LayerNorm", peers, ours, ["default", "full B"])


CURVES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "batch": lambda size: (size, 64, 28, 28),
    "features": lambda size: (16, size, 14, 14),
    "map side": lambda size: (2, 32, size, size),
}
"""What grows, and the input at each of its sizes."""


def growth(quick: bool, device: str) -> Iterator[Case]:
    """The same layers from small to the largest that memory allows, and cycles of one sample a batch."""
    most = 1 << 17 if quick else min(LARGEST, int(free_memory(device) * SHARE_OF_MEMORY) // 4)
    for series, shape in CURVES.items():
        size = 2 if series == "map side" else 1
        while math.prod(shape(size)) <= most:
            c = shape(size)[1]
            peers = {"nn.BatchNorm2d": (partial(nn.BatchNorm2d, c), False)}
            yield Input(shape(size), device=device).case(
                "growth", "nn.BatchNorm2d", peers, ["full", "one-pass"], series=series, size=size
            )
            size *= 2
    for length in (2**k for k in range(1, 5 if quick else 14)):
        yield _cycle(length, device)


def _cycle(length: int, device: str, c: int = 256) -> Case:
    """A cycle of ``length`` mini-batches of one sample in one call, beside one mini-batch of as many samples."""
    pair = Shared(Input((length, c), device=device).pair)

    def step(make: MakeLayer) -> Any:
        layer = make(c)
        layer.steps = length
        return LayerStep(layer, pair())

    variants = {
        name: Variant(
            partial(step, OURS[name]), partial(check_cycle, OURS[name], min(length, MOST_IN_A_LOOP), device=device)
        )
        for name in ("full B", "one-pass")
    }
    variants["nn.BatchNorm1d"] = Variant(lambda: LayerStep(nn.BatchNorm1d(c), pair()))
    return Case("growth", f"cycle length {length}", "nn.BatchNorm1d", variants, "cycle length", length)
