"""What processes do differently from each other ends in one state of all, or in one clear error; nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trouble
from processes import Job, results_by_job
from replicas import inputs, together

BY = 1e-12
"""float64, as in ``test_update.py``."""
DATA = inputs(2, 3)
COUNTERS = "H1.counter_count_held_seen_skipped"

JOBS: dict[str, Job] = {
    "uncalled": (trouble.uncalled, DATA),
    "frozen": (trouble.frozen, DATA, (0, 1)),
    "frozen in one": (trouble.frozen, DATA, (0,)),
    "busy": (trouble.busy, DATA),
    "quiet": (trouble.quiet, DATA[0][0][0]),
    "copied wrapper": (trouble.copied_wrapper, DATA),
    "compiled": (trouble.compiled, DATA),
    "apart": (trouble.apart, DATA),
    "scaled": (trouble.scaled, DATA),
    "without parameters": (trouble.without_parameters,),
}
Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    return results_by_job(2, JOBS)


def expect_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Digit by digit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def expect_as_copies(seen: list[list[Any]], merges: bool = True) -> None:
    """Outputs, weights and buffers of each process are those of copies in one process."""
    for update, by_process in enumerate(together(2, "samples", DATA, merges=merges)):
        for rank, want in enumerate(by_process):
            got = seen[rank][update]
            for what in ("gradients", "weights", "buffers"):
                assert got[what].keys() == want[what].keys()
                for name, value in want[what].items():
                    torch.testing.assert_close(got[what][name], value, rtol=BY, atol=BY, msg=f"{name}: {{}}".format)
            torch.testing.assert_close(got["outputs"][0], want["outputs"][0], rtol=BY, atol=BY)


@pytest.mark.parametrize("job", ["uncalled", "copied wrapper", "scaled", "without parameters"])
def test_all_end_in_one_state(job: str, found: Found) -> None:
    expect_alike(*found[job])


def test_a_layer_that_one_process_never_calls_has_the_statistics_of_the_others(found: Found) -> None:
    one, _ = found["uncalled"]
    count, held, seen, skipped = one["last." + COUNTERS].tolist()
    assert (count, held, seen, skipped) == (0, 9, 3, 0)
    assert one["first.1." + COUNTERS].tolist() == [0, 18, 6, 0]


@pytest.mark.parametrize("job", ["frozen", "frozen in one"])
def test_a_frozen_layer_leaves_the_processes_alike(job: str, found: Found) -> None:
    for one, other in zip(*found[job], strict=True):
        expect_alike(one, other)
    first, *_, last = found[job][0]
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == ({"4"} if job == "frozen" else {"1", "4"})


def test_copies_of_one_process_disturb_no_other(found: Found) -> None:
    expect_as_copies([seen for seen, _ in found["busy"]])
    (_, said), (_, nothing) = found["busy"]
    assert any(line.startswith("the copy of a model that several processes train together") for line in said)
    assert not nothing
    assert found["quiet"] == [0, 0]


def test_a_copy_of_the_wrapper_goes_on_merging(found: Found) -> None:
    assert found["copied wrapper"][0]["1." + COUNTERS].tolist() == [0, 18, 6, 0]


def test_a_compiled_wrapper_is_no_other(found: Found) -> None:
    expect_as_copies(found["compiled"])


def test_processes_that_share_nothing_have_statistics_of_their_own(found: Found) -> None:
    expect_as_copies(found["apart"], merges=False)


def test_a_step_that_one_process_leaves_out_on_its_device_counts_in_all(found: Found) -> None:
    assert found["scaled"][0]["1." + COUNTERS].tolist() == [0, 18, 6, 0]


def test_layers_without_parameters_follow_what_their_wrapper_holds(found: Found) -> None:
    assert found["without parameters"][0]["1." + COUNTERS].tolist() == [0, 15, 5, 0]


def test_a_step_that_one_process_leaves_out_is_an_error_in_the_other() -> None:
    one, other = results_by_job(2, {"left out": (trouble.left_out, DATA[:2])})["left out"]
    assert not one
    assert other.startswith("2 processes did not come together to merge statistics at a weight update")
