"""Another number of processes goes on from what some have saved: two, then four, or one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Job, results_by_job
from replicas import inputs, together, trained

BY = 1e-12
"""float64, as in ``test_update.py``."""
KINDS = "samples", "paper", "renorm"
BEFORE = inputs(2, 2)


@pytest.fixture(scope="module")
def saved() -> dict[str, list[Any]]:
    """What each of two processes has saved."""
    jobs: dict[str, Job] = {kind: (trained, kind, BEFORE) for kind in KINDS}
    return {kind: [seen[-1]["state"] for seen in found] for kind, found in results_by_job(2, jobs).items()}


@pytest.mark.parametrize("size", [4, 1])
def test_others_go_on_where_two_stopped(size: int, saved: dict[str, list[Any]]) -> None:
    data = inputs(size, 2, seed=1)
    jobs: dict[str, Job] = {kind: (trained, kind, data, "", None, saved[kind][-1]) for kind in KINDS}
    found = results_by_job(size, jobs)
    for kind in KINDS:
        wanted = together(size, kind, data, start=together(2, kind, BEFORE)[-1][0]["state"])
        for update, by_process in enumerate(wanted):
            for rank, want in enumerate(by_process):
                got = found[kind][rank][update]
                for what in ("gradients", "weights", "buffers"):
                    for name, value in want[what].items():
                        torch.testing.assert_close(got[what][name], value, rtol=BY, atol=BY, msg=f"{name}: {{}}".format)
                torch.testing.assert_close(got["outputs"][0], want["outputs"][0], rtol=BY, atol=BY)
