"""The study of the special case: its pair trains alike, and its claim is judged by how they test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toy import to_the_end, toy

from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.studies.specialcase.claims import CLAIMS
from streamnorm.lab.studies.specialcase.runs import AVERAGE, LAST, RUNS
from streamnorm.nn.norm import norms


def test_the_pair_trains_alike_and_tests_with_other_statistics() -> None:
    data = toy(train=128)
    trainers = [
        Trainer(replace(run, data=data.name, architecture="A", width=8, epochs=1, train_limit=None), data)
        for run in RUNS.values()
    ]
    for trainer in trainers:
        assert to_the_end(trainer).done == 4
    weights = [[p.detach() for p in trainer.model.parameters()] for trainer in trainers]
    for a, b in zip(*weights, strict=True):
        # One formula in another order of float32 operations, over 4 updates.
        assert a.numpy() == pytest.approx(b.numpy(), rel=1e-3, abs=1e-5)
    estimates = [[layer.H1.estimate for layer in norms(trainer.model) if layer.H1] for trainer in trainers]
    assert not all((a - b).abs().max() < 1e-3 for a, b in zip(*estimates, strict=True))


@pytest.mark.parametrize(("last", "verdict"), [(0.42, "reproduced"), (0.40, "reproduced"), (0.45, "contradicted")])
def test_the_claim_allows_a_point_and_a_half(last: float, verdict: str) -> None:
    def record(error: float) -> dict[str, Any]:
        return {"metrics": [{"test_error": error, "train_loss": 1.0}], "failed": None}

    assert CLAIMS[0].check({AVERAGE: [record(0.41)], LAST: [record(last)]})[0] == verdict
