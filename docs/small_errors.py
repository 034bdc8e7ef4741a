"""Draws small-errors.png, the picture of the README: test errors by the samples of a batch, read from their record.

``python docs/small_errors.py`` needs matplotlib.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PICTURE = HERE / "small-errors.png"
RECORD = HERE / "results/2026-11-30-smallbatch.md"
ROW = re.compile(r"^\| short ([AB]) (\w+) (\d+) x \d+ \| \d+ \| ([\d.]+) ± ([\d.]+) \|", re.MULTILINE)
NETWORKS = {"A": "fully connected, 64 samples an update", "B": "convolutional, 32 samples an update"}
ARMS = {"batch": "nn.BatchNorm", "group": "nn.GroupNorm, the same at any batch", "default": "StreamingNorm(c)"}
COLORS = {"batch": "#0072b2", "group": "#009e73", "default": "#d55e00"}


def errors() -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """Of each network and arm: samples a batch, test error and its deviation over seeds, in per cent."""
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for network, arm, samples, mean, sd in ROW.findall(RECORD.read_text()):
        found.setdefault((network, arm), []).append((int(samples), 100 * float(mean), 100 * float(sd)))
    return {key: sorted(rows) for key, rows in found.items()}


def main(path: Path = PICTURE) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    figure.supylabel("test error, %", fontsize=10)
    measured = errors()
    for axis, (network, title) in zip(axes, NETWORKS.items(), strict=True):
        for arm, label in ARMS.items():
            samples, means, sds = zip(*measured[network, arm], strict=True)
            if arm == "group":
                axis.axhline(means[0], color=COLORS[arm], linestyle="--", label=label)
                continue
            axis.errorbar(samples, means, sds, color=COLORS[arm], marker="o", capsize=3, label=label)
        axis.set(xscale="log", xlabel="samples a batch", xticks=(1, 2, 4, 8, 32), xticklabels=(1, 2, 4, 8, 32))
        axis.set_title(title, fontsize=10, loc="left")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
