"""Runs: the values that they refuse, and their way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from toy import small

from streamnorm.lab.runs.classifier.run import Run

WHOLE, FINITE = "a whole number >= 1", "a finite number >= 0"
SIZES = ("width", "samples_per_batch", "batches_per_update", "epochs")
RATES = ("learning_rate", "momentum", "weight_decay")
REFUSED = [
    *[(name, value, WHOLE) for name in SIZES for value in (0, -3, 2.5, "8", None)],
    *[(name, value, FINITE) for name in RATES for value in (-0.1, math.inf, math.nan)],
    ("architecture", "E", '"A" (fully connected), "B" (convolutional)'),
    ("warmup", -1, "a whole number >= 0"),
]


@pytest.mark.parametrize(("name", "value", "mend"), REFUSED)
def test_a_run_refuses_an_impossible_value_and_says_what_came_and_what_may_come(
    name: str, value: Any, mend: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} is ") as refusal:
        Run(**{name: value})
    assert f"got {value!r}" in str(refusal.value)
    assert mend in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [("momentum", 0), ("learning_rate", 0.0), ("warmup", 0), ("width", 1)])
def test_a_run_takes_the_smallest_values_it_names(name: str, value: float) -> None:
    assert getattr(Run(**{name: value}), name) == value


FULL = Run(
    data="mnist",
    architecture="C",
    loops=(2, 3),
    width=24,
    arm="BA6-S",
    p=1.5,
    center="zero",
    alpha=(0.6, 0.4),
    beta=(0.5, 0.3, 0.2),
    kappa=(0.8, 0.2, 0.9, 0.1),
    backward_stats="latest",
    samples_per_batch=3,
    batches_per_update=5,
    epochs=7,
    learning_rate=0.02,
    momentum=0.5,
    weight_decay=1e-4,
    warmup=3,
    seed=11,
    train_limit=100,
    test_limit=50,
)


@pytest.mark.parametrize("run", [Run(), FULL], ids=["defaults", "nothing default"])
def test_a_run_comes_back_from_json_as_it_was(run: Run) -> None:
    text = json.dumps(run.to_json(), allow_nan=False)
    assert Run.from_json(json.loads(text)) == run


def test_the_run_of_the_round_trip_has_no_default_left() -> None:
    assert [f.name for f in dataclasses.fields(Run) if getattr(FULL, f.name) == f.default] == []


def test_a_field_that_json_leaves_out_takes_its_default() -> None:
    assert Run.from_json({"width": 16}) == Run(width=16)


def test_an_unknown_field_is_refused_by_name_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="has no dropout, wdith; it has") as refusal:
        Run.from_json({"wdith": 16, "dropout": 0.5, "width": 8})
    assert all(f.name in str(refusal.value) for f in dataclasses.fields(Run))


def test_json_with_an_impossible_value_is_refused_like_the_constructor() -> None:
    with pytest.raises(ValueError, match="width is a whole number >= 1, got 0"):
        Run.from_json({"width": 0})


def test_a_run_cannot_be_changed_and_can_be_a_key() -> None:
    run = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.width = 9  # type: ignore[misc]
    assert {run: 1}[small()] == 1


def test_a_run_knows_its_samples_per_update_and_its_label() -> None:
    run = small(arm="BA6-S", samples_per_batch=3, batches_per_update=5)
    assert run.samples_per_update == 15
    assert run.label == "BA6-S 3 S/B x 5 B/U"
