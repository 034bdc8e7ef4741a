"""TextRun: everything that decides what the training of a language model computes, as a frozen dataclass.

The models predict characters. Imports what all runs have in common. The defaults are the paper's (section 7.6, Figure
12), but for the text, which needs no files. The command line is derived from it, and a checkpoint is refused by another
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from streamnorm.checks import expect_choice, expect_finite, expect_whole, is_whole
from streamnorm.lab.runs.classifier.run import Described

CHOICES = {"arch": ("rnn", "gru", "lstm"), "nonlinearity": ("tanh", "relu"), "backward_stats": ("saved", "latest")}


@dataclass(frozen=True)
class TextRun(Described):
    """One training run of a language model.

    Attributes:
        data: pydoc, which needs no files, tinyshakespeare, shakespeare, or the path of a text file.
        arch: the recurrent layer, rnn, gru or lstm.
        hidden: units of a recurrent layer.
        layers: recurrent layers.
        nonlinearity: of the new state, in rnn and gru.
        arm: the normalization: none, layer, batch (statistics shared over time), tsbn (statistics for each time step),
            streaming (the paper's rule) or default (memory counted in samples).
        p: order of the moment.
        center: batch (Setting A), estimate (B), zero (C); None: estimate for streaming, batch for the others.
        alpha: of streaming.
        beta: of streaming.
        kappa: of streaming; None: (alpha1, alpha2, alpha1, alpha2).
        backward_stats: going back through a streaming layer, N uses the estimate saved at its time step, or the latest
            one, which is the paper's caveat (section 4.3).
        vertical: normalize W_x x_t alone and not W_h h_{t-1} (section 6).
        samples_per_batch: m, S/B: streams of text that are read side by side.
        batches_per_update: n, B/U; the text is cut into m n streams.
        steps: time steps of a chunk, through which gradients go back (truncated BPTT). Several lengths take turns, from
            mini-batch to mini-batch and from update to update.
        carry_state: go on from the state in which the chunk before ended; otherwise every chunk starts from 0.
        epochs: passes over the training text; what does not fill a last chunk is left out.
        learning_rate: of the Manhattan rule; a tenth of it in the last third of the updates (the paper's 2 : 1 epochs).
        validate_every: mini-batches between two validations, over the whole validation text.
        warmup: first updates that move the statistics alone; None: up to 4, while streaming references are tiny, as
            that of W_h h_0 is where h_0 = 0.
        weight_scale: the first weights of the recurrent layers are torch's times this. A norm forgets how large they
            are, and the Manhattan rule moves them by its rate all the same: k times larger ones are a k times smaller
            rate at first.
        limit: use so many characters of the text only, the first, before 1 % of them are set apart for validation.
        seed: of the weights; the order of the text is the same for every run.

    >>> TextRun(arm="layer", samples_per_batch=64, batches_per_update=1).label
    'gru layer 64 S/B x 1 B/U'
    """

    KIND: ClassVar[str] = "a language run"

    data: str = "pydoc"
    arch: Literal["rnn", "gru", "lstm"] = "gru"
    hidden: int = 100
    layers: int = 1
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    arm: str = "streaming"
    p: float = 2.0
    center: Literal["batch", "estimate", "zero"] | None = None
    alpha: tuple[float, float] = (0.7, 0.3)
    beta: tuple[float, float, float] = (0.7, 0.0, 0.3)
    kappa: tuple[float, float, float, float] | None = None
    backward_stats: Literal["saved", "latest"] = "saved"
    vertical: bool = False
    samples_per_batch: int = 32
    batches_per_update: int = 2
    steps: tuple[int, ...] = (100,)
    carry_state: bool = True
    epochs: int = 3
    learning_rate: float = 0.01
    validate_every: int = 20
    warmup: int | None = None
    weight_scale: float = 1.0
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("hidden", "layers", "samples_per_batch", "batches_per_update", "epochs", "validate_every")
        for name in (*sizes, *(["limit"] if self.limit is not None else [])):
            expect_whole(name, getattr(self, name))
        if not isinstance(self.steps, tuple) or not self.steps or not all(map(is_whole, self.steps)):
            raise ValueError(f"steps is a tuple of whole numbers >= 1 such as (100,), got {self.steps!r}")
        for name, known in CHOICES.items():
            expect_choice(name, getattr(self, name), known)
        if self.arch == "lstm" and self.nonlinearity != "tanh":
            raise ValueError(f"nonlinearity is a choice of rnn and gru, an lstm has tanh; got {self.nonlinearity!r}")
        expect_finite("learning_rate", self.learning_rate)
        expect_finite("weight_scale", self.weight_scale, above=True)
        if self.warmup is not None:
            expect_whole("warmup", self.warmup, least=0)

    @property
    def samples_per_update(self) -> int:
        """m n, the number of streams."""
        return self.samples_per_batch * self.batches_per_update

    @property
    def label(self) -> str:
        """What a table calls this run."""
        return f"{self.arch} {self.arm} {self.samples_per_batch} S/B x {self.batches_per_update} B/U"
