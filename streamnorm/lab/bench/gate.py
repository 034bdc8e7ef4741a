"""The gate: a layer is right, or it is not timed. Imports the layers and the oracle.

A layer is followed over weight updates beside the oracle (``streamnorm.oracle``) on a small input of the same kind, and
beside the generic backend in float64 on the very input that is timed, where kernels choose other paths. Outputs, all
gradients and all state are compared. What it is compared with stands on the CPU, wherever the layer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.lab.bench.case import WrongError
from streamnorm.nn.norm import Norm
from streamnorm.ops import backends
from streamnorm.oracle import LongShort, Oracle
from streamnorm.oracle_rules import Pool, Regression

MakeLayer = Callable[[int], Norm]
Found = dict[str, Tensor]
SMALL = (4, 6, 5, 3, 2)
"""The most of each axis that the oracle, made of plain loops, is asked about."""
LARGE = 1 << 23
"""Elements above which a smaller batch stands for the whole one in the comparison in float64."""
FIRST_BATCH = 64
"""Samples of the first mini-batch where single activations are timed: the first sigma of one would be 0."""
MEMBERS: dict[type, tuple[str, ...]] = {
    LongShort: ("long", "short", "count", "updates"),
    Pool: ("long", "short", "count", "held"),
    Regression: ("theta", "held"),
}
"""What the memories of the oracle hold."""


def using(backend: str | None) -> AbstractContextManager[Any]:
    """Inside, layers compute with this backend; None: the fastest that serves them."""
    return backends.using(backend)


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Values about a center of its feature's own, none nearer to it than a half: rounding decides no sign."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(*shape, generator=generator) + 0.5
    sign = torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1)
    center = torch.linspace(-1, 1, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    x = size.mul_(sign).add_(center).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def arrivals(
    shape: Sequence[int], step: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """An input and the gradient of its output, which go together enough for the sums over them to stay far from 0."""
    x = draw(shape, 2 * step, dtype, layout)
    return x, draw(shape, 2 * step + 1, dtype, layout).add_(x, alpha=0.5)


def check_layer(
    make: MakeLayer,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    backend: str | None = None,
    device: str = "cpu",
) -> None:
    """The layer ``make(c)`` is right for inputs ``(n, c, *place)`` of this shape, dtype and layout, on this device.

    Raises:
        WrongError: with what is off, and by how much.
    """
    small = [min(size, most) for size, most in zip(shape, SMALL, strict=False)]
    large = list(shape)
    while math.prod(large) > LARGE and large[0] > 2:
        large[0] //= 2
    for size, other in ((small, ByOracle), (large, Generic)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = make(size[1])
            for parameter in layer.parameters():
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            beside = other(layer)  # before the layer moves
            _follow(Ours(layer, backend, device), beside, size, dtype, layout)


def check_cycle(make: MakeLayer, length: int, c: int = 32, device: str = "cpu") -> None:
    """A cycle of ``length`` mini-batches of one sample in one call is the loop over them, and one of them is right.

    Raises:
        WrongError: with what is off, and by how much.
    """
    check_layer(make, (1, c), device=device)
    layer = make(c)
    loop = Loop(layer)  # before the layer moves
    ours = Ours(layer, None, device)
    for side in (ours, loop.generic):
        side.step(*arrivals((FIRST_BATCH, c), 0))
        side.fold()
    layer.steps = length
    x, dy = arrivals((length, c), 1)
    got, want = ours.step(x, dy), loop.step(x, dy)
    for name in want:
        compare(f"{name} of a cycle of {length}", got[name], want[name], length, x.dtype)


def _follow(ours: Ours, other: Ours | ByOracle, shape: Sequence[int], dtype: torch.dtype, layout: str) -> None:
    """Three mini-batches with a weight update after the first, both sides in step."""
    first = [FIRST_BATCH if math.prod(shape) == shape[1] else shape[0], *shape[1:]]
    for step, size in enumerate((first, shape, shape)):
        x, dy = arrivals(size, step, dtype, layout)
        terms = x.numel() // shape[1]
        got, want = ours.step(x, dy), other.step(x, dy)
        for name in want:
            compare(f"{name} of a {'x'.join(map(str, size))} input, step {step}", got[name], want[name], terms, dtype)
        if step == 0:
            ours.fold()
            other.fold()


def compare(name: str, got: Tensor, want: Tensor, terms: int, dtype: torch.dtype, updates: int = 1) -> None:
    """``got`` equals ``want`` up to rounding, relative to the largest value of ``want``.

    A value is rounded to ``dtype`` at most four times on its way (normalized, scaled, shifted, stored). In float32 a
    difference ``x - c`` loses |x| / |x - c| <= 5 half-eps (``draw`` keeps them apart), and a dozen operations follow,
    F, G and the map; a sum of ``terms`` values, taken by halves, by lanes or in blocks, loses log2(terms) half-eps a
    pass, and there are up to eight passes between x and dx. An update of the weights keeps its error; those of several
    updates are independent, so they add up as the square root of their number.

    Raises:
        WrongError: if it does not.
    """
    allowed = 4 * torch.finfo(dtype).eps + (30 + 4 * math.log2(max(terms, 1))) * torch.finfo(torch.float32).eps
    allowed *= math.sqrt(updates)
    scale = max(want.abs().max().item(), 1e-30)
    off = (got.double() - want.double().reshape(got.shape)).abs().max().item() / scale
    if not off <= allowed:
        raise WrongError(f"{name} is off by {off:.1e} of its largest value, rounding allows {allowed:.1e}")


def check_network(fast: nn.Module, slow: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], depth: int) -> None:
    """``fast`` is ``slow``, the same network in float64 on the CPU by torch operations: in output, gradients and state,
    with a weight update's fold after each batch of inputs and output gradients.

    Some 64 operations a layer, or a step in time, round; their errors go on through the ``depth`` of them.

    Raises:
        WrongError: if it is not.
    """
    at = next(fast.parameters())
    allowed = 16 * 64 * depth * torch.finfo(at.dtype).eps
    for update, (x, dy) in enumerate(batches):
        got = _trained(fast, x.to(at), dy.to(at))
        with using("eager"):
            want = _trained(slow, x.double(), dy.double())
        for name, value in got.items():
            off = (value.cpu().double() - want[name]).abs().max().item() / max(want[name].abs().max().item(), 1.0)
            if not off <= allowed:
                raise WrongError(f"update {update} in {at.dtype}, {name}: off by {off:.1e}, allowed {allowed:.1e}")


def _trained(net: nn.Module, x: Tensor, dy: Tensor) -> Found:
    x = x.detach().requires_grad_()
    net.zero_grad(set_to_none=True)
    out = net(x)
    y = out[0] if isinstance(out, tuple) else out
    y.backward(dy)
    for module in net.modules():
        if isinstance(module, Norm):
            module.fold()
    grads = {name: _present(parameter.grad) for name, parameter in net.named_parameters()}
    found = {"y": y.detach(), "dx": _present(x.grad), **grads, **dict(net.named_buffers())}
    return {name: value.clone() for name, value in found.items()}


class Ours:
    """A layer on a device as a function of what arrives: everything it returns and remembers, by name, on the CPU."""

    def __init__(self, layer: Norm, backend: str | None, device: str = "cpu") -> None:
        self.layer, self.backend, self.device = layer.to(device), backend, device

    def step(self, x: Tensor, dy: Tensor) -> Found:
        x = x.detach().to(self.device).requires_grad_()
        self.layer.zero_grad(set_to_none=True)
        with using(self.backend):
            y = self.layer(x)
            y.backward(dy.to(self.device))
        found = {"y": y.detach(), "dx": _present(x.grad)}
        if self.layer.weight is not None and self.layer.bias is not None:
            found |= {"dweight": _present(self.layer.weight.grad), "dbias": _present(self.layer.bias.grad)}
        for which in ("H1", "H2"):
            memory = getattr(self.layer, which)
            if memory is not None:
                state = {**memory.state(), "estimate": memory.estimate}
                found |= {f"{which}.{name}": value.clone() for name, value in state.items()}
        return {name: value.cpu() for name, value in found.items()}

    def fold(self) -> None:
        self.layer.fold()


class Generic(Ours):
    """The same layer in float64 by the backend that differentiates the definitions."""

    def __init__(self, layer: Norm) -> None:
        super().__init__(deepcopy(layer).double(), "generic")

    def step(self, x: Tensor, dy: Tensor) -> Found:
        return super().step(x.double(), dy.double())


class Loop:
    """A cycle of one sample a batch, one after another."""

    def __init__(self, layer: Norm) -> None:
        self.generic = Generic(layer)

    def step(self, x: Tensor, dy: Tensor) -> Found:
        found = [self.generic.step(a, b) for a, b in zip(x.split(1), dy.split(1), strict=True)]
        sums = {name: torch.stack([f[name] for f in found]).sum(0) for name in ("dweight", "dbias")}
        return {**found[-1], **{name: torch.cat([f[name] for f in found]) for name in ("y", "dx")}, **sums}


def oracle_of(layer: Norm, **changes: Any) -> Oracle:
    """The oracle of a layer's definition and policy, with ``changes`` of its weights."""
    ref, moment, policy = layer.ref, layer.moment, layer.policy
    names = ("alpha", "beta", "kappa", "rate", "memory")
    rules = {name: getattr(policy, name) for name in names if hasattr(policy, name)}
    return Oracle(
        features=ref.features,
        place=ref.place,
        samples=ref.samples,
        window=ref.window,
        p=moment.p,
        center=moment.center,
        eps=moment.eps,
        policy=type(policy).__name__.lower(),  # type: ignore[arg-type]
        **{**rules, **changes},
    )


class ByOracle:
    """The same layer by Algorithms 1 to 6 in plain loops, its gain and bias around them."""

    def __init__(self, layer: Norm) -> None:
        self.oracle = oracle_of(layer)
        ones, zeros = torch.ones(layer.num_features), torch.zeros(layer.num_features)
        self.weight = (ones if layer.weight is None else layer.weight.detach()).double()
        self.bias = (zeros if layer.bias is None else layer.bias.detach()).double()
        self.policy = layer.policy

    def step(self, x: Tensor, dy: Tensor) -> Found:
        shape, dims = (-1, *[1] * (x.ndim - 2)), [d for d in range(x.ndim) if d != 1]
        weight, bias = self.weight.reshape(shape), self.bias.reshape(shape)
        normalized = self.oracle.forward(x.double())
        grad = dy.double()
        found = {"y": weight * normalized + bias, "dx": self.oracle.backward(weight * grad)}
        trust = self.policy.trust(len(x))
        found |= {"dweight": trust * (grad * normalized).sum(dims), "dbias": trust * grad.sum(dims)}
        if self.oracle.estimate is not None:
            found["H1.estimate"] = self.oracle.estimate
        for which, H in (("H1", self.oracle.H1), ("H2", self.oracle.H2)) if self.oracle.streams else ():
            found |= {f"{which}.{name}": torch.as_tensor(getattr(H, name)) for name in MEMBERS[type(H)]}
        return found

    def fold(self) -> None:
        self.oracle.update()


def _present(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise WrongError("a gradient did not arrive")
    return grad
