"""The networks of the paper's Figure 2, and the arms: which normalization stands in them. Imports the layers.

The paper shows the networks in a picture that no public text preserves; every number here is ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from streamnorm.definition.operation import Scale
from streamnorm.definition.ref import BA1, REFS, SP1, SP2, NormRef
from streamnorm.definition.stats import Lp
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.nn.affine import Affine
from streamnorm.nn.norm import Norm
from streamnorm.nn.recurrent.cells import at
from streamnorm.nn.rivals import BatchRenorm, OnlineNorm
from streamnorm.nn.timespecific import TimeSpecific
from streamnorm.stream.policy import Batch, Evidence, Policy, Sample, Streaming

NormFactory = Callable[[int], nn.Module]
GROUPS = 8
"""Groups of the arm ``group``."""

PEERS: dict[str, NormFactory] = {"batchrenorm": BatchRenorm, "onlinenorm": OnlineNorm}
"""Arms that are a layer as it comes."""

ARMS: dict[str, NormRef | None] = {
    "none": None,
    "layer": SP2,
    "instance": SP1,
    "group": NormRef(GROUPS, "all", "one"),
    "rms": SP2,
    "batch": BA1,
    "tsbn": BA1,
    "streaming": BA1,
    "paper": BA1,
    "default": BA1,
    **dict.fromkeys(PEERS, BA1),
    **{f"{name}-{form}": ref for name, ref in REFS.items() for form in "BS"},
    **{f"{name}-T": ref for name, ref in REFS.items() if ref.samples == "batch"},
}
"""Every arm by name with its reference.

``streaming`` and ``paper`` are the paper's rule with alpha, beta and kappa, ``default`` the one of ``Evidence``, whose
memory counts samples. ``-B`` is the batch (or sample) form of a reference, ``-S`` its streaming one. Where a layer is
called at several time steps, ``batch`` is the paper's original BN, whose running estimate all steps share, and ``tsbn``
keeps an estimate for each step under a shared gain and bias (section 4.2); ``-T`` does so with any reference."""


def norm_factory(run: Run) -> NormFactory:
    """``c -> layer`` for the arm of a run: a normalization with its gain and bias (``none``: gain and bias alone).

    Raises:
        ValueError: for an unknown arm.
    """
    if run.arm not in ARMS:
        near = difflib.get_close_matches(run.arm, ARMS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown arm {run.arm!r}; {hint}the arms are {', '.join(ARMS)}")
    ref = ARMS[run.arm]
    if ref is None:
        return Affine
    if run.arm == "rms":
        return lambda c: Norm(c, ref, Lp(2, "zero"), Sample(), affine=True, op=Scale())
    if run.arm in PEERS:
        return PEERS[run.arm]
    streams = run.arm in ("streaming", "paper", "default") or run.arm.endswith("-S")
    policy: Policy = Sample() if ref.samples == "one" else Batch()
    if streams:
        policy = Evidence() if run.arm == "default" else Streaming(run.alpha, run.beta, run.kappa)
    moment = Lp(run.p, run.center or ("estimate" if streams else "batch"))

    def norm(c: int) -> Norm:
        return Norm(c, ref, moment, policy, affine=True)

    return TimeSpecific(norm) if run.arm == "tsbn" or run.arm.endswith("-T") else norm


class FullyConnected(nn.Sequential):
    """Architecture A: three times [linear without bias, norm, gain and bias, ReLU], then a linear read-out.

    ``x (n, *shape) -> (n, classes)``
    """

    def __init__(self, inputs: int, classes: int, norm: NormFactory, width: int, depth: int = 3) -> None:
        sizes = [inputs, *[width] * depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after, bias=False), norm(after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, classes))


class Block(nn.Module):
    """A residual block: ``h + W2 * ReLU(Norm(W1 * ReLU(Norm(h))))``."""

    def __init__(self, features: int, norm: NormFactory) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            norm(features), nn.ReLU(), _conv(features, features), norm(features), nn.ReLU(), _conv(features, features)
        )

    def forward(self, h: Tensor, t: int = 0) -> Tensor:
        branch = h
        for layer in self.branch:
            branch = at(layer, branch, t)
        return h + branch


class Convolutional(nn.Sequential):
    """Architectures B and C: stem, residual block, transition to half the map and twice the features, second block.

    ``x (n, channels, height, width) -> (n, classes)``. In C(k1, k2) the blocks are applied k1 and k2 times with the
    same weights and the same norms, as recurrent networks; C(1, 1) is B.

    >>> from streamnorm import StreamingNorm
    >>> Convolutional(3, 10, StreamingNorm, 4, loops=(2, 3))(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, channels: int, classes: int, norm: NormFactory, width: int, loops: tuple[int, int] = (1, 1)
    ) -> None:
        if len(loops) != 2 or min(loops) < 1:
            raise ValueError(f"loops is how often each of the two blocks is applied, both >= 1, got {loops!r}")
        super().__init__(
            nn.Sequential(_conv(channels, width), norm(width), nn.ReLU()),
            Block(width, norm),
            nn.Sequential(_conv(width, 2 * width, stride=2), norm(2 * width), nn.ReLU()),
            Block(2 * width, norm),
            nn.Sequential(norm(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(2 * width, classes),
        )
        self.loops = tuple(loops)

    def forward(self, input: Tensor) -> Tensor:
        x, loops = input, iter(self.loops)
        for stage in self:
            if isinstance(stage, Block):
                for t in range(next(loops)):
                    x = stage(x, t)
            else:
                x = stage(x)
        return x


class FullyRecurrent(nn.Module):
    """Architecture D(k): three states of maps, each renewed from all three at each of k time steps.

    ::

        h_i <- h_i + sum_j T_ji(h_j)        T = Norm, ReLU, convolution, to the size and the features of state i

    ``x (n, channels, height, width) -> (n, classes)``, height and width multiples of 4. The states have 1, 2 and 4
    times ``width`` features on maps of the whole, half and a quarter of the input's side; the image enters the first
    one, the last one is read out. Weights and norms are shared by the time steps.

    >>> from streamnorm import StreamingNorm
    >>> FullyRecurrent(3, 10, StreamingNorm, 4, steps=2)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    STATES = 3

    def __init__(self, channels: int, classes: int, norm: NormFactory, width: int, steps: int = 5) -> None:
        super().__init__()
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is a number of time steps >= 1, got {steps!r}")
        self.steps = steps
        self.features = [width << i for i in range(self.STATES)]
        self.enter = nn.Sequential(_conv(channels, width), norm(width), nn.ReLU())
        self.transitions = nn.ModuleDict(
            {
                f"{j}to{i}": nn.Sequential(norm(self.features[j]), nn.ReLU(), self._resize(j, i))
                for i in range(self.STATES)
                for j in range(self.STATES)
            }
        )
        last = self.features[-1]
        self.read = nn.Sequential(
            norm(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)
        )

    def _resize(self, j: int, i: int) -> nn.Module:
        """The convolution of T_ji: with a stride to a smaller map, after an enlargement to a larger one."""
        convolution = _conv(self.features[j], self.features[i], stride=max(1, 1 << (i - j)) if i > j else 1)
        return nn.Sequential(nn.Upsample(scale_factor=1 << (j - i)), convolution) if j > i else convolution

    def forward(self, x: Tensor) -> Tensor:
        expect_quarters(x)
        n, _, height, width = x.shape
        h = [self.enter(x)]
        for i in range(1, self.STATES):
            h.append(h[0].new_zeros(n, self.features[i], height >> i, width >> i))
        for t in range(self.steps):
            added = [
                torch.stack([self._transition(j, i, h[j], t) for j in range(self.STATES)]).sum(0)
                for i in range(self.STATES)
            ]
            h = [old + new for old, new in zip(h, added, strict=True)]
        return self.read(h[-1])

    def _transition(self, j: int, i: int, h: Tensor, t: int) -> Tensor:
        norm, relu, convolution = self.transitions[f"{j}to{i}"]  # type: ignore[misc]
        return convolution(relu(at(norm, h, t)))


def expect_quarters(x: Tensor) -> None:
    """Raise unless a map ``(..., height, width)`` can be halved twice."""
    height, width = x.shape[-2:]
    if height % 4 or width % 4:
        raise ValueError(f"architecture D halves maps twice: height and width are multiples of 4, got {tuple(x.shape)}")


def _conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1, bias=False)


def build(run: Run, sample: Tensor, classes: int) -> nn.Module:
    """The network of a run for inputs like ``sample (c, *place)``, its weights drawn from the run's seed.

    Raises:
        ValueError: for an unknown arm, or inputs that the architecture does not take.
    """
    norm = norm_factory(run)
    if run.architecture != "A" and sample.ndim != 3:
        raise ValueError(
            f"architecture {run.architecture} takes images (c, height, width), got {tuple(sample.shape)}; use A"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        if run.architecture == "A":
            model: nn.Module = FullyConnected(sample.numel(), classes, norm, run.width)
        elif run.architecture == "D":
            expect_quarters(sample)
            model = FullyRecurrent(sample.shape[0], classes, norm, run.width, *run.loops)
        else:
            model = Convolutional(sample.shape[0], classes, norm, run.width, run.loops or (1, 1))  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model
