"""The study of streams: rows, runs and comparisons by hand, and a smoke run from end to end."""

from __future__ import annotations

import gzip
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.streams import runs as streamruns
from streamnorm.lab.studies.streams.claims import (
    CLAIMS,
    STABLE,
    WHOLE,
    around,
    best,
    cells_behind,
    gains,
    settings,
    smooth,
)
from streamnorm.lab.studies.streams.data import GENERATORS, STREAMS, load, made_up, standardized
from streamnorm.lab.studies.streams.runs import (
    ARMS,
    STEP,
    TIERS,
    Source,
    StreamRun,
    accuracy,
    carry_out,
    kept,
    learn,
    many_seeds,
    name_of,
    network,
    path_of,
    runs,
)
from streamnorm.lab.studies.streams.study import main

CHECK = {claim.id: claim.check for claim in CLAIMS}
RUN = StreamRun("Bananas", "raw", "layer", "SGD", 0.1)


# --- Rows


def test_features_are_standardized_by_the_rows_so_far_and_clipped() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1e4
    x[-1, 0] = 1e7
    found = standardized(x)
    for row in (5, 40):
        seen = x[: row + 1].double()
        expected = (seen[-1] - seen.mean(0)) / seen.std(0, correction=0)
        # Squares about the first row, of order 10: float64 leaves 1e-14, the result is rounded to float32.
        assert torch.allclose(found[row].double(), expected, rtol=1e-6, atol=1e-6)
    assert found[-1, 0] == pytest.approx(59**0.5), "one far row of n is sqrt(n - 1) deviations away"
    assert standardized(torch.cat([x, x, x])).abs().max() <= 10
    assert not standardized(torch.ones(5, 2)).any(), "what never varies is 0"


def test_elec2_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMNORM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"stream/elec2.csv.gz .*no data folder was given.*--data-root FOLDER"):
        load("Elec2")
    (tmp_path / "stream").mkdir()
    with gzip.open(tmp_path / "stream" / "elec2.csv.gz", "wt") as file:
        file.write("a,b,class\n0.5,2,1\n0.25,3,0\n0,4,1\n")
    stream = load("Elec2", tmp_path)
    assert stream.x.tolist() == [[0.5, 2], [0.25, 3], [0, 4]]
    assert (stream.y.tolist(), stream.classes, stream.drift) == ([1, 0, 1], 2, None)
    (tmp_path / "stream" / "elec2.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="is no table of numbers"):
        load("Elec2", tmp_path)


def test_a_stream_of_river_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"package river, which is not installed .*pip install river==0.26.1"):
        load("Bananas")
    with pytest.raises(ValueError, match="unknown stream 'Banana'; the streams are Elec2, Bananas"):
        load("Banana")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_changes_after_half_of_its_rows(name: str) -> None:
    pytest.importorskip("river")
    one, same, other = load(name, seed=1), load(name, seed=1), load(name, seed=2)
    assert (len(one), one.drift) == (4000, 2000)
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.y, same.y)
    assert not torch.equal(one.x, other.x)


# --- Runs


def test_all_arms_begin_with_the_same_weights() -> None:
    def weights(arm: str) -> list[torch.Tensor]:
        model = network(arm, 3, 2, 7)
        return [m.weight for m in model if isinstance(m, torch.nn.Linear)]

    for arm in ARMS:
        assert all(torch.equal(a, b) for a, b in zip(weights(arm), weights("layer"), strict=True)), arm


def test_every_row_is_predicted_before_it_is_learned() -> None:
    stream = made_up("Bananas", 0, 120)
    record = learn(RUN, stream)
    model = network("layer", 3, 2, 0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    right = []
    for x, y in zip(stream.x.double().split(1), stream.y.split(1), strict=True):
        output = model(x)
        right.append(int(output.argmax() == y))
        optimizer.zero_grad()
        F.cross_entropy(output, y).backward()
        optimizer.step()
    counts = [sum(right[i : i + STEP]) for i in range(0, 120, STEP)]
    # A row whose two outputs are within float32's rounding of each other may fall on either side; none is here.
    assert record["right"] == counts
    assert (record["learned"], record["of"], record["diverged"]) == (120, 120, None)
    assert learn(replace(RUN, rows=100), stream)["right"] == counts[:2]


def test_what_diverged_is_wrong_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = made_up("Bananas", 0, 3 * STEP)

    def lost(model: Any, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = F.one_hot(y, 2).float()
        if torch.equal(x, stream.x[STEP : 2 * STEP]):
            outputs[10] = torch.nan
        return outputs

    monkeypatch.setattr(streamruns, "_in_a_loop", lost)
    record = learn(replace(RUN, arm="rms"), stream)
    assert record["right"] == [STEP, 10, 0]
    assert record["diverged"] == STEP + 10
    assert accuracy(record) == (STEP + 10) / (3 * STEP)


def test_a_run_is_kept_and_one_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    source = Source(made_up=100)
    (first,) = carry_out([RUN], source, tmp_path, say=lambda _: None)[RUN.name]
    assert kept(RUN, tmp_path) == first
    assert kept(replace(RUN, seed=1), tmp_path) is None
    assert kept(replace(RUN, rows=50), tmp_path) is None
    path = path_of(RUN, tmp_path)
    for content in (json.dumps({**first, "rate": 0.2}), "{", "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"does not hold the run Bananas, raw, layer, SGD 0.1, seed 0; delete it"):
            kept(RUN, tmp_path)


# --- Comparing


def record(stream: str, arm: str, rate: float, seed: int, value: float, **more: Any) -> dict[str, Any]:
    """A run on 200 rows, of which it was right about the share ``value`` in each part."""
    return {
        **StreamRun(stream, "raw", arm, "SGD", rate, seed).to_json(),
        "learned": 200,
        "of": 200,
        "right": [round(value * STEP)] * (200 // STEP),
        "diverged": None,
        "drift": None,
        **more,
    }


def made(cells: dict[tuple[str, str, float], tuple[float, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name_of(stream, "raw", arm, "SGD", rate): [record(stream, arm, rate, i, v) for i, v in enumerate(values)]
        for (stream, arm, rate), values in cells.items()
    }


def everywhere(**arms: float) -> dict[str, list[dict[str, Any]]]:
    return made({(stream, arm, 0.01): (value,) * 3 for stream in STREAMS for arm, value in arms.items()})


def test_accuracy_is_of_any_rows_that_were_counted() -> None:
    own = record("SEA", "layer", 0.1, 0, 0, learned=180, right=[50, 40, 30, 15], drift=100)
    assert accuracy(own) == 135 / 180
    assert accuracy(own, 100) == 0.9
    assert accuracy(own, 1000, 50) == 85 / 130
    assert around(own, 50) == (0.8, 0.6, 45 / 80)
    assert smooth(own, 2) == [(100, 0.9), (150, 0.7)]
    with pytest.raises(ValueError, match="counts every 50 rows, got rows 0 to 70"):
        accuracy(own, 70)


def test_arms_are_compared_at_their_best_rates_of_those_that_both_have_on_the_rows_of_both() -> None:
    view = next(view for view in WHOLE if view.name == "SEA")
    records = made({("SEA", "default", 0.01): (0.8, 0.9), ("SEA", "default", 0.1): (0.6, 0.6)})
    records |= made({("SEA", "layer", r): v for r, v in ((0.01, (0.5, 0.5)), (0.1, (0.7, 0.7)), (0.03, (1.0, 1.0)))})
    assert gains(records, view, "raw", "default", "layer") == pytest.approx([0.1, 0.2])
    short = records["SEA, raw, layer, SGD 0.1"]
    for own in short:
        own.update(learned=100, right=[40, 40])
    assert gains(records, view, "raw", "default", "layer") == pytest.approx([0.0, 0.1])
    assert best(settings(records, view, "raw", "default"), 200) == ("SGD", 0.01)
    assert gains(records, view, "raw", "default", "rms") == []


@pytest.mark.parametrize(
    ("claim", "arms", "verdict"),
    [
        ("ST-1", {"default": 0.7, "layer": 0.7}, "reproduced"),
        ("ST-1", {"default": 0.6, "layer": 0.7}, "contradicted"),
        ("ST-2", {"default": 0.74, "layer": 0.7}, "reproduced"),
        ("ST-2", {"default": 0.72, "layer": 0.7}, "partly"),
        ("ST-2", {"default": 0.6, "layer": 0.7}, "contradicted"),
        ("ST-3", {"default": 0.72, "none": 0.7}, "reproduced"),
        ("ST-3", {"default": 0.7, "none": 0.7}, "contradicted"),
        ("ST-4", {"default": 0.84}, "reproduced"),
        ("ST-4", {"default": 0.7}, "contradicted"),
        ("ST-5", {"default": 0.7}, "reproduced"),
        ("ST-6", {"default": 0.7, "paper": 0.6}, "reported"),
    ],
)
def test_verdicts(claim: str, arms: dict[str, float], verdict: str) -> None:
    assert CHECK[claim](everywhere(**arms))[0] == verdict


def test_every_cell_that_is_behind_is_listed() -> None:
    records = everywhere(default=0.7, layer=0.7)
    records |= made({("Phishing", "default", 0.01): (0.68, 0.7, 0.66)})
    count, behind = cells_behind(records)
    assert count == len(STREAMS) + 1, "the first rows of Elec2 are one more"
    ((name, apart),) = behind
    assert name == "Phishing, raw, default, SGD 0.01"
    assert apart == pytest.approx([-0.02, 0.0, -0.04])


def test_one_seed_of_many_that_diverges_contradicts() -> None:
    records = everywhere(default=0.7)
    name = name_of("Bananas", "raw", "default", "SGD", 0.1)
    records[STABLE + name] = [
        record("Bananas", "default", 0.1, s, 0.5, diverged=7 if s == 3 else None) for s in range(5)
    ]
    verdict, figures = CHECK["ST-5"](records)
    assert verdict == "contradicted"
    assert "SGD 0.1: 1 of 5 seeds" in figures


# --- The study


@pytest.mark.parametrize("tier", ["reduced", "full"])
def test_the_sizes_of_the_study(tier: str) -> None:
    size = TIERS[tier]
    assert len(size.seeds) >= 5
    named = runs(size, size.seeds)
    assert len(set(named)) == len(named)
    assert {run.arm for run in named} == set(ARMS)
    assert {run.stream for run in named} == set(STREAMS)
    for arm in ARMS:
        rates = {run.rate for run in named if (run.arm, run.optimizer) == (arm, "SGD")}
        assert rates >= {0.01, 0.03, 0.1}
    assert {(run.stream, run.rate, run.arm) for run in many_seeds(size)} == {
        ("Elec2", 0.1, "default"),
        ("Bananas", 0.1, "default"),
    }
    assert len(many_seeds(size)) == 40


def test_a_smoke_run_goes_from_rows_to_the_record_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Arguments("smoke", tmp_path)
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    for arm in ARMS:
        assert f"\n| {arm} | " in page
    for name in ("heat", "rates", "drift"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert sum(name.startswith(STABLE) for name in results) == 2
    assert len(results) == len(runs(TIERS["smoke"], (0,))) + 2

    def never(*_: Any) -> None:
        raise AssertionError("done twice")

    monkeypatch.setattr(streamruns, "learn", never)
    assert main(arguments).read_text() == page
