"""Cases over time: recurrent layers beside torch's, a loop with layer normalization, and the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from streamnorm.lab.bench.case import Case, Shared, Variant
from streamnorm.lab.bench.device import CPU
from streamnorm.lab.bench.gate import check_network
from streamnorm.lab.bench.layers import Pair
from streamnorm.nn.norm import Norm
from streamnorm.nn.recurrent.layers import NormGRU, NormRNN
from streamnorm.ops.backends import using

SEQUENCES, STEPS = 32, 100
HIDDEN = (100, 512)
GATES = {"GRU": 3, "RNN": 1}
OURS: dict[str, type[NormGRU | NormRNN]] = {"GRU": NormGRU, "RNN": NormRNN}


class NetStep:
    """A sequence through a recurrent layer, forward and backward, and a weight update's fold."""

    def __init__(self, net: nn.Module, pair: Pair) -> None:
        self.net, self.pair = net.to(pair.x.device), pair
        self.x = pair.x.detach().requires_grad_()
        self.parameters = [self.x, *net.parameters()]
        self.norms = [module for module in net.modules() if isinstance(module, Norm)]

    def forward(self) -> Tensor:
        return self.net(self.x)[0]

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.forward().backward(self.pair.dy)
        for norm in self.norms:
            norm.fold()


class LayerNormLoop(nn.Module):
    """A GRU or RNN with layer normalization, as it is written in Python: a loop over time."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.kind, gates = kind, GATES[kind]
        self.wx, self.wh = (nn.Linear(size, gates * size, bias=False) for _ in range(2))
        self.norm_x, self.norm_h = (nn.ModuleList(nn.LayerNorm(size) for _ in range(gates)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = [norm(a) for norm, a in zip(self.norm_x, self.wx(x).chunk(GATES[self.kind], 2), strict=True)]
        size = inputs[0].shape[2]
        h, outputs = x.new_zeros(x.shape[1], size), []
        for now in zip(*inputs, strict=True):
            if self.kind == "RNN":
                h = torch.tanh(now[0] + self.norm_h[0](self.wh(h)))
            else:
                gates = nn.functional.linear(h, self.wh.weight[: 2 * size]).chunk(2, 1)
                r, z = (torch.sigmoid(a + norm(b)) for a, norm, b in zip(now, self.norm_h, gates, strict=False))
                fresh = torch.tanh(now[2] + self.norm_h[2](nn.functional.linear(h * r, self.wh.weight[2 * size :])))
                h = z * fresh + (1 - z) * h
            outputs.append(h)
        return torch.stack(outputs), h


class Products:
    """The matrix products of such a layer and nothing else, by ``torch.mm``."""

    def __init__(self, size: int, kind: str, pair: Pair) -> None:
        self.pair = pair
        self.rows = pair.x.flatten(0, 1)
        self.h = pair.x[0].contiguous()
        self.out = torch.empty_like(self.h)
        self.weights = [torch.randn(size, size, device=pair.x.device) for _ in range(GATES[kind])]

    def step(self) -> None:
        for weight in self.weights:
            torch.mm(self.rows, weight.T)
            torch.mm(self.rows, weight)
            for _ in range(2):
                torch.mm(self.rows.T, self.rows)
            for _ in range(len(self.pair.x)):
                torch.mm(self.h, weight.T, out=self.out)
                torch.mm(self.h, weight, out=self.out)


def check(kind: str, device: str) -> None:
    """Ours over time is the loop in float64, in output, gradients and state, over three weight updates.

    Raises:
        WrongError: if it is not.
    """
    steps = 5
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        fast = OURS[kind](7, 20).to(dtype)
        slow = deepcopy(fast).double()
        batches = [(torch.randn(steps, 6, 7, dtype=dtype), torch.randn(steps, 6, 20, dtype=dtype)) for _ in range(3)]
        check_network(fast.to(device), slow, batches, steps)


def recurrent(quick: bool, device: str) -> Iterator[Case]:
    """100 steps of 32 sequences, as many inputs as hidden units."""
    steps, sizes = (5, (8,)) if quick else (STEPS, HIDDEN)
    for kind in GATES:
        for size in sizes:
            yield _case("recurrent", f"{kind} {size}, {steps} steps of {SEQUENCES}", kind, size, steps, device)


def over_time(quick: bool, device: str) -> Iterator[Case]:
    """Cost of the GRU against time steps and hidden size."""
    for series, points in (
        ("time steps", (2, 4) if quick else (6, 12, 25, 50, 100, 200, 400)),
        ("hidden size", (4, 8) if quick else (16, 32, 64, 128, 256, 512)),
    ):
        for point in points:
            size, steps = (8 if quick else 100, point) if series == "time steps" else (point, 5 if quick else STEPS)
            case = _case("over_time", f"{series} {point}", "GRU", size, steps, device)
            kept = {name: variant for name, variant in case.variants.items() if name in ("streaming", case.reference)}
            yield Case("over_time", case.name, case.reference, kept, series, point)


def _case(group: str, name: str, kind: str, size: int, steps: int, device: str) -> Case:
    def pair() -> Pair:
        generator = torch.Generator().manual_seed(0)
        return Pair(*(torch.randn(steps, SEQUENCES, size, generator=generator).to(device) for _ in range(2)))

    shared = Shared(pair)
    torch_net = {"GRU": nn.GRU, "RNN": nn.RNN}[kind]
    ours = OURS[kind]

    def net(make: Callable[[], nn.Module]) -> NetStep:
        return NetStep(make(), shared())

    streaming = Variant(partial(net, lambda: ours(size, size)), partial(check, kind, device))
    variants = {
        "streaming": streaming,
        # Elsewhere there are no compiled kernels, and the loop is what is above.
        **({"streaming loop": replace(streaming, within=partial(using, "eager"))} if device == CPU else {}),
        f"nn.{kind}": Variant(partial(net, lambda: torch_net(size, size))),
        "layer norm loop": Variant(partial(net, lambda: LayerNormLoop(size, kind))),
        "matrix products": Variant(lambda: Products(size, kind, shared())),
    }
    return Case(group, name, f"nn.{kind}", variants)
