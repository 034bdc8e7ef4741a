"""A small Inception network on CIFAR-10: learning rates, logistic units, an ensemble; after the talk of Ioffe (2015).

    streamnorm reproduce inception --data-root DATA --tier reduced

The talk's network was trained on ImageNet; ours is ``streamnorm/lab/runs/classifier/inception.py``, at 32 samples an
update as theirs, streaming too. The learning rate x1 is the best of 0.003, 0.01, 0.03 and 0.1 for the network without
normalization. Its last test errors in the reduced tier were 0.570, 0.507, 0.507 and 0.571 with seed 100;
with seed 101, 0.01 came to 0.493 and 0.03 to 0.515. Neither is a seed of the study. We chose: momentum 0.9, a tenth of
the rate in the last sixth of the updates, no weight decay, first weights of deviation ``sqrt(2 / inputs)``, also before
sigmoids. ``none`` has a gain and a bias where the others normalize before them. Members of an ensemble differ in their
first weights and the order of their data. A stopped study goes on with the same command.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.architectures import norm_factory
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.inception import Inception
from streamnorm.lab.runs.classifier.loop import EVALUATION_BATCH, Trainer
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.language.model import tested
from streamnorm.lab.runs.summary import summarize, table
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.inception.figures import picture
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.study import (
    CHANCE,
    Claim,
    Record,
    Records,
    Verdict,
    below,
    end_errors,
    first_at,
    judge,
    spread,
    together,
    trained,
    with_failures,
)

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
LEARNED, NEAR_CHANCE = CHANCE - 0.2, CHANCE - 0.05
"""Errors of a network that learned, at most, and of one that did not, at least."""
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


# --- Claims


def errors_by_factor(records: Records, arm: str, nonlinearity: str = "relu") -> list[tuple[float, ...]]:
    """For each seed the last test errors at the learning rates x1, x5 and x30."""
    return list(zip(*(end_errors(records, named(arm, f, nonlinearity)) for f in FACTORS), strict=True))


def best_of_plain(records: Records) -> list[tuple[float, float]]:
    """For each seed the lowest test error that the network without normalization ever had, at any learning rate, and
    after how many updates; chance after infinitely many if no test ever came."""
    looks = zip(*(map(curve, records[named("none", factor)]) for factor in FACTORS), strict=True)
    tests = ([(error, updates) for look in seed for updates, error in look] for seed in looks)
    return [min(own, default=(CHANCE, math.inf)) for own in tests]


def curve(record: Record) -> list[tuple[float, float]]:
    """Test error by updates."""
    return [(line["updates"], line["test_error"]) for line in record["metrics"]]


def shares(records: Records, name: str) -> list[float]:
    """For each seed, in what share of the updates that ``best_of_plain`` took a run has that error; inf if never."""
    best = best_of_plain(records)
    return [first_at(curve(r), error) / updates for r, (error, updates) in zip(records[name], best, strict=True)]


def _c55(records: Records) -> tuple[Verdict, str]:
    fastest = FACTORS[-1]
    batch, plain = (end_errors(records, named(arm, fastest)) for arm in ("batch", "none"))
    parts: list[Verdict] = [
        judge([LEARNED - error for error in batch], 0),
        judge([1 - share for share in shares(records, named("batch", fastest))], 0.01),
        judge([error - LEARNED for error in plain], 0),
    ]
    figures = ["test error " + ", ".join(_told(records, named(arm, f)) for arm in ARMS for f in FACTORS)]
    reached = ", ".join(
        f"{named(arm, f)} {' '.join('never' if math.isinf(s) else f'{s:.2f}' for s in shares(records, named(arm, f)))}"
        for arm in ARMS[1:]
        for f in FACTORS
    )
    best = spread([error for error, _ in best_of_plain(records)])
    return together(parts), "; ".join([*figures, f"share of updates to the best of none ({best}): {reached}"])


def _c56(records: Records) -> tuple[Verdict, str]:
    least = [min(seed) for seed in errors_by_factor(records, "none", "sigmoid")]
    batch = end_errors(records, named("batch", SIGMOID_FACTOR, "sigmoid"))
    relu = end_errors(records, named("batch", SIGMOID_FACTOR))
    parts: list[Verdict] = [
        judge([error - NEAR_CHANCE for error in least], 0),
        judge([LEARNED - error for error in batch], 0),
        judge(below(relu, batch), 0),
    ]
    sigmoids = [name for name in records if name.endswith("sigmoid")]
    beside = [named(arm, SIGMOID_FACTOR) for arm in ARMS[1:]]
    return together(parts), "test error " + ", ".join(_told(records, name) for name in (*sigmoids, *beside))


def _c57(records: Records) -> tuple[Verdict, str]:
    own, averages = zip(*((r["members"], r["test_error"]) for r in records[ENSEMBLE]), strict=True)
    means = [statistics.fmean(errors) for errors in own]
    gap = below(averages, means)
    best = below(averages, [min(errors) for errors in own])
    figures = f"test error of ensembles {spread(averages)}, of members {spread(means)}; below their mean by "
    return judge(gap, 0.001), figures + f"{spread(gap)}, below the best of six by {spread(best)}"


def _told(records: Records, name: str) -> str:
    return f"{with_failures(name, records[name])} {spread(end_errors(records, name))}"


CLAIMS = [
    Claim("C-55", "The learning rate can be 30 times as high; what plain reaches is reached sooner (talk).", _c55),
    Claim("C-56", "Logistic units are trainable only with BN, and not as good as ReLUs (talk).", _c56),
    Claim("C-57", "An ensemble of six is better than its members (talk).", _c57),
]


# --- The record


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the tables; beside it ``results.json`` and ``curves.png``."""
    checkpoint.write(out / "results.json", json.dumps({"title": title, "records": records}, indent=1) + "\n")
    single = {name: seeds for name, seeds in records.items() if name not in (MEMBER, ENSEMBLE)}
    checkpoint.write(out / "curves.png", picture(single, records[ENSEMBLE]))
    lines = [*opening(records[named("none", 1)][0], title), *verdicts(records, CLAIMS), ""]
    lines += [table(summarize([r for seeds in single.values() for r in seeds]))]
    lines += ["The members of ensembles:", "", table(summarize(records[MEMBER])), "![Curves](curves.png)", ""]
    checkpoint.write(out / "results.md", "\n".join(lines))
    return out / "results.md"


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "inception", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.train_limit, test_limit=tier.test_limit)
    records = carry_out(tier, arguments.seeds_or(), data, out)
    return write_results(records, out, f"Inception: {data.name}, tier {arguments.tier}")
