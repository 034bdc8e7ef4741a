"""The studies of references, moments and mini-batches of an update: their claims by hand, and what a neuron keeps."""

from __future__ import annotations

from typing import Any

import pytest

from streamnorm.definition.ref import REFS
from streamnorm.lab.runs.classifier.models import ARMS
from streamnorm.lab.studies.accumulation import claims as _accumulation
from streamnorm.lab.studies.accumulation.runs import name_of
from streamnorm.lab.studies.moments import claims as _moments
from streamnorm.lab.studies.moments.runs import ORDERS
from streamnorm.lab.studies.references import claims as _references
from streamnorm.lab.studies.references.runs import BATCH, SAMPLE, TIERS, locality, looped, plain, runs, streamed
from streamnorm.lab.studies.study import Records

CHECK = {c.id: c.check for of in (_moments, _references, _accumulation) for c in of.CLAIMS}


def of(test: float, train: float = 0.5, **line: float) -> list[dict[str, Any]]:
    """Three seeds of a run with these errors."""
    last = {"test_error": test, "train_error": train, **line}
    return [{"metrics": [last], "failed": None} for _ in range(3)]


def plain_records(**errors: float) -> Records:
    names = {f"{prefix}{name}": name for prefix in ("", "C ") for name in (*SAMPLE, *BATCH)}
    return {f"{label}-B": of(errors.get(name, 0.4)) for label, name in names.items()}


def test_a_neuron_of_ba6_keeps_nothing_of_any_other_and_one_of_ba1_does() -> None:
    assert not locality("BA6")
    assert locality("BA1")
    assert locality("BA4")


def test_every_run_has_an_arm_and_the_loops_test_with_an_estimate_of_each_step() -> None:
    tier = TIERS["reduced"]
    assert {run.arm for run in runs(tier).values()} <= set(ARMS)
    assert all(run.arm in ("batch", "layer", f"{name}-B") for name, run in zip(REFS, plain(tier).values(), strict=True))
    assert [run.center for run in streamed(tier).values()] == ["batch"] * len(REFS)
    assert [looped(tier)[f"C {name}-B"].arm for name in BATCH] == ["tsbn", *(f"{name}-T" for name in BATCH[1:])]


@pytest.mark.parametrize(
    ("claim", "errors", "verdict"),
    [
        ("C-15", {}, "reproduced"),
        ("C-15", {"SP1": 0.5, "SP4": 0.55}, "contradicted"),
        ("C-15", {"SP1": 0.5, "SP2": 0.5, "SP3": 0.5, "SP4": 0.55, "SP5": 0.5}, "reproduced"),
        ("C-16", {"BA3": 0.5, "BA2": 0.5, "BA5": 0.5}, "reproduced"),
        ("C-16", {"BA3": 0.5}, "partly"),
        ("C-16", {"BA3": 0.3, "BA2": 0.3, "BA5": 0.3}, "contradicted"),
        ("C-17", {"BA6": 0.41}, "reproduced"),
        ("C-17", {"BA6": 0.3}, "reproduced"),
        ("C-17", {"BA6": 0.43}, "contradicted"),
    ],
)
def test_claims_of_references(claim: str, errors: dict[str, float], verdict: str) -> None:
    assert CHECK[claim](plain_records(**errors))[0] == verdict


@pytest.mark.parametrize(
    ("lower", "verdict"),
    [(tuple(REFS), "reproduced"), (("BA1", "BA4", "BA6"), "partly"), (("SP1",), "contradicted"), ((), "contradicted")],
)
def test_streaming_lowers_training_errors_if_it_does_for_most(lower: tuple[str, ...], verdict: str) -> None:
    records = {f"{name}-B": of(0.5, 0.5) for name in REFS}
    records |= {f"{name}-S": of(0.5, 0.4 if name in lower else 0.5) for name in REFS}
    assert CHECK["C-31"](records)[0] == verdict


def test_every_reference_streams_unless_one_fails_or_is_at_chance() -> None:
    records = {f"{name}-S": of(0.5) for name in REFS}
    assert CHECK["C-64"](records)[0] == "reproduced"
    assert CHECK["C-64"]({**records, "SP3-S": of(0.89)})[0] == "partly"
    assert CHECK["C-64"]({**records, "SP3-S": [{"metrics": [], "failed": "diverged"}] * 3})[0] == "partly"


@pytest.mark.parametrize(
    ("last", "third", "verdict"),
    [(0.42, 0.41, "reproduced"), (0.44, 0.41, "partly"), (0.39, 0.41, "partly"), (0.42, 0.43, "partly")],
)
def test_moments_are_alike_if_each_is_near_and_the_last_slightly_worse(last: float, third: float, verdict: str) -> None:
    records = {f"L{p}": of({3: third, 7: last}.get(p, 0.4)) for p in ORDERS}
    assert CHECK["C-06"](records)[0] == verdict


@pytest.mark.parametrize(("two", "verdict"), [(1.09, "reproduced"), (1.15, "contradicted"), (0.9, "reproduced")])
def test_two_mini_batches_are_enough_with_four_fifths_of_the_gain(two: float, verdict: str) -> None:
    losses = {1: 1.5, 2: two, 4: 1.0, 8: 1.0}
    records = {
        name_of(network, n): of(0.5, train_loss=loss, validation_loss=loss)
        for network in ("C", "RNN")
        for n, loss in losses.items()
    }
    assert CHECK["C-65"](records)[0] == verdict
