"""The study of sigmoid units: its parts by hand, and a smoke run from end to end."""

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
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.mnist.claims import CLAIMS, drift, growth, reaches, spreads
from streamnorm.lab.studies.mnist.runs import (
    NAIVE,
    SCALES,
    TIERS,
    SigmoidRun,
    SigmoidTrainer,
    identity_error,
    runs,
    scaled,
)
from streamnorm.lab.studies.mnist.study import main
from streamnorm.nn.affine import Affine
from streamnorm.nn.norm import Norm

CHECK = {claim.id: claim.check for claim in CLAIMS}


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits", None)


def record(error: float, failed: str | None = None, weights: float = 1.0, wide: float = 1.0) -> dict[str, Any]:
    """A run whose error falls from 1 to ``error`` in a straight line, and whose percentiles move by ``wide``."""
    trace = [
        {
            "updates": 100 * i,
            "test_error": 1 - (1 - error) * i / 10,
            "percentiles": [[wide * i / 10, 0.0]] * 3,
            "unsaturated": 0.5,
            "weights": weights * i / 10,
        }
        for i in range(1, 11)
    ]
    return {"metrics": [{"test_error": error, "train_loss": error}], "failed": failed, "trace": trace}


# --- The network


@pytest.mark.parametrize("arm", ["none", "batch", "streaming"])
def test_the_network_is_the_talks(arm: str, digits: Data) -> None:
    trainer = SigmoidTrainer(SigmoidRun(arm=arm, width=100, samples_per_batch=60, batches_per_update=1), digits, 8)
    flat, *hidden, read_out = list(trainer.model.children())
    assert isinstance(flat, nn.Flatten)
    linears, norms, sigmoids = hidden[::3], hidden[1::3], hidden[2::3]
    assert [(m.in_features, m.out_features, m.bias) for m in linears] == [  # type: ignore[union-attr]
        (64, 100, None),
        (100, 100, None),
        (100, 100, None),
    ]
    assert all(isinstance(m, Affine if arm == "none" else Norm) for m in norms)
    assert all(type(m) is nn.Sigmoid for m in sigmoids)
    assert (read_out.in_features, read_out.out_features) == (100, 10)
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in trainer.model.parameters()}, "the optimizer moves these very weights"


def weights(scale: float, arm: str, data: Data, seed: int = 0) -> list[Tensor]:
    trainer = SigmoidTrainer(SigmoidRun(scale=scale, arm=arm, width=100, seed=seed, samples_per_batch=1), data, 8)
    return [m.weight.detach().clone() for m in trainer.model.modules() if isinstance(m, nn.Linear)]


def test_the_scale_is_that_of_the_hidden_weights_and_nothing_else(digits: Data) -> None:
    state = torch.get_rng_state()
    one, hundred, other = (weights(s, a, digits) for s, a in ((1, "none"), (100, "none"), (1, "batch")))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one, other)), "every arm begins with the same weights"
    assert not torch.equal(one[0], weights(1, "none", digits, seed=1)[0])
    for a, b in zip(one[:-1], hundred[:-1], strict=True):
        assert torch.allclose(100 * a, b)
    assert torch.equal(one[-1], hundred[-1])
    # The deviation of n values strays by 1 / sqrt(2 n) of itself, 0.7 % for 10,000; four times that.
    assert one[1].std().item() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, "1"])
def test_a_scale_that_is_none_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match=f"scale is a finite number > 0, got {scale!r}"):
        SigmoidRun(scale=scale)


def test_a_look_changes_nothing(digits: Data) -> None:
    run = SigmoidRun(arm="streaming", width=8, epochs=1, samples_per_batch=60, batches_per_update=1)
    ends = []
    for every in (1, 1000):
        trainer = SigmoidTrainer(run, digits, every)
        for _ in range(6):
            trainer.step()
        assert len(trainer.trace) == (6 if every == 1 else 0)
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_look_sees_the_inputs_of_the_last_sigmoid(digits: Data) -> None:
    trainer = SigmoidTrainer(SigmoidRun(arm="batch", width=12, samples_per_batch=60, batches_per_update=1), digits, 1)
    for _ in range(3):
        trainer.step()
    trainer.look()
    seen: list[Tensor] = []
    model = trainer.model
    assert isinstance(model, nn.Sequential)
    handle = model[-2].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.eval()(digits.test_x[:1000])
    handle.remove()
    model.train()
    *_, look = trainer.trace
    expected = [[sorted(unit)[int(p * (len(unit) - 1))] for unit in seen[0].T.tolist()] for p in (0.15, 0.5, 0.85)]
    spacing = max((u.sort().values.diff().max().item()) for u in seen[0].T)
    # Between two neighboring values of the sample, which are this far apart at most.
    assert torch.tensor(look["percentiles"]).sub(torch.tensor(expected)[:, :10]).abs().max() <= spacing
    assert look["unsaturated"] == pytest.approx(((torch.sigmoid(seen[0]) - 0.5).abs() < 0.45).float().mean().item())
    assert trainer.last_inputs(digits.test_x[:5]).shape == (5, 12)
    assert all(module.training for module in model.modules())


def test_the_last_look_is_the_last_test(digits: Data) -> None:
    run = SigmoidRun(arm="streaming", width=8, epochs=2, samples_per_batch=60, batches_per_update=1)
    trainer = SigmoidTrainer(run, digits, 1)
    while not trainer.finished:
        trainer.step()
    errors = [look["test_error"] for look in trainer.trace]
    assert len(errors) == trainer.updates
    assert [errors[line["updates"] - 1] for line in trainer.metrics] == [line["test_error"] for line in trainer.metrics]


def test_a_stopped_run_keeps_its_looks(digits: Data) -> None:
    run = SigmoidRun(arm="batch", width=8, epochs=1, samples_per_batch=60, batches_per_update=1)
    whole, first, second = (SigmoidTrainer(run, digits, 3) for _ in range(3))
    for _ in range(4):
        first.step()
    second.restore(first.state())
    while not whole.finished:
        whole.step()
    while not second.finished:
        second.step()
    assert second.trace == whole.trace
    assert [look["updates"] for look in whole.trace] == [*range(3, whole.updates, 3), whole.updates]
    assert whole.updates % 3, "the last look is one more"
    with pytest.raises(ValueError, match=r"another run: scale 1.0 there and 2.0 here"):
        SigmoidTrainer(replace(run, scale=2.0), digits, 3).restore(first.state())


# --- What claims are made of


def test_growth_drift_and_reach_by_hand() -> None:
    assert growth(record(0.1, weights=30), record(0.1, weights=10)) == pytest.approx(3)
    assert growth(record(0.1, failed="diverged"), record(0.1)) == math.inf
    assert drift(record(0.1, wide=2.0)) == pytest.approx(0.9), "one unit moves by 1.8, the other not"
    assert math.isnan(drift(record(0.1, failed="diverged")))
    assert reaches(record(0.0), 0.5) == pytest.approx(0.5)
    assert reaches(record(0.5), 0.1) == math.inf


def scales(none: list[float], batch: list[float]) -> dict[str, list[dict[str, Any]]]:
    errors = {"none": none, "batch": batch, "streaming": batch}
    return {
        scaled(arm, scale): [record(error)] * 3
        for arm, own in errors.items()
        for scale, error in zip(SCALES, own, strict=True)
    }


@pytest.mark.parametrize(
    ("none", "batch", "verdict"),
    [
        ([0.9, 0.9, 0.05, 0.3, 0.5], [0.05, 0.05, 0.05, 0.05, 0.06], "reproduced"),
        ([0.9, 0.9, 0.05, 0.3, 0.5], [0.05, 0.05, 0.05, 0.05, 0.09], "partly"),
        ([0.1, 0.1, 0.1, 0.1, 0.1], [0.05, 0.05, 0.05, 0.05, 0.09], "contradicted"),
    ],
)
def test_the_scale_matters_by_how_far_errors_are_apart(none: list[float], batch: list[float], verdict: str) -> None:
    records = scales(none, batch)
    assert spreads(records, "none") == pytest.approx([max(none) - min(none)] * 3)
    assert CHECK["C-53"](records)[0] == verdict


def test_a_run_that_diverged_is_at_chance() -> None:
    records = scales([0.1] * 5, [0.05] * 5)
    records[scaled("none", 100.0)] = [record(0.1, failed="diverged")] * 3
    assert spreads(records, "none") == pytest.approx([0.8] * 3)


@pytest.mark.parametrize(
    ("naive", "verdict"),
    [
        (record(0.05, failed="diverged"), "reproduced"),
        (record(0.05, weights=10.0), "reproduced"),
        (record(0.16), "reproduced"),
        (record(0.06, weights=9.0), "contradicted"),
    ],
)
def test_blowing_up_is_to_diverge_to_grow_tenfold_or_to_stall(naive: dict[str, Any], verdict: str) -> None:
    records = {"batch": [record(0.05)] * 3, **{name: [naive] * 3 for name in NAIVE}}
    assert CHECK["C-52"](records)[0] == verdict
    records[NAIVE[0]] = [record(0.05)] * 3
    assert CHECK["C-52"](records)[0] == ("partly" if verdict == "reproduced" else verdict)


@pytest.mark.parametrize(
    ("batch", "verdict"),
    [
        (record(-1.2, wide=0.5), "reproduced"),  # 0.1 after 41 % of the updates
        (record(-0.5, wide=0.5), "partly"),  # after 60 %
        (record(0.2, wide=2.0), "contradicted"),
    ],
)
def test_training_is_faster_better_and_steadier(batch: dict[str, Any], verdict: str) -> None:
    records = {"none": [record(0.1)] * 3, "batch": [batch] * 3, "streaming": [record(0.1)] * 3}
    assert CHECK["C-54"](records)[0] == verdict


@pytest.mark.parametrize("arm", ["batch", "streaming"])
def test_gain_sigma_and_bias_mu_are_the_identity(arm: str) -> None:
    # Subtract, divide, multiply, add: four roundings of float64.
    assert identity_error(arm) <= 4 * torch.finfo(torch.float64).eps


# --- The study


def test_the_runs_differ_as_their_names_say() -> None:
    for tier in TIERS.values():
        named = runs(tier)
        assert len(set(named.values())) == len(named) == 18
        assert {(run.samples_per_update, run.epochs, run.data) for run in named.values()} == {
            (60, tier.epochs, tier.data)
        }
        assert {name for name, run in named.items() if run.samples_per_batch == 1} == {"streaming 1 x 60"}
        for name in NAIVE:
            assert named[name].beta == (0, 0, 0)
            assert named[name].arm == "streaming"
        assert {run.scale for run in named.values()} == set(SCALES)


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Arguments("smoke", tmp_path, seeds=(0,))
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(results) == list(runs(TIERS["smoke"]))
    assert all(len(seeds) == 1 and seeds[0]["trace"] for seeds in results.values())

    def never(*_: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(Trainer, "step", never)
    main(arguments)
