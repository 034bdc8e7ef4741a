"""The study of small batches: modes and verdicts by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import small, steps, toy

from streamnorm.lab.runs.classifier.loop import Trainer, evaluate
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.smallbatch.claims import CLAIMS
from streamnorm.lab.studies.smallbatch.runs import (
    BY_BATCH,
    KEYS,
    SHORT,
    STABLE,
    TIERS,
    UPDATE,
    error_in_training_mode,
    grid,
    kept,
    many_seeds,
    name_of,
    path_of,
    runs,
)
from streamnorm.lab.studies.smallbatch.study import main
from streamnorm.lab.studies.study import CHANCE, end_errors

CHECK = {claim.id: claim.check for claim in CLAIMS}


@pytest.mark.parametrize("arm", ["batch", "paper", "default"])
def test_training_mode_normalizes_by_mini_batches_and_keeps_nothing(arm: str) -> None:
    data = toy()
    model = steps(Trainer(small(arm=arm), data), 3).model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = error_in_training_mode(model, data.test_x[:18], data.test_y[:18], 3, 2)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wrong = 0
    for cycle in range(3):
        trained = steps(Trainer(small(arm=arm), data), 3).model.train()
        for batch in (0, 1):
            place = slice(6 * cycle + 3 * batch, 6 * cycle + 3 * batch + 3)
            with torch.no_grad():
                wrong += int((trained(data.test_x[place]).argmax(1) != data.test_y[place]).sum())
    assert error == wrong / 18


def test_to_sample_normalization_both_modes_are_one() -> None:
    data = toy(test=24)
    model = steps(Trainer(small(arm="layer"), data), 3).model
    assert error_in_training_mode(model, data.test_x, data.test_y, 3, 4) == evaluate(model, data.test_x, data.test_y)[1]


def record(name: str, error: float, failed: str | None = None, training: float | None = 0.5) -> dict[str, Any]:
    lines = [] if failed else [{"test_error": error}]
    return {"metrics": lines, "failed": failed, "training_mode_error": training, "arm": name.split()[1]}


def made(**errors: float) -> dict[str, list[dict[str, Any]]]:
    names = {
        "default": "A default 1 x 64",
        "batch": "A batch 64 x 1",
        "layer": "A layer 64 x 1",
        "b_default": "B default 1 x 32",
        "b_batch": "B batch 32 x 1",
        "b_group": "B group 32 x 1",
    }
    return {names[key]: [record(names[key], error)] * 3 for key, error in errors.items()}


@pytest.mark.parametrize(
    ("claim", "errors", "verdict"),
    [
        ("SB-1", {"default": 0.452, "batch": 0.45, "layer": 0.46}, "reproduced"),
        ("SB-1", {"default": 0.455, "batch": 0.45, "layer": 0.46}, "partly"),
        ("SB-1", {"default": 0.47, "batch": 0.45, "layer": 0.46}, "contradicted"),
        ("SB-2", {"b_default": 0.42, "b_batch": 0.41, "b_group": 0.51}, "reproduced"),
        ("SB-2", {"b_default": 0.44, "b_batch": 0.41, "b_group": 0.53}, "partly"),
        ("SB-2", {"b_default": 0.48, "b_batch": 0.41, "b_group": 0.5}, "contradicted"),
    ],
)
def test_verdicts(claim: str, errors: dict[str, float], verdict: str) -> None:
    assert CHECK[claim](made(**errors))[0] == verdict


def test_a_run_that_failed_is_at_chance_and_counted() -> None:
    records = made(default=0.4)
    records[STABLE + "B default 1 x 32"] = [record("B default", 0.4), record("B default", 0.4, "diverged", None)]
    assert end_errors(records, STABLE + "B default 1 x 32") == [0.4, CHANCE]
    verdict, figures = CHECK["SB-3"](records)
    assert verdict == "contradicted"
    assert figures.startswith("B default 1 x 32 1 of 2 seeds")
    assert CHECK["SB-3"](made(default=0.4))[0] == "reproduced"


@pytest.mark.parametrize("tier", ["smoke", "reduced", "full"])
def test_the_runs_differ_as_their_names_say(tier: str) -> None:
    size = TIERS[tier]
    named = runs(size)
    assert tier == "smoke" or len(size.seeds) >= 5
    assert len(set(named.values())) == len(named)
    for name, run in {**named, **many_seeds(size)}.items():
        plain = name.removeprefix(SHORT).removeprefix(STABLE)
        assert plain == name_of(run.architecture, run.arm, run.samples_per_batch)
        assert run.samples_per_update == UPDATE[run.architecture]
        assert (run.learning_rate, run.momentum) == (0.1, 0.9)
    prefix = SHORT if size.short else ""
    for letter in UPDATE:
        assert {name_of(letter, *key) for key in KEYS[letter]} <= set(named)
        assert {prefix + name_of(letter, *key) for key in grid(letter)} <= set(named)
        assert {arm for arm, _ in grid(letter)} >= set(BY_BATCH)
        assert [m for arm, m in grid(letter) if arm == "default"] == [1, 2, 4, 8, 32]
    assert ("batch", 1) not in grid("A")


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"A": grid("A")[:4] + grid("A")[-5:], "B": KEYS["B"]}
    for module in ("runs", "study"):
        monkeypatch.setattr(f"streamnorm.lab.studies.smallbatch.{module}.grid", lambda letter: list(some[letter]))
    arguments = Arguments("smoke", tmp_path)
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    for name, own in results.items():
        assert name.startswith(STABLE) or f"| {name} | 1 |" in page
        assert len(own) == (2 if name.startswith(STABLE) else 1)
        assert not any(r["failed"] for r in own)
        assert all(0 <= r["training_mode_error"] <= 1 for r in own)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    def never(*_: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(Trainer, "step", never)
    assert main(arguments).read_text() == page
    name, run = next(iter(runs(TIERS["smoke"]).items()))
    other = replace(run, learning_rate=0.2)
    with pytest.raises(ValueError, match=r"does not hold the run A batch 64 x 1, seed 0; delete it"):
        kept(name, other, tmp_path)
    path_of(name, run, tmp_path).write_text("{")
    with pytest.raises(ValueError, match="does not hold the run"):
        kept(name, run, tmp_path)
