"""The study of training, postprocessing and testing: its parts by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.pipeline.claims import CLAIMS
from streamnorm.lab.studies.pipeline.runs import EPSILONS, NORMALIZED, PLAIN, distance, expected_ratio, with_epsilon
from streamnorm.lab.studies.pipeline.study import main, table

CHECK = {claim.id: claim.check for claim in CLAIMS}


def way(error: float, mean: float = 0.1, sigma: float = 0.1, first: float = 1.0) -> dict[str, float]:
    return {"test_error": error, "test_loss": error, "mean": mean, "sigma": sigma, "first": first}


def records(**ways: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Three seeds of a study with passes of 4, 8 and 64 samples, which agree where ``ways`` do not say otherwise."""
    sizes = {4: 0.3, 8: 0.2, 64: 0.1}
    found: dict[str, Any] = {"one": way(0.05, 0.2, 0.2), "exact": way(0.05, 0, 0), "passes": 3, "seconds": 1.5}
    for kind in ("moving", "corrected", "single"):
        found |= {f"{kind} {m}": way(0.05 + off / 10, sigma=off) for m, off in sizes.items()}
    found |= {name.replace("_", " "): figures for name, figures in ways.items()}
    epsilon = {f"{eps:g}": 0.5 if eps else None for eps in EPSILONS}
    cost = {"parameters": 10, "kept": 5, "test_seconds": 2.0}
    metrics = [{"test_error": 0.05, "seconds": 3.0}]
    normalized = {"measures": found, "epsilon": epsilon, "cost": cost, "metrics": metrics, "failed": None}
    plain = {"cost": {**cost, "kept": 0, "test_seconds": 1.0}, "metrics": [{"seconds": 2.0}], "failed": None}
    return {NORMALIZED: [normalized] * 3, PLAIN: [plain] * 3}


@pytest.mark.parametrize("m", [2, 4, 16])
def test_the_expected_sigma_of_a_normal_mini_batch(m: int) -> None:
    draws = torch.randn(200_000, m, dtype=torch.float64).std(1, correction=0)
    # Five standard errors of the mean of the draws.
    assert draws.mean().item() == pytest.approx(expected_ratio(m), abs=5 * draws.std().item() / math.sqrt(len(draws)))


def test_distance_by_hand() -> None:
    exact = [torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0], [1.0]])]
    found = [torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([[1.0], [1.0]])]
    off = distance(found, exact)
    assert off["mean"] == pytest.approx(math.sqrt((4 + 1 + 4) / 3))
    assert off["sigma"] == pytest.approx(math.log(2) / math.sqrt(3))
    assert off["first"] == pytest.approx(math.sqrt(2))


def test_methods_are_alike_within_half_a_point_and_two_has_to_be_closer() -> None:
    assert CHECK["C-42"](records(moving_64=way(0.054)))[0] == "reproduced"
    assert CHECK["C-42"](records(moving_64=way(0.056)))[0] == "partly", "not alike"
    assert CHECK["C-42"](records(moving_64=way(0.05, mean=0.3)))[0] == "partly", "its means are further off"
    assert CHECK["C-42"](records(moving_64=way(0.07, mean=0.3, sigma=0.3)))[0] == "contradicted"


def test_small_mini_batches_have_to_hurt_and_the_smaller_the_more() -> None:
    assert CHECK["C-43"](records())[0] == "reproduced"
    assert CHECK["C-43"](records(moving_8=way(0.05, sigma=0.4)))[0] == "partly", "8 is further off than 4"
    assert CHECK["C-43"](records(moving_4=way(0.06, sigma=0.3)))[0] == "partly", "4 costs nothing beside 64"
    verdict, figures = CHECK["C-43"](records())
    assert verdict == "reproduced"
    assert "m = 4: test error 0.0800 ± 0.0000, sigmas off by 0.300 (log)" in figures
    assert "(0.798 if normal)" in figures


def test_epsilon_has_to_be_what_makes_the_difference() -> None:
    assert CHECK["C-44"](records())[0] == "reproduced"
    held = records()
    held[NORMALIZED][0]["epsilon"]["0"] = 0.5
    verdict, figures = CHECK["C-44"](held)
    assert verdict == "partly"
    assert "eps = 0: 0.5000" in figures


def test_costs_are_reported_as_ratios() -> None:
    verdict, figures = CHECK["C-45"](records())
    assert verdict == "reported"
    assert "an epoch takes 1.50 times as long, testing 2.00 times" in figures
    assert "3 passes, 0.50 of the time of a training epoch" in figures


def test_a_constant_pixel_needs_an_epsilon() -> None:
    x = torch.rand(128, 1, 4, 4)
    x[:, :, 0, 0] = 0.25
    data = Data("made up", x, torch.randint(10, (128,)), x, torch.randint(10, (128,)), 10, "here")
    assert with_epsilon(data, 0.0, seed=0) is None
    loss = with_epsilon(data, 1e-5, seed=0)
    assert loss is not None
    assert loss < 5, "of 10 classes chance is 2.3 nats"


def test_smoke(tmp_path: Path) -> None:
    path = main(Arguments(out=tmp_path, seeds=(0,), tier="smoke"))
    said = path.read_text()
    assert all(claim.id in said for claim in CLAIMS)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    measures = next(run["measures"] for run in runs if run["label"] == NORMALIZED)
    assert measures["passes"] == 3
    assert measures["exact"]["sigma"] == 0
    assert measures["moving 4"]["first"] == pytest.approx(expected_ratio(4), rel=0.2), "of noisy averages"
    assert measures["single 64"]["sigma"] < measures["single 4"]["sigma"]
    checkpoints = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(checkpoints) == 2
    main(Arguments(out=tmp_path, seeds=(0,), tier="smoke"))
    assert {file: file.stat().st_mtime_ns for file in checkpoints} == checkpoints
    assert table({NORMALIZED: runs[:1]}).count("\n") == 2 + 2 + 3 * 2 - 1
