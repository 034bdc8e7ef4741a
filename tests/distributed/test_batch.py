"""Statistics of the batches of several processes together: as one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Job, results_by_job
from replicas import LAYERS, inputs
from wholebatch import in_batches, whole

BY = 1e-11
"""float64: sums of at most 60 numbers in another order, twice through a network whose sigma is down to 0.01 of mu."""

CASES: dict[tuple[int, str], tuple[str, Any]] = {
    **{(2, kind): (kind, inputs(2, 3)) for kind in LAYERS},
    (4, "samples"): ("samples", inputs(4, 3)),
    (4, "paper"): ("paper", inputs(4, 3)),
    (2, "accumulation"): ("paper", inputs(2, 3, calls=2)),
    (2, "one sample each"): ("batch", inputs(2, 3, samples=(1,))),
    (2, "unequal batches"): ("samples", inputs(2, 3, samples=(1, 5))),
    (4, "unequal batches"): ("p = 3, setting A", inputs(4, 3, samples=(1, 5, 2, 4))),
    (2, "an empty batch"): ("samples", inputs(2, 3, samples=(0, 3))),
    (4, "empty batches"): ("batch", inputs(4, 3, samples=(0, 3, 0, 2))),
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str], list[Any]]:
    """What the processes of all cases saw."""
    made = {}
    for size in (2, 4):
        jobs: dict[str, Job] = {name: (in_batches, *case) for (count, name), case in CASES.items() if count == size}
        made |= {(size, name): result for name, result in results_by_job(size, jobs).items()}
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} processes, {case[1]}")
def test_processes_are_one_with_the_whole_batch(case: tuple[int, str], found: dict[Any, list[Any]]) -> None:
    for update, want in enumerate(whole(*CASES[case])):
        for rank in range(case[0]):
            got = found[case][rank][update]
            for what in ("gradients", "weights", "buffers"):
                assert got[what].keys() == want[what].keys()
                for name, value in want[what].items():
                    where = f"update {update}, process {rank}, {what} of {name}"
                    torch.testing.assert_close(got[what][name], value, rtol=BY, atol=BY, msg=f"{where}: {{}}".format)
            for what in ("outputs", "inputs"):
                for call, parts in enumerate(want[what]):
                    torch.testing.assert_close(got[what][call], parts[rank], rtol=BY, atol=BY)
