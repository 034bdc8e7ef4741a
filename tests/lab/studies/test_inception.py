"""The study of the small Inception network: its parts by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.inception import Branches, Inception, inception, reduction, unit_of
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.inception.claims import CLAIMS, best_of_plain, shares
from streamnorm.lab.studies.inception.runs import (
    ARMS,
    ENSEMBLE,
    FACTORS,
    MEMBER,
    RATE,
    SIGMOID_FACTOR,
    TIERS,
    InceptionRun,
    InceptionTrainer,
    averaged,
    carry_out,
    member,
    named,
    probabilities,
    runs,
)
from streamnorm.lab.studies.inception.study import main
from streamnorm.nn.affine import Affine
from streamnorm.nn.layers import BatchNorm
from streamnorm.nn.norm import Norm

CHECK = {claim.id: claim.check for claim in CLAIMS}
SMALL = InceptionRun(arm="batch", width=2, epochs=1, samples_per_batch=32, batches_per_update=1, learning_rate=0.01)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits", None, train_limit=128, test_limit=64)


# --- The network


@pytest.mark.parametrize("side", [1, 4, 7, 16])
def test_modules_keep_the_map_or_halve_it(side: int) -> None:
    unit = unit_of(BatchNorm, nn.ReLU)
    x = torch.randn(2, 6, side, side)
    assert inception(6, 5, unit)(x).shape == (2, 20, side, side)
    assert reduction(6, 5, unit)(x).shape == (2, 16, -(-side // 2), -(-side // 2))


def reach(module: Branches, side: int = 9) -> list[int]:
    """How wide a square of the output of each branch one pixel changes."""
    x = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    widths = []
    for branch in module.double():
        middle = branch(x)[0, :, side // 2, side // 2].sum()
        seen = torch.autograd.grad(middle, x)[0].abs().sum((0, 1)) > 0
        widths.append(int(seen.any(0).sum()))
    return widths


def test_the_branches_see_one_place_three_and_five() -> None:
    # With sigmoids no gradient is 0; without a norm it comes from the window alone.
    assert reach(inception(3, 4, unit_of(lambda features: nn.Identity(), nn.Sigmoid))) == [1, 3, 5, 3]


def test_max_pooling_goes_past_the_convolutions_of_a_reduction() -> None:
    x = torch.randn(2, 6, 8, 8)
    out = reduction(6, 5, unit_of(BatchNorm, nn.ReLU))(x)
    assert torch.equal(out[:, -6:], nn.functional.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("nonlinearity", [nn.ReLU, nn.Sigmoid])
def test_every_convolution_has_a_norm_a_nonlinearity_and_no_bias(nonlinearity: type[nn.Module]) -> None:
    model = Inception(3, 10, BatchNorm, nonlinearity, 4)
    units = [m for m in model.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
    assert all([type(part) for part in unit] == [nn.Conv2d, BatchNorm, nonlinearity] for unit in units)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(units) == len(convolutions) == 1 + 4 * 7 + 2 * 5
    assert all(m.bias is None for m in convolutions)
    others = nn.ReLU if nonlinearity is nn.Sigmoid else nn.Sigmoid
    assert not any(isinstance(m, (nn.Dropout, others)) for m in model.modules())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    x, sides = torch.randn(2, 3, 32, 32), []
    for stage in list(model)[:-2]:
        x = stage(x)
        sides.append(x.shape[-1])
    assert sides == [16, 16, 8, 8, 8, 4, 4]


def test_the_weights_are_alike_for_every_arm_and_nonlinearity(digits: Data) -> None:
    def weights(**changes: Any) -> list[Tensor]:
        model = InceptionTrainer(replace(SMALL, **changes), digits).model
        return [m.weight.detach() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    state = torch.get_rng_state()
    mine = weights()
    assert torch.equal(torch.get_rng_state(), state)
    for changes in ({"arm": "none"}, {"arm": "streaming"}, {"nonlinearity": "sigmoid"}):
        assert all(map(torch.equal, mine, weights(**changes)))
    assert not torch.equal(mine[0], weights(seed=1)[0])


@pytest.mark.parametrize(("arm", "kind"), [("none", Affine), ("batch", Norm), ("streaming", Norm)])
def test_the_loop_trains_this_network(arm: str, kind: type[nn.Module], digits: Data) -> None:
    trainer = InceptionTrainer(replace(SMALL, arm=arm, width=8), digits)
    assert isinstance(trainer.model, Inception)
    assert isinstance(trainer.model[0][1], kind)  # type: ignore[index]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    assert not any(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize(("nonlinearity", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)])
def test_the_nonlinearity_is_the_runs(nonlinearity: Any, kind: type[nn.Module], digits: Data) -> None:
    modules = [type(m) for m in InceptionTrainer(replace(SMALL, nonlinearity=nonlinearity), digits).model.modules()]
    assert (modules.count(kind), modules.count(nn.ReLU) + modules.count(nn.Sigmoid)) == (39, 39)


def test_another_nonlinearity_is_refused() -> None:
    with pytest.raises(ValueError, match="nonlinearity is one of relu, sigmoid, got 'tanh'"):
        replace(SMALL, nonlinearity="tanh")  # type: ignore[arg-type]


# --- The ensemble


def test_an_ensemble_answers_by_the_mean_probability() -> None:
    y = torch.tensor([0, 1])
    sure, unsure = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.4, 0.6], [0.3, 0.7]])
    assert averaged([sure], y) == 0.5
    assert averaged([sure, unsure, unsure], y) == 0.5, "0.57 and 0.5: the majority alone would answer 1 to both"
    assert averaged([unsure, unsure, sure], torch.tensor([0, 0])) == 0


def test_a_member_that_could_not_train_has_no_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    def failing(self: InceptionTrainer) -> None:
        step(self)
        self.failed = "diverged" if self.run.seed == 3 else None

    step = InceptionTrainer.step
    monkeypatch.setattr(InceptionTrainer, "step", failing)
    monkeypatch.setattr("streamnorm.lab.studies.inception.runs.runs", lambda tier: {})
    monkeypatch.setattr("streamnorm.lab.studies.inception.runs.member", lambda tier: SMALL)
    asked: list[int] = []
    monkeypatch.setattr(
        "streamnorm.lab.studies.inception.runs.averaged", lambda answers, y: asked.append(len(answers)) or 0.5
    )
    records = carry_out(TIERS["smoke"], (0,), digits, tmp_path)
    assert asked == [5]
    assert records[ENSEMBLE][0]["members"][3] == 0.9, "chance"


def test_probabilities_are_those_of_testing(digits: Data) -> None:
    trainer = InceptionTrainer(SMALL, digits)
    while not trainer.finished:
        trainer.step()
    found = probabilities(trainer)
    assert found.dtype == torch.float64
    assert torch.allclose(found.sum(1), torch.ones(64, dtype=torch.float64))
    assert averaged([found], digits.test_y) == trainer.metrics[-1]["test_error"]
    assert all(module.training for module in trainer.model.modules())


# --- Claims


def record(*errors: float, failed: str | None = None) -> dict[str, Any]:
    lines = [{"updates": 100 * (i + 1), "test_error": error} for i, error in enumerate(errors)]
    return {"metrics": lines, "failed": failed}


DIVERGED = record(failed="diverged: the loss became nan at update 7")


def study(changes: dict[str, dict[str, Any]] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Records in which every claim holds, but for ``changes``."""
    records = {name: record(0.6, 0.5, 0.5) for name in runs(TIERS["smoke"])}
    records |= {named("none", 1): record(0.8, 0.7, 0.6), named("none", 5): record(0.8, 0.7, 0.65)}
    records |= {named("none", 30): DIVERGED, named("none", 30, "sigmoid"): DIVERGED}
    records |= {named("none", factor, "sigmoid"): record(0.9, 0.9, 0.9) for factor in FACTORS[:2]}
    records |= {named("batch", SIGMOID_FACTOR, "sigmoid"): record(0.8, 0.7, 0.6), **(changes or {})}
    ensemble = {"members": [0.5, 0.4, 0.5, 0.4, 0.5, 0.4], "test_error": 0.4}
    return {**{name: [one] * 3 for name, one in records.items()}, ENSEMBLE: [ensemble] * 3}


def test_the_best_of_plain_is_over_learning_rates_and_epochs() -> None:
    records = study()
    assert best_of_plain(records) == [(0.6, 300)] * 3
    assert shares(records, named("batch", 30)) == pytest.approx([100 / 300] * 3)
    records = study({named("none", 5): record(0.8, 0.55, 0.7)})
    assert best_of_plain(records) == [(0.55, 200)] * 3
    assert shares(records, named("batch", 30)) == pytest.approx([150 / 200] * 3), "half-way from 0.6 to 0.5"
    assert shares(study({named("batch", 5): record(0.9, 0.8, 0.7)}), named("batch", 5)) == [math.inf] * 3
    assert shares(study({named("batch", 5): DIVERGED}), named("batch", 5)) == [math.inf] * 3


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "reproduced"),
        ({named("none", 30): record(0.9, 0.9, 0.9)}, "reproduced"),  # at chance, and never diverged
        ({named("none", 30): record(0.8, 0.7, 0.65)}, "partly"),
        ({named("batch", 30): record(0.9, 0.8, 0.65)}, "partly"),  # trains, and never gets there
        ({named("batch", 30): record(0.9, 0.7, 0.6)}, "partly"),  # gets there, no earlier
        ({named("batch", 30): DIVERGED}, "partly"),
        ({named("batch", 30): DIVERGED, named("none", 30): record(0.8, 0.7, 0.65)}, "contradicted"),
    ],
)
def test_thirty_times_the_learning_rate(changes: dict[str, dict[str, Any]], verdict: str) -> None:
    assert CHECK["C-55"](study(changes))[0] == verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "reproduced"),
        ({named("none", 5, "sigmoid"): record(0.9, 0.8, 0.8)}, "partly"),  # one learning rate that works is enough
        ({named("batch", SIGMOID_FACTOR, "sigmoid"): record(0.9, 0.8, 0.75)}, "partly"),
        ({named("batch", SIGMOID_FACTOR, "sigmoid"): record(0.9, 0.6, 0.4)}, "partly"),  # better than ReLUs
        (
            {
                **{named("none", 1, "sigmoid"): record(0.8, 0.6, 0.5)},
                **{named("batch", SIGMOID_FACTOR, kind): record(0.8, 0.75, 0.75) for kind in ("relu", "sigmoid")},
                **{named("batch", SIGMOID_FACTOR): record(0.8, 0.8, 0.8)},
            },
            "contradicted",
        ),
    ],
)
def test_logistic_units(changes: dict[str, dict[str, Any]], verdict: str) -> None:
    assert CHECK["C-56"](study(changes))[0] == verdict


@pytest.mark.parametrize(("error", "verdict"), [(0.4, "reproduced"), (0.45, "contradicted"), (0.46, "contradicted")])
def test_an_ensemble_is_held_against_the_mean_of_its_members(error: float, verdict: str) -> None:
    records = study()
    records[ENSEMBLE] = [{**records[ENSEMBLE][0], "test_error": error}] * 3
    assert CHECK["C-57"](records)[0] == verdict


# --- The study


def test_the_runs_differ_as_their_names_say() -> None:
    for tier in TIERS.values():
        all_runs = runs(tier)
        assert len(set(all_runs.values())) == len(all_runs) == 14
        for name, run in all_runs.items():
            factor = round(run.learning_rate / RATE)
            assert name == named(run.arm, factor, run.nonlinearity)
            assert (run.samples_per_update, run.epochs, run.data) == (32, tier.epochs, tier.data)
        assert {(run.arm, round(run.learning_rate / RATE)) for run in all_runs.values()} == {
            (arm, factor) for arm in ARMS for factor in FACTORS
        }
        assert member(tier) == replace(all_runs[named("batch", 5)], epochs=tier.member_epochs)


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Arguments("smoke", tmp_path, seeds=(1,))
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    for name in (*runs(TIERS["smoke"]), MEMBER):
        assert name in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(results) == [*runs(TIERS["smoke"]), MEMBER, ENSEMBLE]
    assert [r["seed"] for r in results[MEMBER]] == [6, 7, 8, 9, 10, 11]
    assert [r["metrics"][-1]["test_error"] for r in results[MEMBER]] == results[ENSEMBLE][0]["members"]

    def never(*_: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(Trainer, "step", never)
    assert main(arguments).read_text() == page


def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Data) -> None:
    tier = replace(TIERS["smoke"], member_epochs=2)
    monkeypatch.setattr("streamnorm.lab.studies.inception.runs.runs", lambda tier: {"batch x5": SMALL})
    monkeypatch.setattr("streamnorm.lab.studies.inception.runs.MEMBERS", 2)
    whole = carry_out(tier, (0,), digits, tmp_path / "whole")
    taken, step = 0, Trainer.step

    def counted(self: Trainer) -> None:
        nonlocal taken
        taken += 1
        if taken == 18:  # of 4 of the run, 8 of the first member and 8 of the second
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        carry_out(tier, (0,), digits, tmp_path / "stopped")
    assert carry_out(tier, (0,), digits, tmp_path / "stopped")[ENSEMBLE] == whole[ENSEMBLE]
    assert taken == 18 + 4, "the last epoch alone"
