"""What decides what is learned from a stream, as a frozen dataclass; a checkpoint is refused by another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from streamnorm.checks import expect_choice, expect_finite, expect_whole
from streamnorm.lab.runs.classifier.run import Described

RATES = {"sgd": 0.01, "adam": 0.001}
"""The learning rate of an optimizer where none is given."""
Task = Literal["classification", "regression"]
TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Settings(Described):
    """What is learned, and by which networks.

    Attributes:
        task: classification, regression or auto: regression if the targets of the first 100 rows that can be used are
            all numbers, and one of them is not whole or more than 20 of them differ; otherwise classification.
        width: features of each hidden layer.
        depth: hidden layers, each [linear, normalization, ReLU]; a linear read-out follows.
        optimizer: sgd or adam, with one weight update a row.
        learning_rate: of the optimizer; None: 0.01 for sgd, 0.001 for adam.
        scale: standardize each number with the mean and sd of what came of it so far; else it is fed as it comes.
        words: inputs for words and for what is missing. They share these by their hashes, so that any number of
            different words takes no more memory; with many more words than inputs some become one to the network.
        max_classes: classes that the target may have. The read-out grows with each new one.
        seed: of the weights.
    """

    KIND: ClassVar[str] = "a learner of this version"

    task: Literal["auto", "classification", "regression"] = "auto"
    width: int = 64
    depth: int = 2
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float | None = None
    scale: bool = False
    words: int = 256
    max_classes: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "words", "max_classes"):
            expect_whole(name, getattr(self, name))
        expect_whole("seed", self.seed, least=0)
        expect_choice("task", self.task, TASKS)
        expect_choice("optimizer", self.optimizer, RATES)
        if self.learning_rate is not None:
            expect_finite("learning_rate", self.learning_rate)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
