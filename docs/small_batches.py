"""Draws small-batches.png, the picture of the guide: what a normalized neuron still tells about its input.

``python docs/small_batches.py`` takes a few seconds and needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import streamnorm

PICTURE = Path(__file__).parent / "small-batches.png"
SAMPLES, PER_UPDATE = 512, 16


def batch(x: Tensor, size: int) -> Tensor:
    """What batch normalization makes in training of ``x (n, 1)`` in mini-batches of so many samples."""
    layer = streamnorm.BatchNorm(1, affine=False)
    return torch.cat([layer(part) for part in x.split(size)])


def streaming(x: Tensor) -> Tensor:
    """What streaming normalization makes of it, one sample a batch, after it has seen as many other samples."""
    layer = streamnorm.StreamingNorm(1, affine=False)
    outputs = []
    for samples in (torch.randn_like(x), x):
        outputs.append([])
        for cycle in samples.split(PER_UPDATE):
            outputs[-1] += [layer(sample) for sample in cycle.split(1)]
            layer.fold()
    return torch.cat(outputs[-1])


def main(path: Path = PICTURE) -> None:
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 1)
    panels = {f"batch, {size} samples": batch(x, size) for size in (64, 4, 2)}
    panels["streaming, 1 sample"] = streaming(x)
    figure = Figure(figsize=(11, 3.2), dpi=130, facecolor="white", layout="constrained")
    for axes, (title, y) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.plot([-3, 3], [-3, 3], color="#bbbbbb", linewidth=1, zorder=0)
        axes.scatter(x, y, s=9, color="#c2410c" if title.startswith("batch") else "#1d4ed8", alpha=0.5, linewidths=0)
        axes.set(title=title, xlabel="into the layer", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("out of the layer")
    figure.savefig(path)


if __name__ == "__main__":
    main()
