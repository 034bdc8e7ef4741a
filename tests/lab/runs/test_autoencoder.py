"""Auto-encoders of sparse documents: the layer against the dense product, training against a plain loop, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from films import WORDS, collection, small
from torch import nn

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.autoencoder.data import Bags, Documents
from streamnorm.lab.runs.autoencoder.loop import AutoencoderTrainer, train_autoencoder, trained
from streamnorm.lab.runs.autoencoder.model import (
    Autoencoder,
    WordSum,
    build,
    cost,
    cost_of_frequencies,
    evaluate,
    log_odds,
)
from streamnorm.lab.runs.autoencoder.run import AutoencoderRun
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.norm import Norm, norms
from streamnorm.train.warmup import Warmup


def stepped(trainer: AutoencoderTrainer, updates: int) -> AutoencoderTrainer:
    for _ in range(updates):
        trainer.step()
    return trainer


# --- Sparse input


def test_a_sum_of_words_is_the_dense_product_and_so_is_its_gradient() -> None:
    bags = Bags.of([[0, 4], [], [4, 2, 1]], 5)
    layer = WordSum(5, 3, bias=True).double()
    dense = layer.weight.detach().clone().requires_grad_()
    seed = torch.randn(3, 3, dtype=torch.float64)
    y = layer(bags)
    expected = bags.dense(torch.float64) @ dense + layer.bias
    # Sums of at most three numbers of size 1, in another order: a few units in the last place of float64.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    (y * seed).sum().backward()
    (expected * seed).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_sparse
    assert set(layer.weight.grad._indices()[0].tolist()) == {0, 1, 2, 4}, "the rows of its words and no others"
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("arm", ["none", "layer", "streaming"])
def test_training_is_a_plain_loop_of_dense_sgd(arm: str, m: int, n: int) -> None:
    documents, updates = collection(), 5
    run = small(arm=arm, samples_per_batch=m, batches_per_update=n, warmup=1 if arm == "streaming" else 0)
    trainer = AutoencoderTrainer(run, documents)
    trainer.model.double()
    norm = {"none": nn.Identity(), "layer": nn.LayerNorm(6), "streaming": StreamingNorm(6, alpha=(0.7, 0.3))}[arm]
    first, last = nn.Linear(WORDS, 6, bias=arm == "none"), nn.Linear(6, WORDS)
    plain = nn.Sequential(first, norm, nn.ReLU(), last).double()
    with torch.no_grad():
        first.weight.copy_(trainer.model.read.weight.T)
        if first.bias is not None:
            first.bias.zero_()
        last.load_state_dict(trainer.model.linears[0].state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=run.learning_rate)
    warmup = Warmup(plain, optimizer, run.warmup or 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))  # of seed 0, epoch 0
    x = documents.words.dense(torch.float64)[order]
    for update in range(updates):
        for part in x[update * m * n : (update + 1) * m * n].split(m):
            F.binary_cross_entropy_with_logits(plain(part), part, reduction="none").sum(1).mean().backward()
        for parameter in plain.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad / n
        optimizer.step()
        optimizer.zero_grad()
        trainer.step()
    assert trainer.failed is None
    # The same sums in another order, five updates: far below the 1e-4 by which any update moves the weights.
    torch.testing.assert_close(trainer.model.read.weight.T, first.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(trainer.model.linears[0].weight, last.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(trainer.model.linears[0].bias, last.bias, rtol=0, atol=1e-10)
    assert warmup.updates == updates


def test_words_that_do_not_occur_keep_their_weights() -> None:
    documents = collection()
    trainer = AutoencoderTrainer(small(arm="layer"), documents)
    before = trainer.model.read.weight.detach().clone()
    trainer.step()
    moved = (trainer.model.read.weight != before).any(1)
    first = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:1]
    assert set(moved.nonzero()[:, 0].tolist()) == set(documents.words.select(first).members.tolist())


# --- The network and its cost


@pytest.mark.parametrize(
    ("arm", "normalized", "norms", "biases"),
    [
        ("none", "hidden", (0, 0, 0), (1, 1, 1)),
        ("batch", "hidden", (1, 1, 0), (0, 0, 1)),
        ("batch", "top", (0, 0, 1), (1, 1, 0)),
        ("layer", "all", (1, 1, 1), (0, 0, 0)),
    ],
)
def test_a_projection_has_a_bias_where_no_norm_follows(
    arm: str, normalized: Any, norms: tuple[int, ...], biases: tuple[int, ...]
) -> None:
    model = build(small(arm=arm, normalized=normalized, hidden=(6, 4)), WORDS)
    assert [isinstance(norm, Norm) for norm in model.norms] == [bool(on) for on in norms]
    linears = [model.read, *model.linears]
    assert [linear.bias is not None for linear in linears] == [bool(on) for on in biases]
    assert model.top_bias().shape == (WORDS,)
    assert model(collection().words).shape == (50, WORDS)


def test_every_arm_of_a_seed_begins_with_the_same_weights() -> None:
    models = [build(small(arm=arm, hidden=(6, 4, 6)), WORDS) for arm in ("none", "layer", "streaming")]
    for model in models[1:]:
        assert torch.equal(model.read.weight, models[0].read.weight)
        for a, b in zip(model.linears, models[0].linears, strict=True):
            assert torch.equal(a.weight, b.weight)  # type: ignore[arg-type]
    assert not torch.equal(build(small(seed=1), WORDS).read.weight, models[0].read.weight)


def test_the_cost_is_the_sum_over_words_of_the_cross_entropies() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    p = 1 / (1 + (-logits[0]).exp())
    by_hand = -(p[0].log() + (1 - p[1]).log() + p[2].log())
    assert cost(logits, Bags.of([[0, 2]], 3)).item() == pytest.approx(by_hand.item(), abs=1e-14)


def test_what_frequencies_alone_cost_is_their_entropy() -> None:
    documents = collection()
    x = documents.words.dense(torch.float64)
    p = (x[:40].sum(0) + 0.5) / 41
    by_hand = -(x[40:] * p.log() + (1 - x[40:]) * (1 - p).log()).sum(1).mean()
    assert cost_of_frequencies(documents) == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("normalized", ["hidden", "all"])
def test_the_outputs_begin_at_the_frequencies_or_at_zero(normalized: Any) -> None:
    documents = collection()
    begun = AutoencoderTrainer(small(arm="layer", normalized=normalized), documents).model.top_bias()
    torch.testing.assert_close(begun.double(), log_odds(documents), rtol=1e-6, atol=0)
    begun = AutoencoderTrainer(small(arm="layer", normalized=normalized, top_bias="zero"), documents).model.top_bias()
    assert not begun.any()


def test_dropout_leaves_out_units_in_training_alone_and_alike_for_every_arm() -> None:
    bags = collection().words
    model = Autoencoder(WORDS, (400,), None, nonlinearity=torch.ones_like, dropout=0.25)
    seen = []
    model.linears[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    for mode in (model.train, model.train, model.eval):
        mode()
        model(bags, torch.Generator().manual_seed(5))
    assert torch.equal(seen[0], seen[1])
    assert seen[0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    # 20,000 units, each left out with probability 1/4: 5 standard deviations are 0.0153.
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.0153)
    assert (seen[2] == 1).all()


def test_testing_changes_nothing_and_does_not_depend_on_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = collection()
    trainer = stepped(AutoencoderTrainer(small(arm="batch", samples_per_batch=4, dropout=0.5), documents), 3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    whole = evaluate(trainer.model, documents.words, documents.tested)
    monkeypatch.setattr("streamnorm.lab.runs.autoencoder.model.EVALUATION_BATCH", 3)
    assert evaluate(trainer.model, documents.words, documents.tested) == pytest.approx(whole, rel=1e-6)
    assert trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# --- Runs


@pytest.mark.parametrize("arm", ["none", "layer", "batch", "streaming"])
def test_a_run_learns_and_writes_a_line_for_each_epoch(arm: str) -> None:
    documents = collection(400, 50)
    run = small(arm=arm, samples_per_batch=4, epochs=3)
    record = train_autoencoder(run, documents)
    assert [line["epoch"] for line in record["metrics"]] == [1, 2, 3]
    assert [line["documents"] for line in record["metrics"]] == [400, 800, 1200]
    costs = [line["test_cost"] for line in record["metrics"]]
    assert costs[-1] < cost_of_frequencies(documents), "it learned more than frequencies"
    assert record["metrics"][-1]["norm"] == pytest.approx(_norm_of(run, documents), rel=1e-6)


def _norm_of(run: AutoencoderRun, documents: Documents) -> float:
    trainer = AutoencoderTrainer(run, documents)
    return stepped(trainer, trainer.updates).model.read.weight.detach().double().pow(2).sum().sqrt().item()


def test_batch_normalization_refuses_one_document_at_a_time() -> None:
    record = train_autoencoder(small(arm="batch"), collection())
    assert "a single value in each reference" in record["failed"]
    assert record["metrics"] == []


@pytest.mark.parametrize(("arm", "n"), [("streaming", 1), ("streaming", 4), ("none", 1)])
def test_what_is_tested_are_the_weights_that_the_statistics_were_taken_with(arm: str, n: int) -> None:
    run = small(arm=arm, samples_per_batch=2, batches_per_update=n, epochs=2, warmup=0)
    trainer = AutoencoderTrainer(run, collection())
    parameters = list(trainer.model.parameters())
    trained: list[torch.Tensor] = []
    tested: list[list[torch.Tensor]] = []

    def look(model: Any, _: Any) -> None:
        now = [p.detach().clone() for p in parameters]
        if model.training:
            trained[:] = now
        else:
            tested.append(now)

    trainer.model.register_forward_pre_hook(look)
    while not trainer.finished:
        trainer.step()
        moved = any(not torch.equal(p.detach(), before) for p, before in zip(parameters, trained, strict=True))
        assert moved != trainer.finished, "the last update of all is left undone"
        for now in tested:
            assert all(map(torch.equal, now, trained)), "the update comes after the test (section 3.3.1)"
        tested.clear()
    assert len(trainer.metrics) == 2
    for layer in norms(trainer.model):
        assert layer.H1 is not None
        assert layer.H1.count > 0, "short is not cleared before testing"


def test_a_test_cost_that_is_not_finite_is_a_result_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamnorm.lab.runs.autoencoder.loop.evaluate", lambda *_: math.inf)
    record = train_autoencoder(small(arm="layer", epochs=2), collection())
    assert record["failed"] is None
    assert [(line["test_cost"], line["note"]) for line in record["metrics"]] == [(None, "test_cost became inf")] * 2
    json.dumps(record, allow_nan=False)


def test_what_diverges_says_so() -> None:
    record = train_autoencoder(small(arm="none", learning_rate=1e30, epochs=9), collection())
    assert record["failed"].startswith("diverged: the cost became ")


def test_more_documents_an_update_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one update takes 8 S/B x 6 B/U = 48 documents, toy has 40 to train on"):
        AutoencoderTrainer(small(samples_per_batch=8, batches_per_update=6), collection())


@pytest.mark.parametrize("arm", ["streaming", "batch"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(arm: str, tmp_path: Path) -> None:
    documents = collection()
    run = small(arm=arm, samples_per_batch=3, batches_per_update=2, epochs=3, dropout=0.3)
    whole = stepped(AutoencoderTrainer(run, documents), 15)
    stopped = stepped(AutoencoderTrainer(run, documents), 8)
    checkpoint.save(tmp_path / "checkpoint.safetensors", stopped.state())
    resumed = AutoencoderTrainer(run, documents)
    resumed.restore(checkpoint.load(tmp_path / "checkpoint.safetensors"))
    stepped(resumed, 7)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for a, b in zip(resumed.metrics, whole.metrics, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_checkpoint_of_another_run_or_of_other_documents_is_refused(tmp_path: Path) -> None:
    documents, run = collection(), small(arm="layer", epochs=1)
    train_autoencoder(run, documents, tmp_path)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(checkpoint.CheckpointError, match=r"hidden \[6\] there and \[7\] here"):
        train_autoencoder(replace(run, hidden=(7,)), documents, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"documents 'made by a test' there and 'another' here"):
        train_autoencoder(run, replace(documents, source="another"), tmp_path)
    assert (tmp_path / "run.json").read_text() == before
    _, model, state = trained(tmp_path)
    assert evaluate(model, documents.words, documents.tested) == state["metrics"][-1]["test_cost"]


WHOLE = "a whole number >= 1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[({name: 0}, f"{name} is {WHOLE}, got 0") for name in ("vocabulary", "samples_per_batch", "epochs")],
        *[({name: 1.5}, f"{name} is {WHOLE}, got 1.5") for name in ("batches_per_update", "train_limit")],
        ({"hidden": ()}, "hidden names the units of at least one layer"),
        ({"hidden": (8, 0)}, f"a number of hidden units is {WHOLE}, got 0"),
        ({"dropout": 1.0}, "dropout is a share >= 0 and below 1, got 1.0"),
        ({"dropout": math.nan}, "dropout is a share >= 0 and below 1, got nan"),
        ({"learning_rate": math.inf}, "learning_rate is a finite number >= 0, got inf"),
        ({"nonlinearity": "tanh"}, "nonlinearity is one of relu, sigmoid, got 'tanh'"),
        ({"normalized": "none"}, "normalized is one of hidden, top, all, got 'none'"),
        ({"top_bias": 1}, "top_bias is one of frequencies, zero, got 1"),
        ({"warmup": -1}, "warmup is a whole number >= 0, got -1"),
    ],
)
def test_a_run_refuses_an_impossible_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        AutoencoderRun(**values)


def test_a_run_comes_back_from_json_as_it_was() -> None:
    run = small(arm="batch", hidden=(8, 4), alpha=(0.6, 0.4), kappa=(0.5, 0.5, 0.9, 0.1), dropout=0.2, seed=3)
    assert AutoencoderRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    with pytest.raises(ValueError, match="an auto-encoder's run has no depth; it has"):
        AutoencoderRun.from_json({"depth": 3})


def test_an_unknown_arm_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown arm 'streming'; did you mean 'streaming'"):
        build(small(arm="streming"), WORDS)
