"""Ways to train in several processes: wrappers, optimizers, processes without data, copies, what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import unshared
import ways
from processes import Job, results_by_job
from replicas import inputs, loss_of, network, together

BY = 1e-12
"""float64, as in ``test_update.py``."""
DATA = inputs(2, 3)
CYCLES = torch.randn(4, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

JOBS: dict[str, Job] = {
    "accumulated": (ways.accumulated, CYCLES),
    "alike": (ways.alike, inputs(2, 1, calls=3)),
    "copied": (unshared.copied, DATA),
    "joined": (ways.joined, "samples", DATA),
    "joined alone": (ways.joined_alone,),
    "partitioned": (ways.partitioned, "samples", DATA),
    "refused": (unshared.refused,),
    "sharded": (ways.sharded, "samples", DATA),
    "sharded, no gain": (ways.sharded, "no gain", DATA),
    "sharded, paper": (ways.sharded, "paper", DATA),
    "in bfloat16": (ways.sharded_in_bfloat16, DATA),
    "shapes": (ways.shapes_from_the_first_input,),
    "two sizes": (ways.maps_of_two_sizes,),
    "warmed": (ways.warmed,),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    return results_by_job(2, JOBS)


def test_the_state_is_that_of_one_process_that_accumulates_the_batches_of_all(found: dict[str, list[Any]]) -> None:
    layer = ways.accumulating()
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    for update, cycle in enumerate(CYCLES):
        for batch in cycle:
            layer(batch).sum().backward()
        optimizer.step()
        for name, value in layer.H1.members().items():
            for seen in found["accumulated"] if name != "estimate" else ():
                torch.testing.assert_close(seen[update][name], value, rtol=BY, atol=BY)


@pytest.mark.parametrize(
    ("way", "kind"),
    [("partitioned", "samples"), ("sharded", "samples"), ("sharded, paper", "paper"), ("sharded, no gain", "no gain")],
)
def test_other_wrappers_and_optimizers_merge_as_well(way: str, kind: str, found: dict[str, list[Any]]) -> None:
    for update, by_process in enumerate(together(2, kind, DATA)):
        for rank, want in enumerate(by_process):
            got = found[way][rank][update]
            for what in ("weights", "buffers"):
                for name, value in want[what].items():
                    torch.testing.assert_close(got[what][name], value, rtol=BY, atol=BY, msg=f"{name}: {{}}".format)


def test_mixed_precision_of_fully_shard_leaves_statistics_in_float32(found: dict[str, list[Any]]) -> None:
    one, other = found["in bfloat16"]
    assert one["output"] is torch.bfloat16
    for name, buffer in one["buffers"].items():
        assert buffer.dtype is (torch.int64 if "counter" in name else torch.float32)
        assert torch.equal(buffer, other["buffers"][name])
    assert int(one["buffers"]["1.H1.counter_count_held_seen_skipped"][1]) == 18  # 3 updates, 2 processes, 3 samples


def test_processes_that_have_run_out_of_data_go_on_merging(found: dict[str, list[Any]]) -> None:
    one, other = found["joined"]
    assert (len(one), len(other)) == (4, 3)
    for what in ("weights", "buffers"):
        for name, value in one[-1][what].items():
            assert torch.equal(value, other[-1][what][name]), name
    assert int(one[-1]["buffers"]["4.H1.counter_count_held_seen_skipped"][1]) == 3 * 3 + 2 * 3
    two = together(2, "samples", DATA[:2])
    for name, value in two[-1][0]["buffers"].items():
        torch.testing.assert_close(one[1]["buffers"][name], value, rtol=BY, atol=BY)


def test_a_join_that_leaves_the_statistics_out_is_refused_before_anything_changes(found: dict[str, list[Any]]) -> None:
    for said in found["joined alone"]:
        assert "with Join([model, streamnorm.synchronize(model)])" in said


def test_what_is_broadcast_before_a_forward_pass_leaves_collected_statistics_alone(
    found: dict[str, list[Any]],
) -> None:
    alone = network()
    for call, x in enumerate(inputs(2, 1, calls=3)[0][1]):
        y = alone(x)
        loss_of(torch.nn.functional.batch_norm(y, None, None, training=True)).backward()
        for name, value in alone.named_buffers():
            torch.testing.assert_close(found["alike"][1][call]["0." + name], value, rtol=BY, atol=BY)


def test_copies_and_pickled_models_merge_if_they_are_told_to(found: dict[str, list[Any]]) -> None:
    assert found["copied"] == [[False, False, True]] * 2


def test_shapes_come_from_the_process_that_has_data(found: dict[str, list[Any]]) -> None:
    one, other = found["shapes"]
    for name, buffer in one.items():
        assert torch.equal(buffer, other[name])
    assert int(one["1.H1.counter_count_held_seen_skipped"][1]) == 0 + 3 + 2 + 2


def test_maps_of_two_sizes_are_an_error_in_all_processes(found: dict[str, list[Any]]) -> None:
    for said in found["two sizes"]:
        assert "statistics of different shapes" in said


def test_a_warm_up_is_decided_by_all(found: dict[str, list[Any]]) -> None:
    (one, updates), (other, _) = found["warmed"]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [torch.equal(a, b) for a, b in pairwise(one)] == [True, True, True, False, False]
    assert updates == 6


def test_what_cannot_be_shared_is_refused(found: dict[str, list[Any]]) -> None:
    for said in found["refused"]:
        rule, one_sample, window, timed, masked, compiled = said
        assert rule.startswith("NotImplementedError: Largest does not say how several processes merge it")
        assert "looks at one sample" in one_sample
        assert "the reference is a window" in window
        assert "TimeSpecific(norm, steps=n)" in timed
        assert "cannot be taken with a mask" in masked
        assert "cannot be taken under a compiler" in compiled
