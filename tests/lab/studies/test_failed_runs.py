"""A run that failed, or whose test was not finite, is a row that says so: in no study does it end claims, tables or
pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from streamnorm.lab.runs.autoencoder.data import load_documents
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.studies.pipeline.runs import EPSILONS
from streamnorm.lab.studies.record import write_results
from streamnorm.lab.studies.study import Records, deviation, first_at, judge, spread

Record = dict[str, Any]
SEEDS = (0, 1, 2)


def test_spread_says_what_was_not_finite() -> None:
    assert spread([1.0, math.nan, math.inf]) == "1 of 3 seeds could not train, 1 of 3 seeds not finite"
    assert spread([math.inf, 1.0]) == "1 of 2 seeds not finite"
    assert math.isnan(deviation([math.nan, 1.0]))
    assert deviation([1.0]) == 0
    assert judge([math.inf, math.inf], 0.5) == "reproduced"
    assert first_at([(1, math.inf), (2, 1.0)], 1.5) == 2


# --- Made-up records of every study, as its ``carry_out`` and what follows it leave them


def image_record(run: Any, failed: bool, endless: bool) -> Record:
    line = {"updates": 1, "samples": 1, "train_loss": 0.5, "train_error": 0.5, "test_loss": 0.5, "test_error": 0.5}
    line |= {"seconds": 1.0} | ({"test_loss": None, "test_error": 1.0} if endless else {})
    return {"metrics": [] if failed else [{**line, "epoch": i + 1} for i in range(run.epochs)]}


def mnist_record(run: Any, failed: bool, endless: bool) -> Record:
    look = {"test_error": 0.5, "percentiles": [[0.0] * 2] * 3, "unsaturated": 0.5, "weights": 1.0}
    trace = [{**look, "updates": i} for i in (8, 16)]
    return {**image_record(run, failed, endless), "trace": [] if failed else trace}


def pipeline_record(run: Any, failed: bool, endless: bool) -> Record:
    way = dict.fromkeys(("test_loss", "mean", "sigma", "first"), None if endless else 0.5) | {"test_error": 0.5}
    ways = ("one", "exact", *(f"{kind} {m}" for kind in ("moving", "corrected", "single") for m in (4, 64)))
    found = {"cost": {"parameters": 1, "kept": 1, "test_seconds": 1.0}}
    found |= {"epsilon": {f"{eps:g}": None for eps in EPSILONS}}
    measures = {} if failed else {"measures": dict.fromkeys(ways, way) | {"passes": 1, "seconds": 1.0}}
    return {**image_record(run, failed, endless), **found, **measures}


def unrolled_record(run: Any, failed: bool, endless: bool) -> Record:
    k = run.loops[0]
    along = [(k, 0.5), (k + 1, None if endless else 0.6)]
    more = {} if failed else {"along": along, "statistics": 9, "sets": k if run.arm == "tsbn" else 1}
    return {**image_record(run, failed, endless), **more}


def text_record(run: Any, failed: bool, endless: bool) -> Record:
    loss = None if endless else 2.0
    line = {"train_loss": 2.0, "train_losses": [2.0] * 3, "validation_loss": loss, "seconds": 1.0, "epoch": 1.0}
    steps = max(run.steps)
    more = {"lengths": {str(n): loss for n in (10, 20, 40)}, "along": [loss] * 4 * steps, "statistics": 3}
    more |= {"drift": [loss] * 9, "noise": 0.1, "mu": [[loss] * 9] * 5, "sigma": [[1.0] * 9] * 5}
    lines = [{**line, "characters": 100 * i} for i in range(1, 5)]
    return {"metrics": [] if failed else lines, **({} if failed else more)}


def documents_record(run: Any, failed: bool, endless: bool) -> Record:
    cost = None if endless else 2.0
    line = {"train_cost": 2.0, "test_cost": cost, "norm": 1.0, "seconds": 1.0}
    keys = ("precision", "units_alike", "units_and_words", "dead", "unsaturated")
    examined = dict.fromkeys(keys, cost) | {"bias": (1e-12, 1e-12)}
    return {"metrics": [] if failed else [line] * run.epochs, "frequencies": 3.0, **({} if failed else examined)}


def records_of(runs: Mapping[str, Any], make: Callable[..., Record], fate: Callable[[str, int], str]) -> Records:
    found: dict[str, list[Record]] = {}
    for name, run in runs.items():
        found[name] = []
        for seed in SEEDS:
            failed, endless = fate(name, seed) == "failed", fate(name, seed) == "endless"
            base = {"label": name, "arm": run.arm, "seed": seed, "run": run.to_json(), "data": "d", "source": "s"}
            base |= {"versions": {"torch": "2"}, "machine": {"cpu": "c"}, "failed": "diverged" if failed else None}
            found[name].append({**base, **make(run, failed, endless)})
    return found


FATES: dict[str, Callable[[str, int], str]] = {
    "all failed": lambda name, seed: "failed",
    "one test not finite": lambda name, seed: "endless" if seed == 1 else "fine",
    "no test finite": lambda name, seed: "endless",
    "every arm loses a seed": lambda name, seed: "failed" if (len(name) + seed) % 3 == 0 else "fine",
}


@pytest.fixture(params=FATES)
def fate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """Its pictures have few dots, and only those of the last fate are laid out: that takes longer than all the rest."""
    begin, layout = Figure.__init__, "constrained" if request.param == [*FATES][-1] else None

    def coarse(self: Figure, *args: Any, **options: Any) -> None:
        begin(self, *args, **{**options, "dpi": 12, "layout": layout})

    monkeypatch.setattr(Figure, "__init__", coarse)
    return FATES[request.param]


def judged(page: Path, claims: Sequence[Any]) -> None:
    said = page.read_text()
    assert all(f"| {claim.id}: {claim.text} | **" in said for claim in claims)
    assert (page.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


def parts(study: str) -> list[Any]:
    """Its runs, its claims and its record."""
    return [import_module(f"streamnorm.lab.studies.{study}.{part}") for part in ("runs", "claims", "study")]


@pytest.mark.parametrize("study", ["online", "convolutional", "specialcase"])
def test_studies_of_images(study: str, fate: Callable[[str, int], str], tmp_path: Path) -> None:
    runs, claims, _ = parts(study)
    named = dict(runs.RUNS)
    if study == "online":
        named[runs.DEGENERATE] = named["streaming 1 x 64"]
    judged(write_results(records_of(named, image_record, fate), claims.CLAIMS, tmp_path, "title"), claims.CLAIMS)


def test_the_study_of_postprocessing(fate: Callable[[str, int], str], tmp_path: Path) -> None:
    runs, claims, study = parts("pipeline")
    records = records_of(runs.runs(runs.TIERS["smoke"]), pipeline_record, fate)
    judged(write_results(records, claims.CLAIMS, tmp_path, "title", study.table(records)), claims.CLAIMS)


def test_the_study_of_sigmoids(fate: Callable[[str, int], str], tmp_path: Path) -> None:
    runs, claims, study = parts("mnist")
    records = records_of(runs.runs(runs.TIERS["smoke"]), mnist_record, fate)
    judged(study.write_results(records, tmp_path, "title"), claims.CLAIMS)


def test_the_study_of_unrolled_networks(fate: Callable[[str, int], str], tmp_path: Path) -> None:
    runs, claims, study = parts("unrolled")
    records = records_of(runs.runs(runs.TIERS["smoke"]), unrolled_record, fate)
    judged(study.write_results(records, tmp_path, "title"), claims.CLAIMS)


def test_the_study_of_language_models(fate: Callable[[str, int], str], tmp_path: Path) -> None:
    runs, claims, study = parts("shakespeare")
    records = records_of(runs.runs(runs.TIERS["smoke"]), text_record, fate)
    judged(study.write_results(records, (10, 20, 40), tmp_path, "title"), claims.CLAIMS)


def test_the_study_of_auto_encoders(
    fate: Callable[[str, int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, claims, study = parts("autoencoder")
    tier = runs.TIERS["smoke"]
    records = records_of(runs.runs(tier), documents_record, fate)
    documents = load_documents(tier.data, vocabulary=tier.vocabulary, train_limit=tier.limit)
    monkeypatch.setattr(study, "trained", lambda path: (None, None, None))
    monkeypatch.setattr(study, "codes", lambda model, words: words.dense())
    judged(study.write_results(records, tier, documents, tmp_path, "title"), claims.CLAIMS)


def test_what_is_not_finite_is_none_in_a_record() -> None:
    made = {"a": [1.0, math.nan, (math.inf, 2)], "b": {"c": "x", "d": True}}
    assert json.dumps(finite(made), allow_nan=False) == '{"a": [1.0, null, [null, 2]], "b": {"c": "x", "d": true}}'
