"""Run: everything that decides what a training run computes, as a frozen dataclass. Imports the standard library alone.

The command line is derived from it, a record of results repeats it, and a checkpoint is refused by another one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self


@dataclass(frozen=True)
class Described:
    """A frozen dataclass of settings that can be written as JSON and read again."""

    KIND: ClassVar[str] = "a run of this version"

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The run that ``to_json`` described.

        Raises:
            ValueError: for a field that a run of this version does not have.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.KIND} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        fields_: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields_)


@dataclass(frozen=True)
class Settings(Described):
    """What the arms of a comparison have in common.

    Attributes:
        data: digits, which needs no files, mnist or cifar10.
        architecture: A, fully connected, or B, convolutional (paper, Figure 2; ours in every number).
        width: features of the first layer; B doubles them in its second stage.
        p: order of the moment.
        center: batch (Setting A), estimate (B), zero (C); None: estimate for streaming arms, batch for others.
        alpha: of streaming arms.
        beta: of streaming arms.
        kappa: of streaming arms; None: (alpha1, alpha2, alpha1, alpha2).
        samples_per_batch: m, S/B.
        batches_per_update: n, B/U.
        epochs: passes over the training data; what does not fill a last cycle is left out.
        learning_rate: of SGD; a tenth of it in the last sixth of the updates (the paper's 25 : 5 epochs).
        momentum: of SGD.
        weight_decay: of SGD.
        warmup: cycles of forward passes alone, before the first update; None: 4 where streaming references are tiny.
        train_limit: train on so many samples only, the first of the file.
        test_limit: test on so many samples only, the first of the file.
    """

    data: str = "digits"
    architecture: Literal["A", "B"] = "A"
    width: int = 128
    p: float = 2.0
    center: Literal["batch", "estimate", "zero"] | None = None
    alpha: tuple[float, float] = (0.7, 0.3)
    beta: tuple[float, float, float] = (0.7, 0.3, 0.0)
    kappa: tuple[float, float, float, float] | None = None
    samples_per_batch: int = 1
    batches_per_update: int = 32
    epochs: int = 10
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "samples_per_batch", "batches_per_update", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is a whole number >= 1, got {value!r}")
        if self.architecture not in ("A", "B"):
            raise ValueError(f'architecture is "A" (fully connected) or "B" (convolutional), got {self.architecture!r}')
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is a finite number >= 0, got {value!r}")
        if self.warmup is not None and (not isinstance(self.warmup, int) or self.warmup < 0):
            raise ValueError(f"warmup is a number of cycles >= 0, got {self.warmup!r}")

    @property
    def samples_per_update(self) -> int:
        """m n."""
        return self.samples_per_batch * self.batches_per_update


@dataclass(frozen=True)
class Run(Settings):
    """One training run. The same seed gives the same initial weights and the same order of data to every arm.

    Attributes:
        arm: the normalization: none, layer, instance, group, rms, batch, streaming, or a reference of the paper with
            -S for its streaming form (BA6-S) or -B for the one without a stream (BA6-B, SP3-B). Without a map
            (architecture A) BA1, BA4 and BA6 are one, and so are SP2, SP3 and SP5, and BA2, BA3 and BA5.
        seed: of weights and order.

    >>> Run(arm="batch", samples_per_batch=64, batches_per_update=1).label
    'batch 64 S/B x 1 B/U'
    """

    arm: str = "streaming"
    seed: int = 0

    @property
    def label(self) -> str:
        """What a table calls this run."""
        return f"{self.arm} {self.samples_per_batch} S/B x {self.batches_per_update} B/U"
