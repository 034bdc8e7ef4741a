"""Runs that studies share are trained once, and nothing else passes for one of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.listing import ONCE, listed
from streamnorm.lab.studies.once import carry_out_once, missing, path_of, recorded, seeded
from streamnorm.lab.studies.registry import STUDIES
from streamnorm.reading import ReadError

RUN = Run(arm="layer", width=4, epochs=1, train_limit=64, test_limit=16, samples_per_batch=32, batches_per_update=1)


def test_a_run_of_two_names_is_trained_once_and_again_by_nobody(tmp_path: Path) -> None:
    said: list[str] = []
    runs = {"one": RUN, "other": replace(RUN), "third": replace(RUN, arm="none")}
    assert len(missing(runs, (0, 1), tmp_path)) == 4
    records = carry_out_once(runs, (0, 1), None, tmp_path, said.append)
    assert [line.split(":")[0] for line in said] == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("one", "third")
    ]
    assert [r["seed"] for r in records["other"]] == [0, 1]
    assert records["one"][0]["metrics"] == records["other"][0]["metrics"]
    assert {r["label"] for r in records["other"]} == {"other"}
    assert not missing(runs, (0, 1), tmp_path)
    assert carry_out_once(runs, (0, 1), None, tmp_path, said.append) == records
    assert len(said) == 4


def test_what_is_recorded_is_told_without_training(tmp_path: Path) -> None:
    carry_out_once({"one": RUN}, (1,), None, tmp_path, lambda line: None)
    assert recorded({"one": RUN, "third": replace(RUN, arm="none")}, (0, 1), tmp_path)["third"] == []
    assert [r["seed"] for r in recorded({"one": RUN}, (0, 1), tmp_path)["one"]] == [1]
    assert [run.seed for run in seeded({"a": RUN, "b": RUN}, (3, 4))] == [3, 4]


def test_a_file_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    carry_out_once({"one": RUN}, (0,), None, tmp_path, lambda line: None)
    path = path_of(RUN, tmp_path)
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "run": {**held["run"], "width": 5}}))
    with pytest.raises(ReadError, match=r"does not hold the run of its name.*width 5 there and 4 here"):
        recorded({"one": RUN}, (0,), tmp_path)


def test_the_list_tells_what_is_recorded_missing_and_how_long_it_takes(tmp_path: Path) -> None:
    (tmp_path / "2026-01-02-online.md").write_text("")
    lines = {line.split()[0]: line for line in listed(Arguments("smoke", tmp_path / "none"), tmp_path)}
    assert set(lines) == set(STUDIES)
    assert "recorded 2026-01-02" in lines["online"]
    assert "not recorded" in lines["mnist"]
    for name in ONCE:
        assert "0 of " in lines[name]
        assert "not known yet" in lines[name]
