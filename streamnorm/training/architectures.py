"""The networks of the paper's Figure 2, and the arms: which normalization stands in them. Imports the layers.

The paper shows the networks in a picture that no public text preserves; every number here is ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from streamnorm.layers import Affine, Norm
from streamnorm.normop import Scale
from streamnorm.normref import BA1, REFS, SP1, SP2, NormRef
from streamnorm.normstats import Lp
from streamnorm.policy import Batch, Policy, Sample, Streaming
from streamnorm.training.run import Run

NormFactory = Callable[[int], nn.Module]
GROUPS = 8
"""Groups of the arm ``group``."""

ARMS: dict[str, NormRef | None] = {
    "none": None,
    "layer": SP2,
    "instance": SP1,
    "group": NormRef(GROUPS, "all", "one"),
    "rms": SP2,
    "batch": BA1,
    "streaming": BA1,
    **{f"{name}-{form}": ref for name, ref in REFS.items() for form in "BS"},
}
"""Every arm by name with its reference.

``-B`` is the batch (or sample) form of a reference, ``-S`` its streaming one."""


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
    streams = run.arm == "streaming" or run.arm.endswith("-S")
    policy: Policy = Sample() if ref.samples == "one" else Batch()
    if streams:
        policy = Streaming(run.alpha, run.beta, run.kappa)
    moment = Lp(run.p, run.center or ("estimate" if streams else "batch"))
    return lambda c: Norm(c, ref, moment, policy, affine=True)


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

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


class Convolutional(nn.Sequential):
    """Architecture B: stem, a residual block, a transition to half the map and twice the features, a second block.

    ``x (n, channels, height, width) -> (n, classes)``
    """

    def __init__(self, channels: int, classes: int, norm: NormFactory, width: int) -> None:
        super().__init__(
            nn.Sequential(_conv(channels, width), norm(width), nn.ReLU()),
            Block(width, norm),
            nn.Sequential(_conv(width, 2 * width, stride=2), norm(2 * width), nn.ReLU()),
            Block(2 * width, norm),
            nn.Sequential(norm(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(2 * width, classes),
        )


def _conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1, bias=False)


def build(run: Run, sample: Tensor, classes: int) -> nn.Module:
    """The network of a run for inputs like ``sample (c, *place)``, its weights drawn from the run's seed.

    Raises:
        ValueError: for an unknown arm, or architecture B on inputs that are no images.
    """
    norm = norm_factory(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        if run.architecture == "A":
            model: nn.Module = FullyConnected(sample.numel(), classes, norm, run.width)
        elif sample.ndim == 3:
            model = Convolutional(sample.shape[0], classes, norm, run.width)
        else:
            raise ValueError(f"architecture B takes images (c, height, width), got {tuple(sample.shape)}; use A")
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model
