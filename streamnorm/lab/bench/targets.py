"""What the layers aim at: ratios of forward and backward together, or of the memory of a step, at two threads of a CPU,
with memory kept by the process.

Imports the standard library.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

THREADS = 2
"""The targets are for this many."""


@dataclass(frozen=True)
class Target:
    """At most so many times the reference's time, or its memory.

    Attributes:
        group: of the cases; ``cases`` says which of them, a part of their names.
        variant, reference: the ratio of these two.
        mean: for the geometric mean over cases.
        worst: for each case.
        words: what is shown in the place of the ratio.
        of: what the ratio is of, the time of a step or the most bytes that it holds.
    """

    group: str
    variant: str
    reference: str
    mean: float
    worst: float | None = None
    cases: str = ""
    words: str = ""
    of: Literal["time", "peak"] = "time"

    def __str__(self) -> str:
        parts = [f"{self.words or f'≤ {self.mean:.2f}'}"]
        parts += [f"worst ≤ {self.worst:.2f}"] if self.worst is not None else []
        parts += ["peak memory"] if self.of == "peak" else []
        return ", ".join(parts)

    def met(self, ratios: Sequence[float]) -> bool:
        """The verdict on the medians of its cases."""
        return geometric_mean(ratios) <= self.mean and (self.worst is None or max(ratios) <= self.worst)


BN1, BN2, LAYER = "nn.BatchNorm1d", "nn.BatchNorm2d", "nn.LayerNorm"
BOTH = ("default", "full")
"""The layer as it comes, and the paper's rule."""
TARGETS = (
    *(Target("contiguous", ours, BN2, 0.35, 0.60) for ours in BOTH),
    Target("contiguous", "one-pass", BN2, 0.25, 0.45),
    *(Target("contiguous", f"{ours} eager", BN2, 0.70) for ours in BOTH),
    *(Target("channels_last", ours, BN2, 0.80, 1.0) for ours in BOTH),
    Target("channels_last", "one-pass", BN2, 0.48),
    Target("bfloat16", "one-pass", BN2, 0.55, cases="contiguous"),
    Target("bfloat16", "one-pass", BN2, 0.45, cases="channels last"),
    *(Target("features", ours, BN1, 0.55) for ours in BOTH),
    Target("features", "one-pass", BN1, 0.50),
    *(Target("features", ours, LAYER, 0.95) for ours in BOTH),
    *(Target("single", ours, LAYER, 1.12, cases="1x1024") for ours in ("default", "full B")),
    Target("online", "streaming", LAYER, 1.02),
    Target("online", "streaming fused", LAYER, 1 / 5, words="≤ 0.20, 5 times the steps a second"),
    Target("monitor", "watched", "alone", 1.05, 1.05),
    Target("recurrent", "streaming", "nn.GRU", 0.42, cases="GRU 100"),
    Target("recurrent", "streaming", "nn.GRU", 0.66, cases="GRU 512"),
    Target("recurrent", "streaming", "layer norm loop", 0.33, cases="GRU 100"),
    Target("recurrent", "streaming", "layer norm loop", 0.45, cases="GRU 512"),
    Target("recurrent", "streaming", "nn.RNN", 0.50, cases="RNN 100"),
    Target("recurrent", "streaming", "nn.RNN", 0.80, cases="RNN 512"),
    Target("cycle", "streaming 1 x 64 vectorized", "nn.BatchNorm1d 64 x 1", 1.00, cases="epoch"),
    *(Target("compiled", ours, LAYER, 1.05, cases="Linear") for ours in ("default", "full B")),
    *(
        Target("compiled", ours, BN2, 0.95, cases=f"ReLU], 16x3x64x64 {layout}")
        for ours in BOTH
        for layout in ("contiguous", "channels last")
    ),
    *(Target("resnet", ours, BN2, 0.95) for ours in BOTH),
    *(Target("resnet", f"{ours} compiled", f"{BN2} compiled", 1.00) for ours in BOTH),
    *(Target("resnet", ours, BN2, 1.00, of="peak") for ours in BOTH),
    *(Target("resnet", f"{ours} compiled", f"{BN2} compiled", 1.00, of="peak") for ours in BOTH),
)


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios: the one that stays the same when the two sides change places.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return round(statistics.geometric_mean(values), 12)
