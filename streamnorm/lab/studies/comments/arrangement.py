"""Architecture B with its normalizations in other places, and without what stands beside them. Imports the trainer.

In B as it is, a normalization with gain and bias follows convolutions, and ReLU follows it. Here it may stand right
before each convolution, with no gain and no bias: behind ReLU within the blocks, on the sum at the transition, on the
image at the stem. The convolution has weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.models import Block, Convolutional, norm_factory
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.nn.norm import Norm, norms

AFTER, BEFORE = "after, gain and bias", "before, bias of the convolution"
BARE_AFTER, BARE_BEFORE = "after, nothing", "before, nothing"


def as_it_is(model: Convolutional, run: Run) -> None:
    """Convolution, normalization, gain and bias, ReLU."""


def bare(model: Convolutional, run: Run) -> None:
    """Convolution, normalization, ReLU."""
    for layer in norms(model):
        layer.affine = None


def before(model: Convolutional, run: Run) -> None:
    """ReLU, normalization, convolution. The read-out has one too: a mean over places and a linear layer are one."""
    norm, read_out = norm_factory(run), model[-1]
    assert isinstance(read_out, nn.Linear)

    def rearranged(layers: nn.Sequential) -> nn.Sequential:
        kept: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                kept.append(norm(layer.in_channels))
            elif isinstance(layer, nn.AdaptiveAvgPool2d):
                kept.append(norm(read_out.in_features))
            if not isinstance(layer, Norm):
                kept.append(layer)
        return nn.Sequential(*kept)

    for i, stage in enumerate(model):
        if isinstance(stage, Block):
            stage.branch = rearranged(stage.branch)
        elif isinstance(stage, nn.Sequential):
            model[i] = rearranged(stage)
    bare(model, run)


def before_with_bias(model: Convolutional, run: Run) -> None:
    """ReLU, normalization, convolution with a bias, which begins at 0."""
    before(model, run)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))


ARRANGEMENTS: dict[str, Callable[[Convolutional, Run], None]] = {
    AFTER: as_it_is,
    BEFORE: before_with_bias,
    BARE_AFTER: bare,
    BARE_BEFORE: before,
}
"""Where the normalization stands, and what is learned beside the weights; each changes a network before training."""


@dataclass(frozen=True)
class ArrangedRun(Run):
    """A run of architecture B with batch normalization in one of the ``ARRANGEMENTS``."""

    arrangement: str = AFTER

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arrangement not in ARRANGEMENTS:
            known = ", ".join(map(repr, ARRANGEMENTS))
            raise ValueError(f"arrangement is one of {known}, got {self.arrangement!r}")
        if (self.architecture, self.arm) != ("B", "batch"):
            raise ValueError(
                f"arrangements are of architecture B and the arm 'batch', got {self.architecture!r} and {self.arm!r}"
            )


class ArrangedTrainer(Trainer):
    """A run under way in its arrangement. The weights begin as those of B do."""

    def network(self, run: Run, data: Data) -> nn.Module:
        assert isinstance(run, ArrangedRun)
        model = super().network(run, data)
        assert isinstance(model, Convolutional)
        ARRANGEMENTS[run.arrangement](model, run)
        return model
