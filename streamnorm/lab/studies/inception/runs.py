"""The runs of the study ``inception``: small Inception networks, and ensembles of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.inception import Inception
from streamnorm.lab.runs.classifier.loop import EVALUATION_BATCH, Trainer
from streamnorm.lab.runs.classifier.models import norm_factory
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.language.model import tested
from streamnorm.lab.studies.study import CHANCE, Record, end_errors, trained

ARMS = ("none", "batch", "streaming")
RATE = 0.01
"""The learning rate x1."""
FACTORS = (1, 5, 30)
"""Of the learning rate, as in the paper of the talk."""
SIGMOID_FACTOR = 5
"""With which logistic units were trained there, normalized."""
MEMBER_FACTOR = 5
"""Of the members of an ensemble. Theirs were trained at x30, as their best network was."""
MEMBERS = 6
"""Of an ensemble; those of seed s have the seeds 6 s to 6 s + 5."""
MEMBER, ENSEMBLE = "member", "ensemble"
NONLINEARITIES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Tier:
    """The size of a study: which data and how much of them, how large the networks and for how long.

    Attributes:
        member_epochs: of the members of an ensemble, which are many.
    """

    data: str
    width: int
    epochs: int
    member_epochs: int
    train_limit: int | None
    test_limit: int | None


TIERS = {
    "smoke": Tier("digits", 2, 2, 1, 64, 64),
    "reduced": Tier("cifar10", 8, 10, 4, 5_000, 1_000),
    "full": Tier("cifar10", 16, 30, 15, None, None),
}


@dataclass(frozen=True)
class InceptionRun(Run):
    """A run of the small Inception network.

    Attributes:
        nonlinearity: after every convolution's norm.
        width: features of a branch on the largest map.
    """

    nonlinearity: Literal["relu", "sigmoid"] = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity is one of {', '.join(NONLINEARITIES)}, got {self.nonlinearity!r}")


def named(arm: str, factor: int, nonlinearity: str = "relu") -> str:
    """The name of a run."""
    return f"{arm} x{factor}" + (" sigmoid" if nonlinearity == "sigmoid" else "")


def runs(tier: Tier) -> dict[str, InceptionRun]:
    """Every run of the study by name, but for the members of ensembles."""
    base = InceptionRun(
        data=tier.data,
        width=tier.width,
        epochs=tier.epochs,
        train_limit=tier.train_limit,
        test_limit=tier.test_limit,
        samples_per_batch=32,
        batches_per_update=1,
    )
    which: list[tuple[str, int, Literal["relu", "sigmoid"]]] = [
        *((arm, factor, "relu") for arm in ARMS for factor in FACTORS),
        *(("none", factor, "sigmoid") for factor in FACTORS),
        *((arm, SIGMOID_FACTOR, "sigmoid") for arm in ARMS[1:]),
    ]
    return {
        named(arm, factor, nonlinearity): replace(base, arm=arm, learning_rate=factor * RATE, nonlinearity=nonlinearity)
        for arm, factor, nonlinearity in which
    }


def member(tier: Tier) -> InceptionRun:
    """A member of an ensemble: batch x5, for fewer epochs."""
    return replace(runs(tier)[named("batch", MEMBER_FACTOR)], epochs=tier.member_epochs)


class InceptionTrainer(Trainer):
    """A run of the small Inception network under way."""

    def network(self, run: Run, data: Data) -> nn.Module:
        """Its weights are drawn from the run's seed, alike for every arm and nonlinearity.

        They lie channels last, with which pooling and small convolutions take two thirds of the time.
        """
        assert isinstance(run, InceptionRun)
        channels = data.train_x.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = Inception(channels, data.classes, norm_factory(run), NONLINEARITIES[run.nonlinearity], run.width)
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def probabilities(trainer: Trainer) -> Tensor:
    """Of the classes for each test sample, ``(n, classes)`` in float64, in testing."""
    with tested(trainer.model):
        outputs = [trainer.model(x) for x in trainer.data.test_x.split(EVALUATION_BATCH)]
    return torch.cat(outputs).double().softmax(1)


def carry_out(tier: Tier, seeds: Sequence[int], data: Data, out: Path) -> dict[str, list[Record]]:
    """Train every run and six members with every seed, seed by seed so that a stopped study has whole pairs.

    Returns:
        The records of every run, those of all members as ``MEMBER``, and as ``ENSEMBLE`` for each seed the test errors
        of its members and of the average of those that could train.
    """
    records: dict[str, list[Record]] = {name: [] for name in (*runs(tier), MEMBER, ENSEMBLE)}
    for seed in seeds:
        for name, run in runs(tier).items():
            records[name].append({**trained(run, name, seed, data, out, make=InceptionTrainer).record(), "label": name})
        six = [
            trained(member(tier), MEMBER, MEMBERS * seed + i, data, out, make=InceptionTrainer) for i in range(MEMBERS)
        ]
        own = [{**trainer.record(), "label": MEMBER} for trainer in six]
        able = [probabilities(trainer) for trainer in six if not trainer.failed]
        error = averaged(able, data.test_y) if able else CHANCE
        records[MEMBER] += own
        records[ENSEMBLE].append({"seed": seed, "members": end_errors({MEMBER: own}, MEMBER), "test_error": error})
    return records


def averaged(probabilities: Sequence[Tensor], y: Tensor) -> float:
    """The error of an ensemble, whose answer is the class of the largest mean probability ``(n, classes)``.

    >>> first, second = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    >>> averaged([first, second], torch.tensor([0, 1]))
    0.0
    """
    return (torch.stack(list(probabilities)).mean(0).argmax(1) != y).double().mean().item()
