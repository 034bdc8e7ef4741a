"""The study of language models: its parts by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import small, tiny, to_the_end

from streamnorm.lab.runs.language.loop import TextTrainer
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.shakespeare.claims import CLAIMS, faster, lower, reached, rise
from streamnorm.lab.studies.shakespeare.figures import FIGURES, smooth
from streamnorm.lab.studies.shakespeare.runs import PAPER, TIERS, runs, statistics_over_time
from streamnorm.lab.studies.shakespeare.study import main


def record(*curve: float | None, failed: str | None = None, **more: Any) -> dict[str, Any]:
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
    assert rise(record(1.0, run={"steps": [2]}, along=along)) == 0.75
    assert math.isnan(rise(record(failed="diverged")))


def test_statistics_over_time_are_those_of_the_steps() -> None:
    text = tiny()
    model = to_the_end(TextTrainer(small(carry_state=False), text)).model
    found = statistics_over_time(model, text, 10)
    n = len(text.train) // 10
    assert found["noise"] == n**-0.5
    cell = model.recurrent.cells["l0"]
    model.eval()
    with torch.no_grad():  # step by step, each from the sequences' own state
        steps, h = [], None
        for t in range(9):
            _, h = model(text.train[t : n * 10 : 10][None], h)
            steps.append((h[0] @ cell.weight_hh.T).double())
    mu, sigma = torch.stack([a.mean(0) for a in steps]), torch.stack([a.std(0) for a in steps])
    moved = (mu - mu.mean(0)) / sigma.mean(0)
    # float32 activations of order 1; a unit's own sigma is not tiny.
    assert found["drift"] == pytest.approx((moved**2).mean(1).sqrt().tolist(), abs=1e-4)
    steadiest, wildest = ((moved**2).sum(0).argsort()[i] for i in (0, -1))
    assert found["mu"][0] == pytest.approx(moved[:, steadiest].tolist(), abs=1e-4)
    assert found["mu"][-1] == pytest.approx(moved[:, wildest].tolist(), abs=1e-4)
    assert found["sigma"][-1] == pytest.approx((sigma / sigma.mean(0))[:, wildest].tolist(), abs=1e-4)


def test_drift_at_the_first_steps_alone_is_seen() -> None:
    def of(drift: list[float]) -> dict[str, list[dict[str, Any]]]:
        runs = ("rnn streaming", "rnn tsbn", "rnn streaming, state reset", "rnn tsbn, state reset")
        return {name: [record(2.0, drift=drift, noise=0.1)] for name in runs}

    check = next(claim.check for claim in CLAIMS if claim.id == "C-59")
    assert check(of([0.25, 0.1, 0.1]))[0] == "reproduced"
    assert check(of([0.15, 0.1, 0.1]))[0] == "partly"


@pytest.mark.parametrize(
    ("streaming", "tsbn", "verdict"),
    [(0.01, 0.9, "reproduced"), (-0.9, 0.01, "contradicted"), (0.1, -0.9, "reproduced"), (0.1, None, "reproduced")],
)
def test_a_loss_that_falls_beyond_the_trained_steps_has_changed_too(
    streaming: float, tsbn: float | None, verdict: str
) -> None:
    def of(after: float | None) -> list[dict[str, Any]]:
        return [record(1.0, run={"steps": [2]}, along=[1.0, 1.0, 1.0, None if after is None else 1 + 2 * after])] * 3

    arms = {"streaming": of(streaming), "tsbn": of(tsbn)}
    records = {f"rnn {arm}{suffix}": own for arm, own in arms.items() for suffix in ("", ", state reset")}
    assert next(claim.check for claim in CLAIMS if claim.id == "C-34")(records)[0] == verdict


@pytest.mark.parametrize(
    ("relu", "verdict", "said"),
    [
        (record(3.0, 2.9, 2.0), "reproduced", "rnn last 2.0000 ± 0.0000"),
        (record(3.0, 2.9, 9.0), "contradicted", "rnn last 9.0000 ± 0.0000"),
        (record(3.0, None, 2.0), "contradicted", "3 of 3 seeds with a validation not finite"),
        (record(3.0, 2.0, None), "contradicted", "rnn last 3 of 3 seeds not finite"),
        (record(failed="diverged"), "contradicted", "rnn last 3 of 3 seeds could not train"),
    ],
)
def test_relu_has_to_end_lower_than_it_began_and_to_stay_finite(relu: dict[str, Any], verdict: str, said: str) -> None:
    tanh = [record(3.0, 2.0)] * 3
    records = {f"{arch} streaming": tanh for arch in ("rnn", "gru")}
    records |= {f"{arch} streaming, ReLU": [relu] * 3 for arch in ("rnn", "gru")}
    found, figures = next(claim.check for claim in CLAIMS if claim.id == "C-37")(records)
    assert found == verdict
    assert said in figures


def test_mixed_lengths_are_better_in_one_update_if_all_arms_are() -> None:
    check = next(claim.check for claim in CLAIMS if claim.id == "C-33")

    def of(streaming: float, layer: float) -> dict[str, list[dict[str, Any]]]:
        ends = {"streaming, mixed lengths, 3 B/U": streaming, "layer, mixed lengths, 3 B/U": layer}
        ends |= {"streaming, mixed lengths, 1 B/U": 2.0, "layer, mixed lengths, 1 B/U": 2.0}
        return {f"rnn {name}": [record(end, run={"steps": [5, 10]})] for name, end in ends.items()}

    assert check(of(1.9, 1.95))[0] == "reproduced"
    assert check(of(1.9, 2.05))[0] == "partly"
    assert check(of(2.1, 2.05))[0] == "contradicted"


@pytest.mark.parametrize("tier", ["reduced", "full"])
def test_the_runs_have_the_papers_settings(tier: str) -> None:
    named = runs(TIERS[tier])
    for arch in ("rnn", "gru"):
        for arm, m, n in (("tsbn", 64, 1), ("layer", 64, 1), ("streaming", 32, 2)):
            run = named[f"{arch} {arm}"]
            assert (run.arch, run.arm, run.samples_per_batch, run.batches_per_update) == (arch, arm, m, n)
            assert (run.hidden, run.layers, run.steps, run.epochs, run.learning_rate) == (100, 1, (100,), 3, 0.01)
            assert (run.p, run.center, run.alpha, run.beta) == (2, None, (0.7, 0.3), (0.7, 0.0, 0.3))
            assert run.validate_every == 20 * n
    assert len(set(named.values())) == len(named), "two names for one run"
    drawn = {name for names in FIGURES.values() for name in names}
    assert drawn >= set(named), "every run is drawn"
    assert tier == "full" or drawn == set(named)


def test_mixed_lengths_have_equal_samples_an_update_and_are_validated_after_as_many() -> None:
    named = runs(TIERS["reduced"])
    one, three = (named[f"rnn layer, mixed lengths, {n} B/U"] for n in (1, 3))
    assert one.steps == three.steps == (50, 100, 150)
    assert (one.samples_per_batch, three.samples_per_batch) == (96, 32)
    assert (one.samples_per_update, one.validate_every) == (three.samples_per_update, 20)
    assert three.validate_every == 60
    assert not one.carry_state


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
    for claim in CLAIMS:  # a claim names all runs it looks at, beside those of the figures
        claim.check({name: results[name] for name in (*PAPER, *claim.needs)})
    assert all(list(r["lengths"]) == ["10", "20", "40"] for seeds in results.values() for r in seeds)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(stamps) == len(results)
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps


def test_a_tier_without_variants_checks_the_claims_it_has_the_runs_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TIERS, "smoke", replace(TIERS["smoke"], only=PAPER))
    page = main(Arguments("smoke", tmp_path, seeds=(0,))).read_text()
    checked = {claim.id for claim in CLAIMS if f"| {claim.id}: {claim.text} | **" in page}
    assert checked == {"C-28", "C-29", "C-30", "C-61"}
    assert set(json.loads((tmp_path / "results.json").read_text())["records"]) == set(PAPER)
