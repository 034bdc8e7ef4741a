"""Random histories of one recurrent network, followed by its equations written out with an oracle for each Norm.

As in ``histories``, all of it is drawn from a seed, and where something differs, a second account whose inputs are off
in their last digits says what rounding may do. Sequences of one length or of several (packed), one or two layers, one
or both directions, states given or not; every mini-batch goes forward and back.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from histories import DISTURBED, EPS, DifferenceError, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import streamnorm as sn
from streamnorm.lab.bench.gate import MEMBERS
from streamnorm.nn.timespecific import TimeSpecificNorm
from streamnorm.ops.backends import using
from streamnorm.oracle import Oracle

KINDS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any]]] = {
    "sample": (sn.SampleNorm, {"features": "all", "samples": "one", "policy": "sample"}),
    "batch": (sn.BatchNorm, {"policy": "batch"}),
    "by time": (sn.TimeSpecific(sn.BatchNorm), {"policy": "batch"}),
    "paper": (lambda c: sn.StreamingNorm(c, alpha=(0.7, 0.3)), {"center": "estimate"}),
    "default": (sn.StreamingNorm, {"policy": "evidence", "center": "estimate"}),
}
"""Norms as people write them, and as the oracle knows them."""


class Through(torch.autograd.Function):
    """An oracle inside torch's chain rule; gradients come back in the reversed order of the calls."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, oracle: Oracle) -> Tensor:
        y = oracle.forward(a)
        ctx.oracle, ctx.calls = oracle, len(oracle._calls)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert len(ctx.oracle._calls) == ctx.calls, "gradients arrive in another order than T ... 1"
        return ctx.oracle.backward(grads[0]), None


class Plain:
    """The equations in plain loops over sequences in the order of their lengths, longest first."""

    def __init__(self, net: Any, kind: str, trust: Callable[[int], float]) -> None:
        self.net, self.kind, self.trust = net, kind, trust
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        self.oracles: dict[tuple[str, str, str, int], Oracle] = {}
        self.training = True

    def norm(self, cell: str, path: str, gate: str, a: Tensor, t: int) -> Tensor:
        gain, bias = (self.parameters[f"cells.{cell}.norm_{path}.{gate}.affine.{n}"] for n in ("weight", "bias"))
        if not self.training and self.kind == "by time":
            t = min(t, max(key[3] for key in self.oracles if key[0] == cell))
        key = cell, path, gate, t if self.kind == "by time" else 0
        if key not in self.oracles:
            self.oracles[key] = Oracle(**KINDS[self.kind][1])
        oracle = self.oracles[key]
        if not self.training:
            return oracle.evaluate(a) * gain + bias
        share = self.trust(len(a))
        gain, bias = (share * q + (1 - share) * q.detach() for q in (gain, bias))
        return Through.apply(a, oracle) * gain + bias

    def step(self, cell: str, x: Tensor, state: tuple[Tensor, ...], t: int) -> tuple[Tensor, ...]:
        made = self.net.cells[cell]
        gates = made.gates
        split = {
            name: dict(zip(gates, self.parameters[f"cells.{cell}.weight_{name}"].split(made.hidden_size), strict=True))
            for name in ("ih", "hh")
        }

        def both(gate: str, h: Tensor) -> Tensor:
            a, b = x @ split["ih"][gate].T, h @ split["hh"][gate].T
            return self.norm(cell, "ih", gate, a, t) + self.norm(cell, "hh", gate, b, t)

        if gates == ("h",):
            return (torch.tanh(both("h", state[0])),)
        if gates == ("r", "z", "h"):
            (h,) = state
            r, z = torch.sigmoid(both("r", h)), torch.sigmoid(both("z", h))
            return (z * torch.tanh(both("h", h * r)) + (1 - z) * h,)
        h, c = state
        i, f, g, o = (both(gate, h) for gate in gates)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def direction(
        self, cell: str, xs: list[Tensor], state: tuple[Tensor, ...], from_the_end: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """``xs`` by sequence ``(T_i, features)``, longest first -> outputs likewise and last states. From the end: each
        is reversed by itself."""
        if from_the_end:
            outputs, final = self.direction(cell, [x.flip(0) for x in xs], state, False)
            return [output.flip(0) for output in outputs], final
        lengths = [len(x) for x in xs]
        now = [list(part.unbind(0)) for part in state]
        outputs: list[list[Tensor]] = [[] for _ in xs]
        for t in range(max(lengths)):
            alive = sum(length > t for length in lengths)
            rows = torch.stack([x[t] for x in xs[:alive]])
            made = self.step(cell, rows, tuple(torch.stack(part[:alive]) for part in now), t)
            for part, new in zip(now, made, strict=True):
                part[:alive] = new.unbind(0)
            for output, h in zip(outputs, made[0].unbind(0), strict=False):
                output.append(h)
        return [torch.stack(output) for output in outputs], tuple(torch.stack(part) for part in now)

    def run(self, xs: list[Tensor], state: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """All layers and directions; ``state`` parts are ``(layers * directions, n, hidden)``."""
        finals, ways = [], 2 if self.net.bidirectional else 1
        for layer in range(self.net.num_layers):
            parts = []
            for way in range(ways):
                i = layer * ways + way
                cell = f"l{layer}{'_reverse' if way else ''}"
                outputs, final = self.direction(cell, xs, tuple(part[i] for part in state), way == 1)
                parts.append(outputs)
                finals.append(final)
            xs = [torch.cat(both, 1) for both in zip(*parts, strict=True)]
        return xs, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def update(self, rate: float) -> None:
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=rate)
                    parameter.grad = None
        for oracle in self.oracles.values():
            oracle.update()


@dataclass
class RecurrentHistory:
    """What happens to one network, drawn from ``seed``; ``noise``: which draw of errors its second account has; None:
    there is none."""

    seed: int
    noise: int | None = None
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.kind = rng.choice(list(KINDS))
        make = rng.choice((sn.NormRNN, sn.NormGRU, sn.NormLSTM))
        options = {"num_layers": rng.choice((1, 1, 2)), "bidirectional": rng.random() < 0.4}
        self.net: Any = make(2, 3, norm=KINDS[self.kind][0], **options).double()
        for parameter in self.net.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0, generator=self._generator())
        policy = next(module.policy for module in self.net.modules() if isinstance(module, sn.Norm))
        self.plain = [Plain(self.net, self.kind, policy.trust) for _ in range(1 if self.noise is None else 2)]
        self.draw = torch.Generator().manual_seed(self.noise or 0)
        self.trained = False
        self.told.append(f"{make.__name__} {options}, {self.kind}")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(1 << 30))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator(), dtype=torch.float64)

    def _off(self, x: Tensor) -> Tensor:
        return x + DISTURBED * EPS * x.abs().max() * (torch.rand(x.shape, generator=self.draw, dtype=x.dtype) * 2 - 1)

    def run(self, events: int = 8) -> None:
        """
        Raises:
            DifferenceError: at the first one, after everything that led to it.
        """
        backend = self.rng.choice((None, None, None, "eager", "generic"))
        self.told.append(f"backend {backend}")
        try:
            with using(backend):
                for _ in range(events):
                    event = self.rng.choice(("train", "train", "train", "update", "update", "test", "copied", "loaded"))
                    self.told.append(event)
                    getattr(self, f"_{event}")()
                    self._compare_state()
        except Exception as error:
            raise DifferenceError(f"history {self.seed}: " + "; ".join(self.told) + f"\n{error}") from error

    def _batch(self) -> tuple[list[Tensor], bool, tuple[Tensor, ...] | None]:
        """Sequences, longest first; whether they are to be packed; a state or none."""
        rng, n = self.rng, self.rng.choice((2, 3, 4))
        packed = rng.random() < 0.5
        longest = rng.choice((1, 2, 4))
        lengths = sorted((rng.randint(1, longest) for _ in range(n)), reverse=True) if packed else [longest] * n
        if packed and self.kind != "sample":  # batch normalization asks for two sequences at every step
            lengths[1] = lengths[0]
        xs = [self._random(length, 2) for length in lengths]
        self.told[-1] += f" {lengths}"
        parts = 2 if isinstance(self.net, sn.NormLSTM) else 1
        shape = len(self.net.cells), n, 3
        return xs, packed, None if rng.random() < 0.3 else tuple(self._random(*shape) for _ in range(parts))

    def _through(
        self, xs: list[Tensor], packed: bool, state: tuple[Tensor, ...] | None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        x = pack_sequence(xs) if packed else torch.stack(xs, 1)
        hx = None if state is None else state[0] if len(state) == 1 else state
        y, final = self.net(x, hx)
        ys = unpack_sequence(y) if isinstance(y, PackedSequence) else list(y.unbind(1))
        return ys, final if isinstance(final, tuple) else (final,)

    def _train(self) -> None:
        self.net.train()
        xs, packed, state = self._batch()
        leaves = [x.clone().requires_grad_() for x in xs]
        starts = None if state is None else tuple(part.clone().requires_grad_() for part in state)
        ys, final = self._through(leaves, packed, starts)
        dys, dfinal = [self._random(*y.shape) for y in ys], [self._random(*part.shape) for part in final]

        def back(outputs: list[Tensor], last: tuple[Tensor, ...], off: Callable[[Tensor], Tensor]) -> None:
            loss = sum((y * off(dy)).sum() for y, dy in zip(outputs, dys, strict=True))
            (loss + sum((part * off(d)).sum() for part, d in zip(last, dfinal, strict=True))).backward()  # type: ignore[union-attr]

        back(ys, final, lambda x: x)
        wanted: list[dict[str, Tensor]] = []
        for plain, off in zip(self.plain, (lambda x: x.clone(), self._off), strict=False):
            plain.training = True
            mine = [off(x).requires_grad_() for x in xs]
            shape = len(self.net.cells), len(xs), 3
            begun = tuple(torch.zeros(shape, dtype=torch.float64) for _ in final) if state is None else state
            begin = tuple(off(part).requires_grad_() for part in begun)
            outputs, last = plain.run(mine, begin)
            back(outputs, last, off)
            one = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
            one |= {f"state {i}": part.detach() for i, part in enumerate(last)}
            one |= {f"dx {i}": _given(x.grad) for i, x in enumerate(mine)}
            if state is not None:
                one |= {f"dstate {i}": _given(part.grad) for i, part in enumerate(begin)}
            wanted.append(one | {name: _given(p.grad).clone() for name, p in plain.parameters.items()})
        got = {f"output {i}": y for i, y in enumerate(ys)} | {f"state {i}": part for i, part in enumerate(final)}
        got |= {f"dx {i}": _given(x.grad) for i, x in enumerate(leaves)}
        got |= {f"dstate {i}": _given(part.grad) for i, part in enumerate(starts or ())}
        got |= {name: _given(p.grad) for name, p in self.net.named_parameters()}
        for name, value in got.items():
            compare(name, value, [one[name] for one in wanted])
        self.trained = True

    def _test(self) -> None:
        if not self.trained:
            return
        self.net.eval()
        xs, packed, state = self._batch()
        ys, final = self._through(xs, packed, state)
        wanted = []
        with torch.no_grad():
            for plain, off in zip(self.plain, (lambda x: x, self._off), strict=False):
                plain.training = False
                shape = len(self.net.cells), len(xs), 3
                begun = tuple(torch.zeros(shape, dtype=torch.float64) for _ in final) if state is None else state
                wanted.append(plain.run([off(x) for x in xs], tuple(map(off, begun))))
        for i, y in enumerate(ys):
            compare(f"output {i} in testing", y, [outputs[i] for outputs, _ in wanted])
        for i, part in enumerate(final):
            compare(f"state {i} in testing", part, [last[i] for _, last in wanted])

    def _update(self) -> None:
        rate = 0.05
        with torch.no_grad():
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=rate)
                    parameter.grad = None
        for module in self.net.modules():
            if isinstance(module, sn.Norm):
                module.fold()
        for plain in self.plain:
            plain.update(rate)

    def _replaced(self, net: Any) -> None:
        for mine, other in zip(net.parameters(), self.net.parameters(), strict=True):
            mine.grad = None if other.grad is None else other.grad.clone()
        self.net = net
        for plain in self.plain:
            plain.net = net

    def _copied(self) -> None:
        self._replaced(copy.deepcopy(self.net))

    def _loaded(self) -> None:
        net = self.net
        options = {"num_layers": net.num_layers, "bidirectional": net.bidirectional}
        fresh = type(net)(2, 3, norm=KINDS[self.kind][0], **options).double()
        fresh.load_state_dict(net.state_dict())
        self._replaced(fresh)

    def _compare_state(self) -> None:
        for (cell, path, gate, t), oracle in self.plain[0].oracles.items():
            other = self.plain[-1].oracles[cell, path, gate, t]
            norm = getattr(self.net.cells[cell], f"norm_{path}")[gate]
            norm = norm.times[t] if isinstance(norm, TimeSpecificNorm) else norm
            if oracle.estimate is None or norm.H1 is None:
                continue
            place = f"{cell} {path} {gate} {t}"
            compare(f"{place} estimate", norm.H1.estimate, [oracle.estimate, other.estimate])
            for which in ("H1", "H2") if oracle.streams else ():
                mine, theirs = getattr(oracle, which), getattr(other, which)
                for name in MEMBERS[type(mine)]:
                    wanted = [torch.as_tensor(getattr(H, name)) for H in (mine, theirs)]
                    compare(f"{place} {which}.{name}", getattr(norm, which).state()[name], wanted)


def _given(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise DifferenceError("a gradient did not arrive")
    return grad
