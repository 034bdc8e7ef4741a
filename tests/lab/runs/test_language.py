"""Language models: runs, the network, its loss, truncated backpropagation."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import same
from texts import seen_by, small, tiny, to_the_end
from torch import Tensor

from streamnorm.lab.runs.language.data import Text, load_text
from streamnorm.lab.runs.language.loop import TextTrainer, learning_rate, train_text, trained
from streamnorm.lab.runs.language.model import ARMS, LanguageModel, bits, build, evaluate, losses, statistics_kept
from streamnorm.lab.runs.language.run import TextRun
from streamnorm.nn.norm import norms

# --- TextRun


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        *[(name, 0, "a whole number >= 1") for name in ("hidden", "layers", "epochs", "validate_every", "limit")],
        ("samples_per_batch", 2.5, "a whole number >= 1"),
        ("batches_per_update", True, "a whole number >= 1"),
        *[("steps", value, "a tuple of whole numbers >= 1 such as \\(100,\\)") for value in (100, (), (50, 0), [50])],
        ("arch", "transformer", "one of rnn, gru, lstm"),
        ("nonlinearity", "gelu", "one of tanh, relu"),
        ("learning_rate", math.nan, "a finite number >= 0"),
        ("warmup", -1, "a whole number >= 0"),
        *[("weight_scale", value, "a finite number > 0") for value in (0, math.inf, math.nan, "2")],
    ],
)
def test_a_run_refuses_an_impossible_value(name: str, value: Any, mend: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {mend}, got {re.escape(repr(value))}"):
        TextRun(**{name: value})


def test_an_lstm_has_no_choice_of_nonlinearity() -> None:
    with pytest.raises(ValueError, match="nonlinearity is a choice of rnn and gru, an lstm has tanh; got 'relu'"):
        TextRun(arch="lstm", nonlinearity="relu")


def test_a_run_comes_back_from_json_and_unknown_fields_are_refused() -> None:
    run = small(arm="tsbn", kappa=(0.8, 0.2, 0.9, 0.1), limit=500)
    assert TextRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    with pytest.raises(ValueError, match="a language run has no width; it has"):
        TextRun.from_json({"width": 3})


def test_the_defaults_are_the_papers() -> None:
    run = TextRun()
    assert (run.hidden, run.layers, run.steps, run.epochs, run.validate_every) == (100, 1, (100,), 3, 20)
    assert (run.samples_per_batch, run.batches_per_update, run.alpha, run.beta) == (32, 2, (0.7, 0.3), (0.7, 0.0, 0.3))
    rates = [learning_rate(run, update, 30) for update in range(30)]
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 10)


# --- The network


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("arch", ["rnn", "gru", "lstm"])
def test_every_arm_and_cell_trains_and_tests(arch: str, arm: str) -> None:
    trainer = TextTrainer(small(arch=arch, arm=arm, layers=2), tiny())
    for _ in range(3):
        trainer.step()
    assert trainer.failed is None
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert math.isfinite(evaluate(trainer.model, trainer.text.validation, 10))


@pytest.mark.parametrize("arch", ["rnn", "gru", "lstm"])
def test_arms_with_one_seed_start_from_the_same_weights(arch: str) -> None:
    def matrices(arm: str, seed: int) -> dict[str, Tensor]:
        model = build(small(arch=arch, arm=arm, seed=seed), 9)
        return {k: p for k, p in model.named_parameters() if p.ndim == 2}

    state = torch.get_rng_state()
    reference = matrices("none", 5)
    assert len(reference) >= 3
    for arm in ARMS:
        assert same(matrices(arm, 5), reference), arm
    assert not same(matrices("none", 6), reference)
    assert torch.equal(torch.get_rng_state(), state), "building leaves the global generator alone"


@pytest.mark.parametrize("arch", ["rnn", "lstm"])
def test_larger_first_weights_are_the_same_ones_times_a_factor_and_a_norm_forgets_it(arch: str) -> None:
    run = small(arch=arch, arm="layer", layers=2)
    one, four = (build(dataclasses.replace(run, weight_scale=scale), 9).double() for scale in (1.0, 4.0))
    for (name, a), b in zip(one.named_parameters(), four.parameters(), strict=True):
        assert torch.equal(b, 4 * a if name.endswith(("weight_ih", "weight_hh")) else a), name
    symbols = torch.arange(15).view(5, 3) % 9
    # eps = 1e-5 counts in the square of sigma: 0.2 % of one of 0.05, which the weights within 0.4 seldom fall below.
    assert torch.allclose(one(symbols)[0], four(symbols)[0], atol=0.01)


def test_an_unknown_arm_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"unknown arm 'streming' of a language model; did you mean 'streaming'\?"):
        build(small(arm="streming"), 9)


def test_one_stream_for_all_time_steps_and_statistics_for_each() -> None:
    kept = {}
    for arm in ("streaming", "tsbn", "batch", "layer"):
        for steps in (5, 10):
            trainer = TextTrainer(small(arm=arm, steps=(steps,)), tiny())
            trainer.step()
            kept[arm, steps] = statistics_kept(trainer.model)
    assert kept["layer", 5] == kept["layer", 10] == 0
    assert kept["streaming", 5] == kept["streaming", 10] > 0
    assert kept["batch", 5] == kept["batch", 10] > 0
    assert kept["tsbn", 10] == 2 * kept["tsbn", 5] > kept["batch", 10], "they grow with the time steps (section 4.2)"


# --- Loss


def test_nats_and_bits() -> None:
    assert bits(math.log(2)) == 1
    assert bits(0) == 0


def by_hand(model: LanguageModel, symbols: Tensor, cut: list[tuple[int, int, bool]]) -> float:
    """Mean nats over pieces [start, end) of predictions, each from a state of 0 or from the piece before."""
    model.eval()
    total, state = 0.0, None
    with torch.no_grad():
        for start, end, carried in cut:
            logits, state = model(symbols[start:end, None], state if carried else None)
            total += F.cross_entropy(logits[:, 0].double(), symbols[start + 1 : end + 1], reduction="sum").item()
    model.train()
    return total / (len(symbols) - 1)


@pytest.mark.parametrize("arm", ["streaming", "tsbn", "layer"])
@pytest.mark.parametrize(("steps", "chunks"), [(10, 1), (7, 2), (7, 3), (40, 1), (90, 1)])
def test_validation_predicts_every_character_once(steps: int, chunks: int, arm: str) -> None:
    trainer = TextTrainer(small(arm=arm, steps=(7,)), tiny())
    trainer.step()
    symbols = trainer.text.train[:42]
    cut = [(s, min(s + steps, 41), s % (steps * chunks) != 0) for s in range(0, 41, steps)]
    sums, counts = losses(trainer.model, symbols, steps, chunks)
    assert counts.sum() == 41
    assert counts.tolist() == [sum(end - start > t for start, end, _ in cut) for t in range(steps)]
    got = evaluate(trainer.model, symbols, steps, chunks)
    assert got == (sums.sum() / 41).item()
    assert got == pytest.approx(by_hand(trainer.model, symbols, cut), rel=1e-5)  # float32, sums in another order


def test_validation_changes_nothing_and_splits_large_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TextTrainer(small(), tiny())
    trainer.step()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.readout.eval()
    modes = [module.training for module in trainer.model.modules()]
    whole = evaluate(trainer.model, trainer.text.train, 10)
    monkeypatch.setattr("streamnorm.lab.runs.language.model.EVALUATION_STREAMS", 5)
    assert evaluate(trainer.model, trainer.text.train, 10) == pytest.approx(whole, rel=1e-5)
    assert same(dict(trainer.model.state_dict()), before)
    assert [module.training for module in trainer.model.modules()] == modes


# --- Training


def test_chunks_go_on_where_the_streams_stood_and_every_arm_reads_the_same() -> None:
    text = tiny()
    read = []
    for arm, m, n in (("streaming", 4, 2), ("layer", 8, 1)):
        trainer = TextTrainer(small(arm=arm, samples_per_batch=m, batches_per_update=n), text)
        calls = seen_by(trainer)
        to_the_end(trainer)
        read.append([torch.cat([x for x, _ in calls[i : i + n]], 1) for i in range(0, len(calls), n)])
        assert len(read[-1]) == trainer.updates == 2 * trainer.per_epoch
    assert same(read[0], read[1])
    per_epoch = len(read[0]) // 2
    first = torch.cat(read[0][:per_epoch])
    length = (len(text.train) - 1) // 8
    for stream in range(8):
        contiguous = text.train[stream * length :][: per_epoch * 10]
        assert torch.equal(first[:, stream], contiguous)
    assert same(read[0][per_epoch:], read[0][:per_epoch]), "an epoch begins with the text"


@pytest.mark.parametrize("arch", ["gru", "lstm"])
@pytest.mark.parametrize("carry", [True, False])
def test_the_state_is_carried_without_its_graph_or_starts_anew(carry: bool, arch: str) -> None:
    trainer = TextTrainer(small(arch=arch, carry_state=carry), tiny())
    calls = seen_by(trainer)
    for _ in range(trainer.per_epoch + 1):
        trainer.step()
    states = [state for _, state in calls]
    new_epoch = 2 * trainer.per_epoch
    assert all(state is None for state in (*states[:2], *states[new_epoch : new_epoch + 2]))
    for state in states[2:new_epoch]:
        assert (state is not None) == carry
        for part in state if isinstance(state, tuple) else [state] if carry else []:
            assert part.shape == (1, 4, 6)
            assert part.any()
            assert not part.requires_grad


def plain_loop(run: TextRun, text: Text, updates: int) -> list[float]:
    """The training losses of a run, by a loop written apart from the code under test."""
    model = build(run, len(text.vocabulary)).double()
    m, n, T = run.samples_per_batch, run.batches_per_update, run.steps[0]
    length = (len(text.train) - 1) // (m * n)
    states: list[Any] = [None] * n
    nats = []
    for update in range(updates):
        model.zero_grad()
        for j in range(n):
            starts = [s * length + update * T for s in range(j * m, (j + 1) * m)]
            x = torch.stack([text.train[s : s + T] for s in starts], 1)
            y = torch.stack([text.train[s + 1 : s + T + 1] for s in starts], 1)
            logits, state = model(x, states[j])
            states[j] = state.detach()
            loss = F.cross_entropy(logits.transpose(1, 2), y)
            loss.backward()
            nats.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= run.learning_rate * torch.sign(parameter.grad)
        for layer in norms(model):
            layer.fold()
    return nats


@pytest.mark.parametrize(("arm", "m", "n"), [("streaming", 4, 2), ("tsbn", 8, 1), ("layer", 4, 2), ("none", 8, 1)])
def test_a_run_is_a_plain_loop(arm: str, m: int, n: int) -> None:
    run = small(arch="gru", arm=arm, samples_per_batch=m, batches_per_update=n, epochs=1, learning_rate=0.004, warmup=0)
    trainer = TextTrainer(run, tiny())
    trainer.model.double()
    for _ in range(4):
        trainer.step()
    nats = plain_loop(run, trainer.text, 4)
    seen = [loss for line in trainer.metrics for loss in line["train_losses"]] + trainer.losses
    # In float64 no gradient here is so near 0 that rounding could flip its sign.
    assert seen == pytest.approx(nats, rel=1e-9)


@pytest.mark.parametrize(("warmup", "moved"), [(0, True), (2, False), (None, False)])
def test_a_warm_up_moves_the_statistics_and_no_weight(warmup: int | None, moved: bool) -> None:
    run = small(warmup=warmup)  # None: W_h h_0 = 0 for all samples is a tiny reference
    trainer = TextTrainer(run, tiny())
    trainer.step()
    start = build(run, len(trainer.text.vocabulary))
    pairs = zip(trainer.model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs) == moved
    assert all(layer.H1 is not None and layer.H1.updates == 1 for layer in norms(trainer.model))


def test_metrics_have_a_line_each_so_many_mini_batches_and_at_the_end() -> None:
    trainer = to_the_end(TextTrainer(small(validate_every=5), tiny()))
    updates = trainer.updates
    lines = trainer.metrics
    due = [u for u in range(1, updates + 1) if 2 * u // 5 > 2 * (u - 1) // 5 or u == updates]
    assert [line["updates"] for line in lines] == due
    assert [line["batches"] for line in lines] == [2 * u for u in due]
    assert [line["characters"] for line in lines] == [80 * u for u in due]
    assert lines[-1]["epoch"] == 2
    every = [loss for line in lines for loss in line["train_losses"]]
    assert len(every) == 2 * updates
    assert lines[-1]["train_loss"] == pytest.approx(sum(every[-50:]) / len(every[-50:]))
    for line in lines:
        assert line["validation_bits"] == bits(line["validation_loss"])
    assert lines[-1]["validation_loss"] == evaluate(trainer.model, trainer.text.validation, 10, 10)
    json.dumps(trainer.record(), allow_nan=False)


@pytest.mark.parametrize("arm", ["streaming", "tsbn"])
def test_a_model_of_english_learns(arm: str) -> None:
    text = load_text("pydoc", limit=30_000)
    run = TextRun(arch="gru", arm=arm, hidden=24, samples_per_batch=8, steps=(25,), epochs=1, limit=30_000)
    record = train_text(run, text)
    counts = torch.bincount(text.train).double()
    unigram = -(counts / counts.sum() * (counts / counts.sum()).clamp(min=1e-12).log()).sum().item()
    every = [loss for line in record["metrics"] for loss in line["train_losses"]]
    assert every[0] > unigram
    assert record["metrics"][-1]["validation_loss"] < unigram - 0.2, "it has learned more than how frequent letters are"


def test_too_short_a_text_is_refused_with_all_numbers() -> None:
    message = r"tiny has 118 characters .* 4 S/B x 2 B/U are 8 streams of 14, too short for chunks of 15 time steps"
    with pytest.raises(ValueError, match=message):
        TextTrainer(small(steps=(15,)), tiny(120))
    assert TextTrainer(small(steps=(14,)), tiny(120)).per_epoch == 1


def test_a_validation_that_is_not_finite_is_a_result_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([math.inf, 2.0, math.nan])
    monkeypatch.setattr("streamnorm.lab.runs.language.loop.validate", lambda *_: next(losses, 1.5))
    record = train_text(small(), tiny())
    assert record["failed"] is None
    first, second, third, *others = record["metrics"]
    assert (first["validation_loss"], first["validation_bits"]) == (None, None)
    assert (first["note"], third["note"]) == ("validation_loss became inf", "validation_loss became nan")
    assert (second["validation_loss"], "note" in second) == (2.0, False)
    assert [line["validation_loss"] for line in others] == [1.5] * len(others) != []
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arm": "batch", "samples_per_batch": 1}, "has no spread"),
        ({"arm": "none", "nonlinearity": "relu", "learning_rate": 1e20}, "diverged: the "),
    ],
)
def test_what_cannot_go_on_says_why(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    record = train_text(small(**changes), tiny(), tmp_path)
    assert reason in record["failed"]
    json.dumps(record, allow_nan=False)
    assert train_text(small(**changes), tiny(), tmp_path)["failed"] == record["failed"]
    with pytest.raises(ValueError, match="holds a run that could not train"):
        trained(tmp_path)
