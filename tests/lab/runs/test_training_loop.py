"""The training loop: a run is a plain loop over its data, from the warm-up to its record, or says why it ended."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import flat, small, steps, to_the_end, toy

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer, learning_rate, order, train
from streamnorm.lab.runs.classifier.models import build
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.summary import summarize
from streamnorm.nn.norm import Norm, norms

# --- The order of the data


def seen_by(trainer: Trainer) -> list[Tensor]:
    """What goes through the model in training, call by call, from now on."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        if module is trainer.model and module.training:  # and not a copy of it that something is tried on
            seen.append(args[0].detach().clone())

    trainer.model.register_forward_pre_hook(keep)
    return seen


def test_the_order_is_a_permutation_of_the_seed_and_the_epoch_alone() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            orders[seed, epoch] = order(seed, epoch, 52)
            assert orders[seed, epoch].sort().values.tolist() == list(range(52))
    assert len({tuple(o.tolist()) for o in orders.values()}) == len(orders)
    order.cache_clear()
    state = torch.manual_seed(5).get_state()
    assert torch.equal(order(1, 2, 52), orders[1, 2])
    assert torch.equal(torch.get_rng_state(), state)


def test_all_arms_and_architectures_see_the_same_data_in_the_same_order() -> None:
    seen = []
    for architecture, arm, m, n in (("A", "layer", 3, 4), ("B", "batch", 6, 2), ("A", "none", 12, 1)):
        run = small(architecture=architecture, arm=arm, samples_per_batch=m, batches_per_update=n, seed=4)
        trainer = Trainer(run, toy())
        calls = seen_by(trainer)
        torch.manual_seed(m)
        to_the_end(trainer)
        seen.append(torch.cat(calls))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_an_epoch_leaves_out_what_does_not_fill_its_last_cycle() -> None:
    data = toy(52)
    trainer = Trainer(small(arm="layer", seed=3), data)
    calls = seen_by(trainer)
    to_the_end(trainer)
    assert trainer.updates == trainer.done == 2 * (52 // 12)
    for epoch in (0, 1):
        whole = data.train_x[order(3, epoch, 52)][:48]
        assert torch.equal(torch.cat(calls[4 * epoch : 4 * epoch + 4]), whole)


# --- Updates


@pytest.mark.parametrize(("updates", "last"), [(30, 5), (6, 1), (7, 1), (1, 0), (1200, 200)])
def test_the_learning_rate_is_a_tenth_in_the_last_sixth(updates: int, last: int) -> None:
    rates = [learning_rate(small(learning_rate=0.4), update, updates) for update in range(updates)]
    full = updates - last
    assert rates == pytest.approx([0.4] * full + [0.04] * last)


def test_the_optimizer_uses_the_learning_rate_of_each_update() -> None:
    trainer = Trainer(small(epochs=3, learning_rate=0.4), toy())
    used: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    to_the_end(trainer)
    assert used == pytest.approx([0.4] * 10 + [0.04])  # and the last update is left undone


def by_hand(run: Run, data: Data, dtype: torch.dtype, warmup: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """The run as a plain loop over mini-batches of m samples, written apart from the code under test."""
    model = build(run, data.train_x[0], data.classes).to(dtype)
    optimizer = torch.optim.SGD(
        model.parameters(), run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
    )
    layers = [m for m in model.modules() if isinstance(m, Norm)]
    m, n, epochs = run.samples_per_batch, run.batches_per_update, []
    cycles = len(data.train_x) // (m * n)

    def batches(epoch: int, cycle: int) -> list[tuple[Tensor, Tensor]]:
        index = order(run.seed, epoch, len(data.train_x))[cycle * m * n : (cycle + 1) * m * n]
        return [(data.train_x[i].to(dtype), data.train_y[i]) for i in index.split(m)]

    for cycle in range(warmup):
        for x, _ in batches(0, cycle):
            model(x)
        for layer in layers:
            layer.fold()
    for epoch in range(run.epochs):
        loss_sum = wrong = 0.0
        for cycle in range(cycles):
            for x, y in batches(epoch, cycle):
                output = model(x)
                loss = F.cross_entropy(output, y)
                loss.backward()
                loss_sum += loss.item() * m
                wrong += (output.argmax(1) != y).sum().item()
            if cycle == cycles - 1:  # tested with the weights that the statistics were taken with
                with torch.no_grad():
                    output = model.eval()(data.test_x.to(dtype))
                    model.train()
                samples = cycles * m * n
                epochs.append(
                    {
                        "epoch": epoch + 1,
                        "updates": (epoch + 1) * cycles,
                        "samples": (epoch + 1) * samples,
                        "train_loss": loss_sum / samples,
                        "train_error": wrong / samples,
                        "test_loss": F.cross_entropy(output, data.test_y).item(),
                        "test_error": (output.argmax(1) != data.test_y).double().mean().item(),
                    }
                )
            if len(epochs) == run.epochs:
                break
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= n
            late = epoch * cycles + cycle >= run.epochs * cycles * 5 / 6
            optimizer.param_groups[0]["lr"] = run.learning_rate * (0.1 if late else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for layer in layers:
                layer.fold()
    return model, epochs


BY_HAND = [
    ("A", "streaming", 1, 12, 4),
    ("A", "streaming", 3, 4, 0),
    ("A", "BA6-S", 3, 4, 0),
    ("A", "batch", 6, 2, 0),
    ("A", "layer", 3, 4, 0),
    ("A", "none", 12, 1, 0),
    ("B", "streaming", 1, 12, 0),
    ("B", "batch", 2, 6, 0),
]


@pytest.mark.parametrize(("architecture", "arm", "m", "n", "warmup"), BY_HAND)
def test_a_run_is_a_plain_loop_over_mini_batches(architecture: str, arm: str, m: int, n: int, warmup: int) -> None:
    data = toy(place=4 if architecture == "A" else 8)
    changes = {"architecture": architecture, "arm": arm, "samples_per_batch": m, "batches_per_update": n}
    run = small(**changes, weight_decay=1e-3, learning_rate=0.02, warmup=warmup, seed=2)
    exact, epochs = by_hand(run, data, torch.float64, warmup)
    single, _ = by_hand(run, data, torch.float32, warmup)
    # How far rounding to float32 carries this run is what the plain loop itself loses to it. Another order of the same
    # sums rounds differently but not more; 30 times as far, because one run is a single draw of these roundings.
    lost = (flat(single) - flat(exact)).abs().max().item()
    assert lost < 1e-5, "so sensitive a run says nothing"
    trainer = to_the_end(Trainer(run, data))
    assert trainer.failed is None
    assert (flat(trainer.model) - flat(exact)).abs().max() <= 30 * lost
    wide = Trainer(run, dataclasses.replace(data, train_x=data.train_x.double(), test_x=data.test_x.double()))
    wide.model.double()
    to_the_end(wide)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert (flat(wide.model) - flat(exact)).abs().max() <= 30 * lost * finer
    for got, want in zip(wide.metrics, epochs, strict=True):
        assert got.pop("seconds") > 0
        assert list(got) == list(want)
        assert got == pytest.approx(want, rel=1e-9)  # 2e-16, 8 updates and all sums along; no count differs by one


def test_metrics_have_their_fields_and_units() -> None:
    trainer = Trainer(small(arm="layer", learning_rate=0.0, momentum=0.0), toy())
    to_the_end(trainer)
    first, second = trainer.metrics
    names = ["epoch", "updates", "samples", "train_loss", "train_error", "test_loss", "test_error", "seconds"]
    assert list(first) == list(second) == names
    assert (first["epoch"], first["updates"], first["samples"]) == (1, 4, 48)
    assert (second["epoch"], second["updates"], second["samples"]) == (2, 8, 96)
    # At rate 0 the weights stay, and so the losses can be had from the model in one call: mean nats, fractions.
    for epoch, line in enumerate(trainer.metrics):
        index = order(0, epoch, 52)[:48]
        with torch.no_grad():
            output = trainer.model(trainer.data.train_x[index])
        y = trainer.data.train_y[index]
        # 1e-5: float32 has 6e-8, sums of 48 terms of about 1 in two orders.
        assert line["train_loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-5)
        assert line["train_error"] == (output.argmax(1) != y).sum().item() / 48
    assert first["test_loss"] == second["test_loss"]
    assert 0 < first["seconds"] < 60


def test_a_run_learns() -> None:
    metrics = train(small(epochs=6), toy())["metrics"]
    assert metrics[-1]["train_loss"] < 0.5 * metrics[0]["train_loss"]
    assert metrics[-1]["test_error"] < 1 / 3, "guessing one of three errs in two thirds"


# --- Warm-up


@pytest.mark.parametrize(
    ("changes", "cycles"),
    [
        ({"samples_per_batch": 1, "batches_per_update": 12}, 4),
        ({"samples_per_batch": 1, "batches_per_update": 12, "warmup": 0}, 0),
        ({"samples_per_batch": 1, "batches_per_update": 12, "warmup": 2}, 2),
        ({"warmup": 7}, 7),  # more than an epoch has
        ({"samples_per_batch": 1, "batches_per_update": 12, "architecture": "B"}, 0),
    ],
)
def test_a_run_warms_up_for_so_many_cycles_before_its_first_update(changes: dict[str, Any], cycles: int) -> None:
    trainer = Trainer(small(**changes), toy(place=8))
    start = [p.detach().clone() for p in trainer.model.parameters()]
    calls = seen_by(trainer)
    weights: list[bool] = []

    def compare(*_: Any) -> None:
        now = trainer.model.parameters()
        weights.append(all(torch.equal(a, b) for a, b in zip(start, now, strict=True)))

    trainer.optimizer.register_step_pre_hook(compare)
    steps(trainer, 1)
    assert weights == [True], "one update, and nothing moved the weights before it"
    assert sum(len(x) for x in calls) == 12 * (cycles + 1)
    for layer in norms(trainer.model):
        assert layer.H1.updates == cycles + 1
        assert layer.H2.updates == 1
    steps(trainer, 1)
    assert sum(len(x) for x in calls) == 12 * (cycles + 2)


# --- What cannot go on


def test_batch_normalization_of_one_sample_ends_as_failed_with_the_reason() -> None:
    record = train(small(arm="batch", samples_per_batch=1, batches_per_update=12), toy())
    assert record["metrics"] == []
    assert "Setting A" in record["failed"]
    assert "has no spread" in record["failed"]
    json.dumps(record, allow_nan=False)


def test_a_failed_run_takes_no_step_more() -> None:
    trainer = steps(Trainer(small(arm="batch", samples_per_batch=1, batches_per_update=12), toy()), 1)
    assert trainer.finished
    assert trainer.done == 0


def test_divergence_is_recorded_as_failed_with_the_update() -> None:
    record = train(small(arm="none", learning_rate=1e20), toy())
    assert record["failed"].startswith("diverged: the loss became ")
    assert "at update " in record["failed"]
    json.dumps(record, allow_nan=False)


def test_a_test_loss_that_is_not_finite_is_a_result_and_training_goes_on() -> None:
    data = toy(52)
    data.test_x[3] = float("inf")
    run = small(arm="none", samples_per_batch=13, batches_per_update=4, epochs=2)
    trainer = to_the_end(Trainer(run, data))
    assert trainer.failed is None
    assert [(line["updates"], line["test_loss"], line["test_error"]) for line in trainer.metrics] == [
        (1, None, 1.0),
        (2, None, 1.0),
    ]
    assert trainer.metrics[0]["note"] == "test_loss became nan"
    assert trainer.metrics[1]["train_loss"] < trainer.metrics[0]["train_loss"]
    record = json.loads(json.dumps(trainer.record(), allow_nan=False))
    (row,) = summarize([record])
    assert (row.test_error, row.best_test_error, row.failed) == (1.0, 1.0, None)


def test_more_samples_an_update_than_there_are_is_refused_with_all_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 S/B x 20 B/U = 60 samples, toy has 52 to train on"):
        train(small(samples_per_batch=3, batches_per_update=20), toy(52))
    assert Trainer(small(samples_per_batch=13, batches_per_update=4), toy(52)).per_epoch == 1


# --- Records


def test_the_record_says_what_was_run_on_what_with_what() -> None:
    run = small(seed=9)
    record = json.loads(json.dumps(train(run, toy()), allow_nan=False))
    assert Run.from_json(record["run"]) == run
    assert (record["arm"], record["label"], record["seed"]) == (run.arm, run.label, 9)
    assert (record["data"], record["source"]) == ("toy", "made by tests/helpers/toy.py")
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "streamnorm"} <= set(record["versions"])
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["cpu"]
    assert record["failed"] is None
    assert len(record["metrics"]) == run.epochs


def test_training_calls_progress_at_every_update() -> None:
    calls: list[tuple[int, int]] = []
    train(small(), toy(), progress=lambda done, of: calls.append((done, of)))
    assert calls == [(k, 8) for k in range(1, 9)]


def test_training_without_a_folder_writes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small(), toy())
    assert list(tmp_path.iterdir()) == []
