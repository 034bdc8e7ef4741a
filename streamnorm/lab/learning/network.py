"""The network that learns from a stream, and how it grows while it does. Imports the arms.

Legend: ``c`` features of a layer, ``d`` inputs, ``k`` outputs.
"""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.lab.learning.arms import norm_of
from streamnorm.train.growing import grow


class Drawn:
    """Initial weights by what they are for: the same seed gives every network the same, in whatever order it grows.

    >>> torch.equal(Drawn(0).weights("first", 2, 3, fan_in=3), Drawn(0).weights("first", 2, 3, fan_in=3))
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def weights(self, name: str, rows: int, columns: int, fan_in: int) -> Tensor:
        """``(rows, columns)`` from -1 / sqrt(fan_in) to 1 / sqrt(fan_in), as nn.Linear draws them."""
        random = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return (2 * torch.rand(rows, columns, generator=random) - 1) / math.sqrt(fan_in)


class Network:
    """``depth`` times [linear without bias, norm, ReLU], then a linear read-out; ``none`` has biases in place of norms.

    Args:
        arm: the name of the normalization.
        inputs: d, for which there are weights from the beginning.
        width, depth: of the hidden layers.
        drawn: where the weights come from.

    Attributes:
        model: ``x (n, d) -> (n, k)``, k = 1 at first.

    >>> network = Network("layer", 3, 8, 2, Drawn(0))
    >>> network.grow_outputs(4), network.model(torch.randn(5, 3)).shape
    (None, torch.Size([5, 4]))
    """

    def __init__(self, arm: str, inputs: int, width: int, depth: int, drawn: Drawn) -> None:
        norm = norm_of(arm)
        self._drawn, self._fan_in, self._width = drawn, inputs, width
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise([inputs, *[width] * depth])):
            layer = norm(after)
            linear = nn.Linear(before, after, bias=isinstance(layer, nn.Identity))
            with torch.no_grad():
                linear.weight.copy_(drawn.weights(f"layer {i}", after, before, before))
                if linear.bias is not None:
                    linear.bias.zero_()
            layers += [linear, *([] if isinstance(layer, nn.Identity) else [layer]), nn.ReLU()]
        self.readout = nn.Linear(width, 1)
        with torch.no_grad():
            self.readout.weight.copy_(self._output(0))
            self.readout.bias.zero_()
        self.model = nn.Sequential(*layers, self.readout)
        self.first = layers[0]

    def grow_outputs(self, to: int, optimizer: Optimizer | None = None) -> None:
        """Outputs until there are ``to``, each with weights of its own; the others stay as they are."""
        new = range(self.readout.out_features, to)
        if new:
            grow(self.readout, "weight", torch.cat([self._output(k) for k in new]), 0, optimizer)
            grow(self.readout, "bias", torch.zeros(len(new)), 0, optimizer)
            self.readout.out_features = to

    def grow_inputs(self, to: int, optimizer: Optimizer | None = None) -> None:
        """Inputs until there are ``to``, in one step: few of the new ones are other than 0 at a time, so that their
        weights are drawn as if there were none."""
        assert isinstance(self.first, nn.Linear)
        more = to - self.first.in_features
        if more > 0:
            weights = self._drawn.weights("words", self._width, more, self._fan_in)
            grow(self.first, "weight", weights, 1, optimizer)
            self.first.in_features = to

    def _output(self, k: int) -> Tensor:
        return self._drawn.weights(f"output {k}", 1, self._width, self._width)
