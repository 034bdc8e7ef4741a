"""The study of auto-encoders: what it measures by hand, its runs, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from streamnorm.lab.runs.autoencoder.data import load_documents
from streamnorm.lab.runs.autoencoder.model import Autoencoder
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.autoencoder.claims import CLAIMS, pairs_of, ratios
from streamnorm.lab.studies.autoencoder.measures import correlation, examined, with_and_without_bias
from streamnorm.lab.studies.autoencoder.runs import DROPOUTS, TIERS, runs
from streamnorm.lab.studies.autoencoder.study import main


def test_correlation_is_that_of_different_columns() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    whole = torch.corrcoef(x.T).abs()
    assert correlation(x, x) == pytest.approx((whole.sum().item() - 4) / 12)
    y = torch.randn(50, 3, dtype=torch.float64)
    both = torch.corrcoef(torch.cat([x, y], 1).T).abs()[:4, 4:]
    assert correlation(x, y) == pytest.approx(both.mean().item())
    still = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    assert correlation(still, y) == pytest.approx(both.sum().item() / 15), "a constant column has a correlation of 0"


def test_dead_and_unsaturated_units_are_counted() -> None:
    documents = load_documents("pydoc", vocabulary=50)
    model = Autoencoder(50, (4,), None)
    with torch.no_grad():
        model.read.weight.copy_(torch.tensor([-1.0, 0.001, 100.0, 100.0]).expand(50, 4))
    found = examined(model, documents)
    assert found["dead"] == 0.25
    assert found["unsaturated"] == 0, "0, thousandths and hundreds"
    assert found["units_alike"] == pytest.approx(3 / 6), "three units are alike and one is still"
    model.nonlinearity = lambda x: torch.full_like(x, 0.5)
    assert examined(model, documents)["unsaturated"] == 1


def test_a_bias_before_batch_normalization_is_redundant() -> None:
    documents = load_documents("pydoc", vocabulary=50)
    shared = {"vocabulary": 50, "hidden": (4,), "samples_per_batch": 8, "learning_rate": 0.05}
    gradient, difference = with_and_without_bias(AutoencoderRun(arm="batch", **shared), documents, 10)
    # Rounding of float64 in sums over 8 documents and 50 words of numbers of size 1, over ten updates.
    assert max(gradient, difference) < 1e-12
    gradient, difference = with_and_without_bias(AutoencoderRun(arm="layer", **shared), documents, 10)
    assert min(gradient, difference) > 1e-6, "and not so where its units share a mean"


def test_ratios_are_of_means_over_seeds_at_each_epoch() -> None:
    def record(*costs: float, failed: str | None = None) -> dict[str, object]:
        return {"metrics": [{"train_cost": cost} for cost in costs], "failed": failed}

    records = {"none x": [record(4, 2), record(6, 2)], "layer x": [record(2, 1), record(3, 2)], "batch x": []}
    assert pairs_of(records) == {"x": ("none x", "layer x")}
    assert ratios(records, "none x", "layer x") == [0.5, 0.75]
    assert math.isnan(ratios({**records, "layer x": [record(failed="diverged")]}, "none x", "layer x")[0])


@pytest.mark.parametrize("tier", TIERS)
def test_the_runs_are_those_of_the_first_experiment_and_of_the_two_questions(tier: str) -> None:
    size, named = TIERS[tier], runs(TIERS[tier])
    assert len(set(named.values())) == len(named), "two names for one run"
    for name, run in named.items():
        assert run.vocabulary == size.vocabulary
        if " online" in name:
            assert (run.samples_per_update, run.epochs, run.hidden) == (1, 2, (size.hidden,))
    for arm in ("none", "batch"):
        assert [named[f"{arm}, dropout {x}"].dropout for x in DROPOUTS] == [0, 0.1, 0.2, 0.5]
    places = [named[name].normalized for name in ("batch, dropout 0.0", "batch on top", "batch on all")]
    assert places == ["hidden", "top", "all"]
    assert size.rate in size.rates
    assert len(runs(TIERS["reduced"])["deep sigmoid batch"].hidden) == 3
    assert (TIERS["reduced"].vocabulary, TIERS["reduced"].hidden) == (1992, 128)


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(tmp_path: Path) -> None:
    arguments = Arguments("smoke", tmp_path, seeds=(0,))
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    for name in runs(TIERS["smoke"]):
        assert f"| {name} |" in page
    assert "lambda (lambda):" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [name for name, seeds in results.items() if any(r["failed"] for r in seeds)] == ["batch online"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps
