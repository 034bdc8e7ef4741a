"""AutoencoderRun: everything that decides what the training of an auto-encoder computes, as a frozen dataclass.

Imports what all runs have in common. The defaults are those of the first experiment with layer normalization on a
stream (seed 000): 1,992 inputs, 128 ReLU units, a constant learning rate, two epochs, one sample an update. The command
line is derived from it, and a checkpoint is refused by another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from streamnorm.checks import expect_choice, expect_finite, expect_whole
from streamnorm.lab.runs.classifier.run import Described

CHOICES = {
    "arch": ("autoencoder",),
    "nonlinearity": ("relu", "sigmoid"),
    "normalized": ("hidden", "top", "all"),
    "top_bias": ("frequencies", "zero"),
}


@dataclass(frozen=True)
class AutoencoderRun(Described):
    """One training run of an auto-encoder.

    Attributes:
        arch: autoencoder.
        data: pydoc, which needs no files, movies, or the path of a JSON Lines file of documents.
        vocabulary: inputs, the words that stand in most documents.
        hidden: units of each hidden layer; the one in the middle is the code.
        nonlinearity: of the hidden layers.
        arm: the normalization: none, layer, group, rms, batch or streaming. Without it a layer has a bias, with it the
            bias comes after the norm, and so does a gain.
        normalized: which layers have the norm: hidden, top (the inputs' reconstruction alone) or all.
        top_bias: where the biases of the outputs begin: at the log-odds of the words' frequencies, as is the custom for
            binary units (Hinton 2010, section 8.1), or at zero.
        dropout: the share of hidden units that are left out at random in training.
        p: order of the moment.
        center: batch (Setting A), estimate (B), zero (C); None: estimate for streaming, batch for the others.
        alpha: of streaming.
        beta: of streaming.
        kappa: of streaming; None: (alpha1, alpha2, alpha1, alpha2).
        samples_per_batch: m, S/B.
        batches_per_update: n, B/U.
        epochs: passes over the training documents; what does not fill a last cycle is left out.
        learning_rate: of SGD, constant.
        warmup: first updates that move the statistics alone; None: 4 where streaming references are tiny.
        train_limit: train on so many documents only.
        seed: of weights, order and dropout.

    >>> AutoencoderRun(arm="batch", samples_per_batch=64).label
    'batch 64 S/B x 1 B/U'
    """

    KIND: ClassVar[str] = "an auto-encoder's run"

    arch: Literal["autoencoder"] = "autoencoder"
    data: str = "pydoc"
    vocabulary: int = 1992
    hidden: tuple[int, ...] = (128,)
    nonlinearity: Literal["relu", "sigmoid"] = "relu"
    arm: str = "layer"
    normalized: Literal["hidden", "top", "all"] = "hidden"
    top_bias: Literal["frequencies", "zero"] = "frequencies"
    dropout: float = 0.0
    p: float = 2.0
    center: Literal["batch", "estimate", "zero"] | None = None
    alpha: tuple[float, float] = (0.7, 0.3)
    beta: tuple[float, float, float] = (0.7, 0.3, 0.0)
    kappa: tuple[float, float, float, float] | None = None
    samples_per_batch: int = 1
    batches_per_update: int = 1
    epochs: int = 2
    learning_rate: float = 0.005
    warmup: int | None = None
    train_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "samples_per_batch", "batches_per_update", "epochs"):
            expect_whole(name, getattr(self, name))
        if not self.hidden:
            raise ValueError("hidden names the units of at least one layer, for instance --hidden 128; got none")
        for units in self.hidden:
            expect_whole("a number of hidden units", units)
        if self.train_limit is not None:
            expect_whole("train_limit", self.train_limit)
        for name, known in CHOICES.items():
            expect_choice(name, getattr(self, name), known)
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout is a share >= 0 and below 1, got {self.dropout!r}")
        expect_finite("learning_rate", self.learning_rate)
        if self.warmup is not None:
            expect_whole("warmup", self.warmup, least=0)

    @property
    def samples_per_update(self) -> int:
        """m n."""
        return self.samples_per_batch * self.batches_per_update

    @property
    def label(self) -> str:
        """What a table calls this run."""
        return f"{self.arm} {self.samples_per_batch} S/B x {self.batches_per_update} B/U"
