"""Auto-encoders of sparse documents: the layer against the dense product, training against a plain loop, resuming, and
neighbors by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from streamnorm.cli import main
from streamnorm.dau import attach
from streamnorm.layers import SampleNorm, StreamingNorm
from streamnorm.norm import Norm
from streamnorm.training import checkpoint
from streamnorm.training.autoencoder import (
    Autoencoder,
    AutoencoderTrainer,
    WordSum,
    build,
    cost,
    cost_of_frequencies,
    evaluate,
    log_odds,
    train_autoencoder,
    trained,
)
from streamnorm.training.autoencoder_run import AutoencoderRun
from streamnorm.training.documents import Bags, Documents
from streamnorm.training.neighbors import codes, nearest, precision, precision_by_chance, side_by_side

WORDS = 30


def collection(train: int = 40, test: int = 10, words: int = WORDS) -> Documents:
    """Documents of two kinds, each with words of its own half of the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(2, (train + test,), generator=generator)
    often = torch.where((torch.arange(words) * 2 // words)[None] == kinds[:, None], 0.3, 0.02)
    x = torch.rand(train + test, words, generator=generator) < often
    bags = Bags.of([row.nonzero()[:, 0].tolist() for row in x], words)
    titles = tuple(f"film {i}" for i in range(train + test))
    labels = Bags.of([[kind] for kind in kinds.tolist()], 2)
    names = tuple(f"word{i}" for i in range(words))
    return Documents("toy", "made by a test", titles, bags, names, labels, ("even", "odd"), train, train)


def small(**changes: Any) -> AutoencoderRun:
    defaults: dict[str, Any] = {"data": "toy", "vocabulary": WORDS, "hidden": (6,), "learning_rate": 0.05}
    return AutoencoderRun(**{**defaults, **changes})


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
    norm = {"none": nn.Identity(), "layer": nn.LayerNorm(6), "streaming": StreamingNorm(6)}[arm]
    first, last = nn.Linear(WORDS, 6, bias=arm == "none"), nn.Linear(6, WORDS)
    plain = nn.Sequential(first, norm, nn.ReLU(), last).double()
    with torch.no_grad():
        first.weight.copy_(trainer.model.read.weight.T)
        if first.bias is not None:
            first.bias.zero_()
        last.load_state_dict(trainer.model.linears[0].state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=run.learning_rate)
    link = attach(plain, optimizer, run.warmup or 0)
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
    assert link.updates == updates


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
    monkeypatch.setattr("streamnorm.training.autoencoder.EVALUATION_BATCH", 3)
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
    assert "one activation in each reference" in record["failed"]
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
    for layer in trainer.link.layers:
        assert layer.H1 is not None
        assert layer.H1.get_buffer("count") > 0, "short is not cleared before testing"


def test_a_test_cost_that_is_not_finite_is_a_result_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamnorm.training.autoencoder.evaluate", lambda *_: math.inf)
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


# --- Neighbors


def test_neighbors_are_by_cosine_and_leave_out_the_one_that_asks() -> None:
    code = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    numbers, cosines = nearest(code, torch.tensor([0, 2]), 3)
    assert numbers[0, 0] == 1
    assert set(numbers[0, 1:].tolist()) == {2, 4}
    assert cosines[0].tolist() == pytest.approx([10 / math.sqrt(101), 0, 0])
    assert numbers[1, 0] == 1
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is a number of neighbors from 1 to 4, all other documents; got {k}"):
            nearest(code, torch.tensor([0]), k)


def test_precision_is_the_share_of_neighbors_with_a_label_in_common() -> None:
    labels = Bags.of([[0], [0, 1], [1], [2], []], 3)
    asked = torch.tensor([0, 1, 4])
    neighbors = torch.tensor([[1, 2], [0, 2], [0, 3]])
    assert precision(neighbors, asked, labels) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert precision_by_chance(asked, labels) == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)


def test_many_are_asked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    code, labels = torch.randn(20, 4), collection(15, 5).labels
    asked = torch.arange(12)
    numbers, _ = nearest(code, asked, 3)
    measured = precision(numbers, asked, labels), precision_by_chance(asked, labels)
    monkeypatch.setattr("streamnorm.training.neighbors.QUERIES", 5)
    assert torch.equal(nearest(code, asked, 3)[0], numbers)
    assert (precision(numbers, asked, labels), precision_by_chance(asked, labels)) == pytest.approx(measured)


def test_the_code_is_the_layer_in_the_middle() -> None:
    model = Autoencoder(WORDS, (8, 3, 8), SampleNorm)
    assert codes(model, collection().words).shape == (50, 3)
    model = Autoencoder(WORDS, (8,), None)
    x = collection().words
    torch.testing.assert_close(codes(model, x), torch.relu(x.dense() @ model.read.weight), rtol=1e-5, atol=1e-6)


def test_side_by_side_names_title_cosine_and_shared_labels() -> None:
    documents = collection(3, 1)
    documents = replace(documents, labels=Bags.of([[0, 1], [0], [], [1]], 2))
    columns = {"a": torch.tensor([[1.0, 0], [1, 1], [1, 0], [0, 1]]), "b": torch.tensor([[1.0], [1], [-1], [1]])}
    rows = side_by_side(documents, 0, columns, 2)
    assert [row[0] for row in rows] == ["film 2 1.00", "film 1 0.71, even"]
    assert {row[1] for row in rows} == {"film 1 1.00, even", "film 3 1.00, odd"}


# --- The command line


def films(folder: Path) -> Path:
    texts = {"war": "soldiers battle general", "love": "kisses wedding lovers"}
    rows = [
        {"title": f"{kind} {i}", "text": f"{text} number{'x' * (i % 5)}", "genres": [kind]}
        for kind, text in texts.items()
        for i in range(30)
    ]
    path = folder / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_train_evaluate_and_neighbors_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(films(tmp_path)), "--vocabulary", "11", "--hidden", "4", "--learning-rate", "0.05"]
    for arm in ("layer", "streaming"):
        out = str(tmp_path / arm)
        assert main(["train", "--arch", "autoencoder", "--arm", arm, "--epochs", "5", "--out", out, *data]) == 0
        last = capsys.readouterr().out.split("test cost ")[-1].split()[0]
        assert main(["evaluate", out]) == 0
        assert f"test cost {last} nats a document" in capsys.readouterr().out
    layer, streaming = str(tmp_path / "layer"), str(tmp_path / "streaming" / "checkpoint.safetensors")
    assert main(["neighbors", layer, "war 3", "Love 1", "--beside", streaming, "--k", "4"]) == 0
    said = capsys.readouterr().out
    assert "war 3: war" in said
    assert "love 1: love" in said
    assert "share a label with them" in said
    assert said.count("of the 4 nearest of 6 held-out documents") == 2
    assert main(["neighbors", layer, "--search", "AR 1"]) == 0
    assert capsys.readouterr().out.split("\n") == ["war 1", *(f"war 1{i}" for i in range(10)), ""]
    assert main(["neighbors", layer, "--search", "peace"]) == 2
    assert "no title of films.jsonl contains 'peace'" in capsys.readouterr().err


def test_what_the_commands_cannot_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(films(tmp_path)), "--vocabulary", "11", "--hidden", "4"]
    out = str(tmp_path / "run")
    assert main(["autoencoder", "--arm", "none", "--epochs", "1", "--out", out, *data]) == 0
    assert main(["train", "--out", str(tmp_path / "digits"), "--epochs", "1", "--width", "4"]) == 0
    capsys.readouterr()
    for command, message in (
        (["neighbors", out, "wars 3"], "no document of films.jsonl is called 'wars 3'; the nearest are 'war 3'"),
        (["neighbors", out, "--k", "60"], "k is a number of neighbors from 1 to 59"),
        (
            ["neighbors", str(tmp_path / "digits"), "war 3"],
            "holds a classifier of digits, no auto-encoder; make one by: streamnorm train",
        ),
        (["sample", out], f"holds an auto-encoder of {tmp_path / 'films.jsonl'}, no language model; make one by:"),
        (["recalibrate", out], "has no layer that keeps statistics for testing"),
        (["gap", out], "has no layer that keeps statistics for testing"),
        (["evaluate", out, "--loops", "2"], "holds an auto-encoder, which has no --lengths and no --loops"),
        (["neighbors", str(tmp_path / "nowhere"), "war 3"], "no checkpoint at"),
        (["evaluate", out, "--lengths", "5"], "holds an auto-encoder, which has no --lengths"),
        (
            ["autoencoder", *data, "--arm", "batch", "--out", str(tmp_path / "one")],
            "batch 1 S/B x 1 B/U could not train",
        ),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("streamnorm: ")
        assert message in said
    films(tmp_path).write_text(
        '{"title": "a", "text": "soldiers of the battle and the general who kisses lovers"}\n' * 9
    )
    assert main(["neighbors", out, "war 3"]) == 2
    assert "different words, fewer than a vocabulary of 11" in capsys.readouterr().err
