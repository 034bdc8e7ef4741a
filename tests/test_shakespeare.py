"""The study of language models: its parts by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from streamnorm.experiments.shakespeare import CLAIMS, TIERS, Arguments, faster, lower, main, reached, rise, runs
from streamnorm.experiments.textcurves import smooth


def record(*curve: float, failed: str | None = None, **more: Any) -> dict[str, Any]:
    lines = [{"characters": 100 * (i + 1), "validation_loss": loss} for i, loss in enumerate(curve)]
    return {"metrics": lines, "failed": failed, **more}


def test_smoothing_takes_an_odd_span_that_shrinks_towards_the_ends() -> None:
    values = [float(i * i) for i in range(100)]
    smoothed = smooth(values)
    assert smoothed[0] == values[0]
    assert smoothed[1] == sum(values[:3]) / 3
    assert smoothed[50] == sum(values[26:75]) / 49, "50 is made 49"
    assert smoothed[-1] == values[-1]
    assert smooth(values, 1) == values
    assert smooth([]) == []


def test_when_a_loss_was_reached_is_interpolated() -> None:
    assert reached(record(3.0, 2.0, 1.0), 1.5) == 250
    assert reached(record(3.0, 2.0, 1.0), 2.0) == 200
    assert reached(record(3.0, 2.0, 1.0), 4.0) == 100
    assert reached(record(3.0, 2.0, 1.0), 0.5) == math.inf


def test_an_arm_that_falls_twice_as_fast_is_twice_as_fast() -> None:
    slow = record(*[4 - 0.1 * i for i in range(1, 21)])
    fast = record(*[4 - 0.2 * i for i in range(1, 21)])
    records = {"slow": [slow, slow], "fast": [fast, record(failed="diverged")]}
    gains = faster(records, "fast", "slow")
    assert gains[0] == pytest.approx(1.0)
    assert math.isnan(gains[1])
    assert lower(records, "fast", "slow")[0] == pytest.approx(2.0)
    assert math.isnan(lower(records, "fast", "slow")[1])


def test_the_rise_is_the_loss_beyond_the_trained_steps_less_that_before() -> None:
    along = [9.0, 1.0, 1.5, 2.0]
    assert rise(record(1.0, run={"steps": 2}, along=along)) == 0.75
    assert math.isnan(rise(record(failed="diverged")))


@pytest.mark.parametrize("tier", ["reduced", "full"])
def test_the_runs_have_the_papers_settings(tier: str) -> None:
    named = runs(TIERS[tier])
    for arch in ("rnn", "gru"):
        for arm, m, n in (("tsbn", 64, 1), ("layer", 64, 1), ("streaming", 32, 2)):
            run = named[f"{arch} {arm}"]
            assert (run.arch, run.arm, run.samples_per_batch, run.batches_per_update) == (arch, arm, m, n)
            assert (run.hidden, run.layers, run.steps, run.epochs, run.learning_rate) == (100, 1, 100, 3, 0.01)
            assert (run.p, run.center, run.alpha, run.beta) == (2, None, (0.7, 0.3), (0.7, 0.0, 0.3))
            assert run.validate_every == 20 * n
    assert len(set(named.values())) == len(named), "two names for one run"


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(tmp_path: Path) -> None:
    arguments = Arguments("smoke", tmp_path, seeds=(0,))
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    for name, run in runs(TIERS["smoke"]).items():
        assert f"| {name} |" in page, run
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert all(len(seeds) == 1 and not seeds[0]["failed"] for seeds in results.values())
    assert all(list(r["lengths"]) == ["10", "20", "40"] for seeds in results.values() for r in seeds)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(stamps) == len(results)
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps
