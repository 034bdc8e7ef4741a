"""The cycle of a language model: what its mini-batches read, how they weigh, and what is tested before the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import same
from texts import seen_by, small, snapshot, tiny, to_the_end
from torch import Tensor

from streamnorm.lab.runs.language.data import chunk
from streamnorm.lab.runs.language.loop import TextTrainer
from streamnorm.lab.runs.language.model import build, evaluate, statistics_kept, validate
from streamnorm.nn.norm import norms

MIXED: dict[str, Any] = {"steps": (3, 8, 4), "batches_per_update": 3, "samples_per_batch": 2, "validate_every": 9}


# --- Lengths that take turns


@pytest.mark.parametrize("lengths", [(7,), (2, 5), (3, 8, 4)])
def test_every_stream_is_read_without_a_gap_and_all_come_equally_far(lengths: tuple[int, ...]) -> None:
    turns = 4
    for batch in range(5):
        at = 0
        for update in range(turns * len(lengths)):
            rows = chunk(lengths, update, batch)
            assert rows.start == at
            at = rows.stop
        assert at == turns * sum(lengths)
    for update in range(turns * len(lengths)):
        read = [chunk(lengths, update, batch) for batch in range(len(lengths))]
        assert sorted(rows.stop - rows.start for rows in read) == sorted(lengths), "each length once in an update"


def test_mini_batches_of_a_cycle_differ_in_length_and_a_single_one_changes_from_update_to_update() -> None:
    for n in (1, 3):
        trainer = TextTrainer(small(**{**MIXED, "batches_per_update": n, "samples_per_batch": 6 // n}), tiny())
        assert trainer.per_epoch == len(trainer.x) // 15 * 3
        calls = seen_by(trainer)
        to_the_end(trainer)
        assert len(calls) == n * 2 * trainer.per_epoch
        for i, (x, _) in enumerate(calls):
            update, j = divmod(i, n)
            assert len(x) == (3, 8, 4)[(update + j) % 3]
        for j in range(n):
            column = j * (6 // n)
            read = torch.cat([x[:, 0] for x, _ in calls[j : n * trainer.per_epoch : n]])
            assert torch.equal(read, trainer.x[: len(read), column])
            assert len(read) == trainer.per_epoch * 5, "a mean length of 5 steps"


def test_characters_are_counted_as_they_are_read() -> None:
    trainer = TextTrainer(small(**MIXED, epochs=2), tiny())
    read = 0

    def count(_: Any, inputs: tuple[Tensor, Any]) -> None:
        nonlocal read
        read += inputs[0].numel() if trainer.model.training else 0

    trainer.model.register_forward_pre_hook(count)
    while not trainer.finished:
        trainer.step()
        assert trainer.characters == read
    assert trainer.metrics[-1]["characters"] == read


@pytest.mark.parametrize("carry", [True, False])
def test_every_character_of_an_update_weighs_alike(carry: bool) -> None:
    trainer = TextTrainer(small(**MIXED, arm="layer", carry_state=carry), tiny())
    trainer.model.double()
    seen: list[Tensor] = []

    def keep(*_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))

    trainer.optimizer.register_step_pre_hook(keep)
    twin = build(trainer.run, len(trainer.text.vocabulary)).double()
    trainer.step()
    nats = []
    for j in range(3):
        rows = chunk(trainer.run.steps, 0, j)
        logits, _ = twin(trainer.x[rows, 2 * j : 2 * j + 2])
        targets = trainer.y[rows, 2 * j : 2 * j + 2]
        nats.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
    assert [len(part) for part in nats] == [6, 16, 8]
    torch.cat(nats).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    # float64 sums in another order; the largest gradient is of order 1.
    assert torch.allclose(seen[0], expected, rtol=1e-9, atol=1e-12)


def test_mixed_lengths_are_validated_at_each_of_them() -> None:
    trainer = to_the_end(TextTrainer(small(**MIXED, carry_state=False), tiny()))
    by_length = [evaluate(trainer.model, trainer.text.validation, steps) for steps in (3, 8, 4)]
    assert trainer.metrics[-1]["validation_loss"] == pytest.approx(sum(by_length) / 3)
    carried = small(**MIXED)
    by_length = [evaluate(trainer.model, trainer.text.validation, steps, 10) for steps in (3, 8, 4)]
    assert validate(trainer.model, trainer.text.validation, carried) == pytest.approx(sum(by_length) / 3)


def test_a_run_of_mixed_lengths_is_resumed_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    run, text = small(**MIXED), tiny()
    whole = to_the_end(TextTrainer(run, text))
    part = TextTrainer(run, text)
    for _ in range(4):
        part.step()
    resumed = TextTrainer(run, text)
    resumed.restore(snapshot(part, tmp_path / "c"))
    assert same(to_the_end(resumed).metrics, whole.metrics)
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_too_short_a_text_for_a_turn_of_all_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 streams of 19, too short for chunks of 3 \+ 8 \+ 9 time steps"):
        TextTrainer(small(**{**MIXED, "steps": (3, 8, 9)}), tiny(121))


# --- Testing before the update


@pytest.mark.parametrize("arm", ["streaming", "tsbn", "none"])
def test_what_is_tested_are_the_weights_that_the_statistics_were_taken_with(arm: str) -> None:
    trainer = TextTrainer(small(arm=arm, warmup=0, validate_every=2), tiny())
    parameters = list(trainer.model.parameters())
    trained: list[Tensor] = []
    tested: list[list[Tensor]] = []

    def look(model: Any, _: Any) -> None:
        now = [p.detach().clone() for p in parameters]
        if model.training:
            trained[:] = now
        else:
            tested.append(now)

    trainer.model.register_forward_pre_hook(look)
    while not trainer.finished:
        tested.clear()
        trainer.step()
        assert tested
        assert all(same(now, trained) for now in tested), "the update comes after the test (section 3.3.1)"
        moved = not same([p.detach() for p in parameters], trained)
        assert moved != trainer.finished, "the last update of all is left undone"
    for layer in norms(trainer.model):
        if arm == "streaming":
            assert layer.H1 is not None
            assert layer.H1.count > 0, "short is not cleared before testing"


# --- The input path alone


@pytest.mark.parametrize("arch", ["rnn", "gru", "lstm"])
def test_vertical_leaves_the_hidden_path_without_a_norm(arch: str) -> None:
    full, vertical = (TextTrainer(small(arch=arch, vertical=v), tiny()) for v in (False, True))
    cell = vertical.model.recurrent.cells["l0"]
    assert cell.norm_hh is None
    assert cell.norm_ih is not None
    assert same(cell.weight_hh, full.model.recurrent.cells["l0"].weight_hh)
    for trainer in (full, vertical):
        trainer.step()
        assert trainer.failed is None
    assert 2 * statistics_kept(vertical.model) == statistics_kept(full.model)
