"""Random histories of one layer: whatever its owner may do to it, followed by the oracle in float64.

A history is drawn from its seed alone: a layer (reference, moment, policy, gain and bias), and then what happens to it:
calls in training with their backward, weight updates, tests, copies, saving and loading, casts, inputs that are empty
or not finite or lie strangely in memory. After every event, outputs, gradients and all state equal the oracle's up to
rounding. How much rounding may do is not guessed: where a history differs, a second oracle, whose inputs are off in
their last digits, follows it again and says what those digits decide.
"""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import ALL_REFS
from torch import Tensor, nn

from streamnorm import Batch, DegenerateReferenceError, Evidence, Lp, Norm, Policy, Sample, Streaming
from streamnorm.definition.ref import NormRef
from streamnorm.lab.bench.gate import MEMBERS, oracle_of
from streamnorm.ops.backends import using
from streamnorm.oracle import Oracle

EPS = torch.finfo(torch.float64).eps
ROUNDED = 1 << 14
"""Roundings that a value may have seen: sums of up to 64, a dozen operations around them, a dozen calls."""
DISTURBED = 8
"""The second oracle's inputs, and the weights of its F, are off by so many eps, and what it differs by counts as often:
one draw of errors says how they are passed on, and not how large the worst of them is."""
DRAWS = 8
"""Draws of errors before a difference counts: one alone may lie where an ill-conditioned call does not pass it on."""


class DifferenceError(AssertionError):
    """A layer is not what the oracle says."""


class Twin:
    """An oracle with gain and bias, and if there is ``noise`` one beside it, off in the last digits of its inputs."""

    def __init__(
        self, make: Callable[[float], Oracle], affine: nn.Module | None, policy: Policy, noise: int | None
    ) -> None:
        self.oracles, self.policy = [make(off) for off in ((0.0,) if noise is None else (0.0, DISTURBED * EPS))], policy
        self.weight, self.bias = (None, None) if affine is None else (read(affine.weight), read(affine.bias))
        self.draw = torch.Generator().manual_seed(noise or 0)

    def disturb(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.draw, dtype=x.dtype) * 2 - 1
        finite = x[x.isfinite()]
        scale = finite.abs().max() if finite.numel() else 0.0
        return x + DISTURBED * EPS * scale * noise

    def each(self, what: Callable[[Oracle, Callable[[Tensor], Tensor]], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [what(oracle, off) for oracle, off in zip(self.oracles, (lambda x: x, self.disturb), strict=False)]

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return self.each(lambda oracle, off: self.mapped(oracle.forward(off(x))))

    def evaluate(self, x: Tensor) -> list[dict[str, Tensor]]:
        return self.each(lambda oracle, off: self.mapped(oracle.evaluate(off(x))))

    def mapped(self, z: Tensor) -> dict[str, Tensor]:
        weight, bias = self.gains(z.ndim)
        return {"z": z, "y": z if weight is None else z * weight + bias}

    def gains(self, ndim: int) -> tuple[Any, Any]:
        if self.weight is None or self.bias is None:
            return None, None
        shape = (-1, *[1] * (ndim - 2))
        return self.weight.reshape(shape), self.bias.reshape(shape)

    def backward(self, dy: Tensor, made: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        weight, _ = self.gains(dy.ndim)
        rest = [axis for axis in range(dy.ndim) if axis != 1]
        trust, found = self.policy.trust(len(dy)), []
        for oracle, off, there in zip(self.oracles, (lambda x: x, self.disturb), made, strict=False):
            grad = off(dy)
            one = {"dx": oracle.backward(grad if weight is None else weight * grad)}
            if weight is not None:
                one |= {"dweight": trust * (grad * there["z"]).sum(rest), "dbias": trust * grad.sum(rest)}
            found.append(one)
        return found

    def forget(self) -> None:
        """No backward comes for the latest call."""
        for oracle in self.oracles:
            oracle._calls.pop()

    def update(self) -> None:
        for oracle in self.oracles:
            oracle.update()

    def cast(self, dtype: torch.dtype) -> None:
        """Everything was a number of another dtype in between; statistics stay as they are where that is narrow."""
        wide = torch.float32 if dtype == torch.float32 else torch.float64
        for oracle in self.oracles:
            for which in ("H1", "H2"):
                H = getattr(oracle, which)
                through = {k: v.to(wide).double() for k, v in vars(H).items() if isinstance(v, Tensor)}
                setattr(oracle, which, replace(H, **through))
            if oracle.estimate is not None:
                oracle.estimate = oracle.estimate.to(wide).double()
        if self.weight is not None and self.bias is not None:
            self.weight, self.bias = self.weight.to(dtype).double(), self.bias.to(dtype).double()

    def state(self) -> list[dict[str, Tensor]]:
        def of(oracle: Oracle) -> dict[str, Tensor]:
            found = {} if oracle.estimate is None else {"H1.estimate": oracle.estimate}
            for which in ("H1", "H2") if oracle.streams else ():
                H = getattr(oracle, which)
                found |= {f"{which}.{name}": torch.as_tensor(getattr(H, name)) for name in MEMBERS[type(H)]}
            return found

        return [of(oracle) for oracle in self.oracles]


def read(parameter: Tensor) -> Tensor:
    return parameter.detach().double().clone()


def compare(name: str, got: Tensor, wanted: list[Tensor], lost: Tensor | None = None) -> None:
    """``got`` is what the oracle says, up to rounding, where it is not ``lost``; the last of ``wanted`` says how much
    the last digits decide.

    Raises:
        DifferenceError: if not.
    """
    want, other = (w.reshape(got.shape) for w in (wanted[0], wanted[-1]))
    got = got.detach().double()
    if got.numel() and (got - want).abs().max() <= ROUNDED * EPS:  # of whatever size, and all of it finite
        return
    if lost is not None:
        got = torch.where(lost, want, got)
    if not want.isfinite().all():
        if not torch.equal(want.isfinite(), got.isfinite()):
            raise DifferenceError(f"{name}: finite at {got.isfinite().tolist()}, want {want.isfinite().tolist()}")
        keep = want.isfinite() & other.isfinite()
        got, want, other = got[keep], want[keep], other[keep]
    if not want.numel():
        return
    if not got.isfinite().all():
        raise DifferenceError(f"{name}: {got.tolist()} is not finite, want {want.tolist()}")
    decided = (want - other).abs().nan_to_num(math.inf).max().item()
    allowed = ROUNDED * EPS * max(want.abs().max().item(), 1.0) + DISTURBED * decided
    off = (got - want).abs().max().item()
    if off > allowed:
        raise DifferenceError(f"{name}: off by {off:.2e}, rounding allows {allowed:.2e}")


@dataclass
class Waiting:
    """A call whose backward has not come."""

    x: Tensor
    y: Tensor
    made: list[dict[str, Tensor]]


@dataclass
class History:
    """What happens to one layer, drawn from ``seed``; ``run`` carries it out and raises at the first difference.
    ``noise``: which draw of errors the second oracle has; None: there is none."""

    seed: int
    noise: int | None = None
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.layer, self.twin, self.place, self.c = self._layer()
        self.waiting: list[Waiting] = []

    def _layer(self) -> tuple[Norm, Twin, tuple[int, ...], int]:
        rng = self.rng
        name = rng.choice(list(ALL_REFS))
        ref: NormRef = ALL_REFS[name]
        center = rng.choice(("batch", "estimate", "zero"))
        policies: list[Policy] = [
            Streaming(alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1)),
            Streaming(alpha=(0.7, 0.3)),
            Evidence(memory=rng.choice((3, 11, 100))),
        ]
        if ref.samples == "batch":
            policies.append(Batch(rate=rng.choice((0.1, 0.5))))
        elif center != "estimate":
            policies.append(Sample())
        policy = rng.choice(policies)
        moment = Lp(rng.choice((1, 2, 2, 2, 3, 1.5)), center)
        c = 6 if name.startswith("groups") else rng.choice((1, 2, 6))
        place = tuple(rng.choice((1, 2, 3)) for _ in range(rng.choice((0, 0, 1, 2, 2, 3))))
        layer = Norm(c, ref, moment, policy, affine=rng.random() < 0.6).double()
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=self._generator())

        def oracle(off: float) -> Oracle:
            if not isinstance(policy, Streaming):
                return oracle_of(layer)
            return oracle_of(layer, alpha=(policy.alpha[0], policy.alpha[1] * (1 + off)))

        self.told.append(f"{layer!r}, {c} features, map {place}")
        return layer, Twin(oracle, layer.affine, policy, self.noise), place, c

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(1 << 30))

    def _draw(self, n: int, spoilt: bool = True) -> Tensor:
        rng, shape = self.rng, (n, self.c, *self.place)
        x = torch.randn(shape, generator=self._generator(), dtype=torch.float64)
        x = (x + 0.3 * x * x) * rng.choice((0.01, 1.0, 1.0, 30.0)) + rng.choice((0.0, 0.0, 2.0, -50.0))
        if spoilt and x.numel() and rng.random() < 0.05:
            x.view(-1)[rng.randrange(x.numel())] = rng.choice((math.nan, math.inf, -math.inf))
        return self._laid(x)

    def _laid(self, x: Tensor) -> Tensor:
        """The same values, somewhere else in memory."""
        how = self.rng.choice(("as it is", "as it is", "last", "permuted", "sliced", "offset"))
        if how == "last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if how == "permuted":
            order = self.rng.sample(range(x.ndim), x.ndim)
            back = sorted(range(x.ndim), key=order.__getitem__)
            return x.permute(order).contiguous().permute(back)
        if how == "sliced":
            return torch.stack((x, x + 1), -1)[..., 0]
        if how == "offset":
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        return x

    EVENTS = (
        *(("train",) * 8),
        *(("backward",) * 6),
        *(("update",) * 4),
        *(("test",) * 3),
        *("copied", "pickled", "loaded", "cast", "train without backward", "empty"),
    )

    def run(self, events: int = 14) -> None:
        """
        Raises:
            DifferenceError: at the first one, after everything that led to it.
        """
        backend = self.rng.choice((None, None, "eager", "generic"))
        self.told.append(f"backend {backend}")
        try:
            with using(backend):
                for _ in range(events):
                    event = self.rng.choice(self.EVENTS)
                    self.told.append(event)
                    getattr(self, "_" + event.replace(" ", "_"))()
                    self._compare_state()
        except Exception as error:
            raise DifferenceError(f"history {self.seed}: " + "; ".join(self.told) + f"\n{error}") from error

    def _compare_state(self) -> None:
        if self.layer.H1 is None:
            return
        for name, wanted in _paired(self.twin.state()).items():
            which, member = name.split(".")
            memory = getattr(self.layer, which)
            if self.twin.oracles[0].estimate is not None:
                compare(name, memory.estimate if member == "estimate" else memory.state()[member], wanted)

    def _train(self, with_backward: bool = True) -> None:
        x = self._draw(self.rng.choice((1, 1, 2, 3, 4)))
        self.layer.train()
        if self._is_degenerate(x):
            try:
                self.layer(x)
            except DegenerateReferenceError:
                return
            raise DifferenceError("a reference of one activation was taken in Setting A")
        leaf = x.detach().requires_grad_()
        if leaf.stride() != x.stride():
            raise DifferenceError("the draw lost its layout")
        if with_backward:
            y = self.layer(leaf)
        else:
            with torch.no_grad():
                y = self.layer(x)
        made = self.twin.forward(x)
        compare("y", y, [one["y"] for one in made])
        if with_backward:
            self.waiting.append(Waiting(leaf, y, made))
        else:
            self.twin.forget()

    def _train_without_backward(self) -> None:
        if not self.waiting:
            self._train(with_backward=False)

    def _is_degenerate(self, x: Tensor) -> bool:
        size = self.layer.ref.size(self.layer.ref.view(x).shape)
        return size == 1 and self.layer.moment.center == "batch"

    def _backward(self) -> None:
        if not self.waiting:
            return
        call = self.waiting.pop()
        dy = self._draw(len(call.x))
        for parameter in self.layer.parameters():
            parameter.grad = None
        call.y.backward(dy)
        made = self.twin.backward(dy, call.made)
        affine = self.layer.affine
        got = {"dx": call.x.grad}
        if affine is not None:
            got |= {"dweight": affine.weight.grad, "dbias": affine.bias.grad}
        for name, wanted in _paired(made).items():
            grad = got[name]
            if grad is None:
                raise DifferenceError(f"{name}: there is none")
            compare(name, grad, wanted, self._lost(call.x, dy, grad))

    def _lost(self, x: Tensor, dy: Tensor, grad: Tensor) -> Tensor:
        """Where a gradient depends on a statistic of what is not finite: on such an x, whose loss is not finite, it may
        be anything; on such a dy, right or not finite."""
        lost = self._shares(x.detach()) | (self._shares(dy) & ~grad.isfinite() if grad.shape == dy.shape else False)
        return lost if grad.shape == lost.shape else lost.transpose(0, 1).flatten(1).any(1)

    def _shares(self, x: Tensor) -> Tensor:
        """Which activations share a statistic with one that is not finite."""
        ref = self.layer.ref
        view = ref.view((~x.isfinite()).double())
        shape = view.shape
        for _ in range(2):  # statistics that are not finite, and what depends on them
            view = ref.mean(view)
            view = (view if self.layer.H1 is None else view.mean(1, keepdim=True)).expand(shape)
        return view.reshape(x.shape) > 0

    def _update(self) -> None:
        self.layer.fold()
        self.twin.update()

    def _test(self) -> None:
        x = self._draw(self.rng.choice((0, 1, 3)))
        self.layer.eval()
        if self.twin.oracles[0].estimate is None if self.layer.H1 is not None else self._is_degenerate(x):
            return
        y = self.layer(x)
        if y.shape != x.shape:
            raise DifferenceError(f"y {tuple(y.shape)} for {tuple(x.shape)}")
        if x.numel():
            made = self.twin.evaluate(x)
            compare("y in testing", y, [one["y"] for one in made])

    def _empty(self) -> None:
        self.layer.train()
        x = self._draw(0).requires_grad_()
        y = self.layer(x)
        for parameter in self.layer.parameters():
            parameter.grad = None
        y.sum().backward()
        for name, parameter in self.layer.named_parameters():
            if parameter.grad is None or parameter.grad.any():
                raise DifferenceError(f"an empty batch leaves {name} the gradient {parameter.grad}")

    def _replaced(self, layer: Norm) -> None:
        """From now on another layer is the one that is followed; calls of the one before are not gone back through."""
        while self.waiting:
            self.waiting.pop()
            self.twin.forget()
        self.layer = layer

    def _copied(self) -> None:
        if not self.waiting:
            self._replaced(copy.deepcopy(self.layer))

    def _pickled(self) -> None:
        file = io.BytesIO()
        torch.save(self.layer, file)
        file.seek(0)
        self._replaced(torch.load(file, weights_only=False))

    def _loaded(self) -> None:
        layer = self.layer
        fresh = Norm(self.c, layer.ref, layer.moment, layer.policy, affine=layer.affine is not None).double()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self._replaced(fresh)

    def _cast(self) -> None:
        if self.waiting:
            return
        dtype = self.rng.choice((torch.float32, torch.bfloat16, torch.float64))
        self.layer.to(dtype)
        self.layer.double()
        self.twin.cast(dtype)


def _paired(made: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [one[name] for one in made] for name in made[0]}


def follow(history: Callable[[int, int | None], Any], seed: int) -> None:
    """Carry out a history, at first with no second oracle: most of them are right to more digits than it would allow.

    Raises:
        DifferenceError: if no draw of errors explains what differs from the oracle.
    """
    for noise in (None, *range(DRAWS)):
        try:
            return history(seed, noise).run()
        except DifferenceError as error:
            difference = error
    raise difference
