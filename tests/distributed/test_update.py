"""Statistics merged once a weight update: several processes against copies of a model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Job, results_by_job
from replicas import LAYERS, inputs, together, trained

BY = 1e-12
"""float64: some 100 operations deep, sums over at most 50 numbers, in another order."""

CASES: dict[tuple[int, str], tuple[str, Any, str, dict[str, Any]]] = {
    **{(2, kind): (kind, inputs(2, 3), "", {}) for kind in LAYERS},
    (4, "samples"): ("samples", inputs(4, 3), "", {}),
    (4, "paper"): ("paper", inputs(4, 3), "", {}),
    (2, "unequal batches"): ("samples", inputs(2, 3, samples=(1, 5)), "", {}),
    (4, "unequal batches"): ("samples", inputs(4, 3, samples=(1, 5, 2, 4)), "", {}),
    (2, "an empty batch"): ("samples", inputs(2, 3, samples=(0, 3)), "", {}),
    (4, "empty batches"): ("batch", inputs(4, 3, samples=(0, 3, 0, 2)), "", {}),
    (2, "accumulation"): ("samples", inputs(2, 3, calls=3), "no_sync", {}),
    (2, "accumulation, paper"): ("paper", inputs(2, 3, calls=3), "no_sync", {}),
    (2, "accumulation that communicates"): ("samples", inputs(2, 3, calls=2), "", {}),
    (2, "batches of another number"): ("samples", [[a, b[:1]] for a, b in inputs(2, 3, calls=3)], "no_sync", {}),
    (2, "two forwards"): ("samples", inputs(2, 3, calls=2), "two forwards", {}),
    (2, "static graph"): ("samples", inputs(2, 4), "", {"static_graph": True}),
    (2, "unused parameters"): ("samples", inputs(2, 3), "", {"find_unused_parameters": True}),
    (2, "no buffers"): ("samples", inputs(2, 3), "", {"init_sync": True, "gradient_as_bucket_view": True}),
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str], list[Any]]:
    """What the processes of all cases saw."""
    made = {}
    for size in (2, 4):
        mine = {name: case for (count, name), case in CASES.items() if count == size}
        jobs: dict[str, Job] = {
            name: (trained, kind, data, how, options) for name, (kind, data, how, options) in mine.items()
        }
        made |= {(size, name): result for name, result in results_by_job(size, jobs).items()}
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} processes, {case[1]}")
def test_processes_are_copies_that_merge_at_each_update(case: tuple[int, str], found: dict[Any, list[Any]]) -> None:
    size, (kind, data, how, _) = case[0], CASES[case]
    wanted = together(size, kind, data, "two forwards" if how == "two forwards" else "")
    for update, by_process in enumerate(wanted):
        for rank, want in enumerate(by_process):
            got = found[case][rank][update]
            for what in ("gradients", "weights", "buffers"):
                assert got[what].keys() == want[what].keys()
                for name, value in want[what].items():
                    where = f"update {update}, process {rank}, {what} of {name}"
                    same = found[case][0][update][what][name]
                    torch.testing.assert_close(got[what][name], value, rtol=BY, atol=BY, msg=f"{where}: {{}}".format)
                    assert torch.equal(got[what][name], same), f"{where}: not digit by digit that of process 0"
            for y, like in zip(got["outputs"], want["outputs"], strict=True):
                torch.testing.assert_close(y, like, rtol=BY, atol=BY)
