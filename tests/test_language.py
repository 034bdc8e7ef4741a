"""Language models: runs, the network, its loss, truncated backpropagation, resuming, sampling, the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.cli import main
from streamnorm.layers import norms
from streamnorm.training import checkpoint, keeping
from streamnorm.training.checkpoint import CheckpointError
from streamnorm.training.language import ARMS, LanguageModel, bits, build, evaluate, losses, sample, statistics_kept
from streamnorm.training.language_loop import TextTrainer, learning_rate, train_text, trained
from streamnorm.training.text import Text, encode, load_text
from streamnorm.training.textrun import TextRun

WORDS = "the cat sat on the mat; a dog ran to the den.\n"


def tiny(characters: int = 1200) -> Text:
    """A made-up text of which 12 streams have 99 characters each."""
    generator = torch.Generator().manual_seed(7)
    words = WORDS.split(" ")
    order = torch.randint(len(words), (characters,), generator=generator).tolist()
    whole = " ".join(words[i] for i in order)[:characters]
    vocabulary = "".join(sorted(set(whole)))
    symbols = encode(whole, vocabulary)
    cut = characters * 99 // 100
    return Text("tiny", vocabulary, symbols[:cut], symbols[cut - 1 :], "made by tests/test_language.py")


def small(**changes: Any) -> TextRun:
    defaults: dict[str, Any] = {
        "data": "tiny",
        "arch": "rnn",
        "hidden": 6,
        "samples_per_batch": 4,
        "batches_per_update": 2,
        "steps": 10,
        "epochs": 2,
        "validate_every": 6,
    }
    return TextRun(**{**defaults, **changes})


def same(a: Any, b: Any) -> bool:
    """Whether two nests are equal to the bit; "seconds" may differ."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(k == "seconds" or same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def to_the_end(trainer: TextTrainer) -> TextTrainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def snapshot(trainer: TextTrainer, path: Path) -> dict[str, Any]:
    """The state as a file keeps it."""
    checkpoint.save(path, trainer.state())
    return checkpoint.load(path)


# --- TextRun


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        *[
            (name, 0, "a whole number >= 1")
            for name in ("hidden", "layers", "steps", "epochs", "validate_every", "limit")
        ],
        ("samples_per_batch", 2.5, "a whole number >= 1"),
        ("batches_per_update", True, "a whole number >= 1"),
        ("arch", "transformer", "one of rnn, gru, lstm"),
        ("nonlinearity", "gelu", "one of tanh, relu"),
        ("learning_rate", math.nan, "a finite number >= 0"),
        ("warmup", -1, "a number of updates >= 0"),
    ],
)
def test_a_run_refuses_an_impossible_value(name: str, value: Any, mend: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {mend}, got {value!r}"):
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
    assert (run.hidden, run.layers, run.steps, run.epochs, run.validate_every) == (100, 1, 100, 3, 20)
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


def test_an_unknown_arm_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"unknown arm 'streming' of a language model; did you mean 'streaming'\?"):
        build(small(arm="streming"), 9)


def test_one_stream_for_all_time_steps_and_statistics_for_each() -> None:
    kept = {}
    for arm in ("streaming", "tsbn", "batch", "layer"):
        for steps in (5, 10):
            trainer = TextTrainer(small(arm=arm, steps=steps), tiny())
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
    trainer = TextTrainer(small(arm=arm, steps=7), tiny())
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
    monkeypatch.setattr("streamnorm.training.language.EVALUATION_STREAMS", 5)
    assert evaluate(trainer.model, trainer.text.train, 10) == pytest.approx(whole, rel=1e-5)
    assert same(dict(trainer.model.state_dict()), before)
    assert [module.training for module in trainer.model.modules()] == modes


# --- Training


def seen_by(trainer: TextTrainer) -> list[tuple[Tensor, Any]]:
    """The inputs and the states of every training call of the model from now on."""
    calls: list[tuple[Tensor, Any]] = []

    def keep(model: LanguageModel, inputs: tuple[Any, ...]) -> None:
        if model.training:
            calls.append((inputs[0].clone(), inputs[1]))

    trainer.model.register_forward_pre_hook(keep)
    return calls


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
    m, n, T = run.samples_per_batch, run.batches_per_update, run.steps
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
    run = TextRun(arch="gru", arm=arm, hidden=24, samples_per_batch=8, steps=25, epochs=1, limit=30_000)
    record = train_text(run, text)
    counts = torch.bincount(text.train).double()
    unigram = -(counts / counts.sum() * (counts / counts.sum()).clamp(min=1e-12).log()).sum().item()
    every = [loss for line in record["metrics"] for loss in line["train_losses"]]
    assert every[0] > unigram
    assert record["metrics"][-1]["validation_loss"] < unigram - 0.2, "it has learned more than how frequent letters are"


def test_too_short_a_text_is_refused_with_all_numbers() -> None:
    message = r"tiny has 118 characters .* 4 S/B x 2 B/U are 8 streams of 14, too short for chunks of 15 time steps"
    with pytest.raises(ValueError, match=message):
        TextTrainer(small(steps=15), tiny(120))
    assert TextTrainer(small(steps=14), tiny(120)).per_epoch == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arm": "batch", "samples_per_batch": 1}, "sigma = 0"),
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


# --- Resuming


@pytest.mark.parametrize(
    ("arch", "arm"), [("gru", "streaming"), ("lstm", "streaming"), ("rnn", "tsbn"), ("rnn", "layer")]
)
def test_a_run_stopped_anywhere_and_resumed_ends_as_if_it_had_not_been(arch: str, arm: str, tmp_path: Path) -> None:
    run, text = small(arch=arch, arm=arm), tiny()
    walker = TextTrainer(run, text)
    states = [snapshot(walker, tmp_path / "c")]
    while not walker.finished:
        walker.step()
        states.append(snapshot(walker, tmp_path / "c"))
    assert len(states) == 1 + 2 * walker.per_epoch
    for done in range(0, len(states) - 1, 5):
        torch.manual_seed(1000 + done)
        resumed = TextTrainer(run, text)
        checkpoint.save(tmp_path / "stopped", states[done])
        resumed.restore(checkpoint.load(tmp_path / "stopped"))
        end = snapshot(to_the_end(resumed), tmp_path / "c")
        for part, value in states[-1].items():
            assert part == "seconds" or same(end[part], value), f"{part} after a stop at update {done}"


def test_warming_up_is_resumed_too(tmp_path: Path) -> None:
    run = small(warmup=3)
    whole = to_the_end(TextTrainer(run, tiny()))
    half = TextTrainer(run, tiny())
    for _ in range(2):
        half.step()
    resumed = TextTrainer(run, tiny())
    resumed.restore(snapshot(half, tmp_path / "c"))
    assert same(to_the_end(resumed).metrics, whole.metrics)


class StopError(Exception):
    """What interrupts a run in these tests."""


def stop_at(update: int) -> Callable[[TextTrainer], None]:
    def interrupt(trainer: TextTrainer) -> None:
        if trainer.done == update:
            raise StopError

    return interrupt


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["a checkpoint each update", "at validations"])
def test_training_goes_on_in_its_folder(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    run, text = small(), tiny()
    through = train_text(run, text, tmp_path / "through")
    for stop in (4, 9):
        with pytest.raises(StopError):
            train_text(run, text, tmp_path / "stopped", stop_at(stop))
    seen: list[int] = []
    record = train_text(run, text, tmp_path / "stopped", lambda trainer: seen.append(trainer.done))
    assert seen[0] == (9 if seconds == 0 else 7), "it begins after its last checkpoint"
    assert same(record["metrics"], through["metrics"])
    ends = [checkpoint.load(tmp_path / which / "checkpoint.safetensors") for which in ("through", "stopped")]
    assert all(same(ends[0][k], ends[1][k]) for k in ends[0] if k != "seconds")
    names = {p.name for p in (tmp_path / "stopped").iterdir()}
    assert names == {"run.json", "metrics.jsonl", "checkpoint.safetensors"}
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["metrics"]
    assert TextRun.from_json(json.loads((tmp_path / "stopped" / "run.json").read_text())["run"]) == run


def test_another_run_or_text_is_refused_and_the_folder_stays(tmp_path: Path) -> None:
    train_text(small(epochs=1), tiny(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"epochs 1 there and 2 here; give another folder"):
        train_text(small(), tiny(), tmp_path)
    with pytest.raises(CheckpointError, match=r"text 'made by tests/test_language\.py' there and 'another' here"):
        train_text(small(epochs=1), dataclasses.replace(tiny(), source="another"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- Sampling


@pytest.mark.parametrize("arm", ["streaming", "tsbn"])
def test_a_sample_is_of_its_seed_and_of_what_the_model_learned(arm: str) -> None:
    text = tiny(6000)
    run = small(arch="gru", arm=arm, hidden=24, epochs=2)
    trainer = to_the_end(TextTrainer(run, text))
    model, vocabulary = trainer.model, text.vocabulary
    first = sample(model, vocabulary, "the ", 60, seed=1, steps=10)
    assert len(first) == 60
    assert set(first) <= set(vocabulary)
    assert sample(model, vocabulary, "the ", 60, seed=1, steps=10) == first
    assert sample(model, vocabulary, "the ", 60, seed=2, steps=10) != first
    assert sample(model, vocabulary, "the ", 0) == ""
    cold = sample(model, vocabulary, "the ", 60, temperature=0, seed=1, steps=10)
    assert cold == sample(model, vocabulary, "the ", 60, temperature=0, seed=2, steps=10)
    assert set(cold.split()) & set(WORDS.split()), f"the likeliest text has words of its training text: {cold!r}"
    assert model.training


@pytest.mark.parametrize("arm", ["streaming", "tsbn"])
def test_a_sample_is_drawn_from_the_models_own_distribution(arm: str) -> None:
    trainer = TextTrainer(small(arm=arm), tiny())
    for _ in range(3):
        trainer.step()
    model, vocabulary = trainer.model, trainer.text.vocabulary
    written = sample(model, vocabulary, "the ", 21, temperature=0, steps=10)
    symbols = encode("the " + written, vocabulary)
    model.eval()
    with torch.no_grad():  # in chunks of 10 steps, as it was trained
        state, likeliest = None, []
        for start in range(0, len(symbols), 10):
            logits, state = model(symbols[start : start + 10, None], state)
            likeliest += logits[:, 0].argmax(1).tolist()
    assert likeliest[3:-1] == symbols[4:].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "zürich"}, "3 unknown characters: 'i', 'z', 'ü'"),
        ({"length": -1}, "length is a number of characters >= 0, got -1"),
        ({"temperature": -0.5}, "temperature is a finite number >= 0, got -0.5"),
        ({"temperature": math.nan}, "temperature is a finite number >= 0, got nan"),
    ],
)
def test_sampling_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    text = tiny()
    model = build(small(arm="layer"), len(text.vocabulary))
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(model, text.vocabulary, **{"prompt": "the", "length": 3, **arguments})


# --- The command line


QUICK = ["--limit", "4000", "--hidden", "8", "--samples-per-batch", "4", "--steps", "10", "--epochs", "1"]


def test_train_evaluate_and_sample_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--arch", "rnn", "--out", str(tmp_path), *QUICK]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = re.findall(r"validation loss ([\d.]+) nats, ([\d.]+) bits per character", said)
    assert main(["evaluate", str(tmp_path), "--lengths", "10", "40"]) == 0
    tested = capsys.readouterr().out
    assert re.findall(r"validation loss ([\d.]+) nats, ([\d.]+) bits per character", tested) == found[-1:]
    assert re.findall(r"^(\d+) time steps, .*: [\d.]+ nats, [\d.]+ bits$", tested, re.MULTILINE) == ["10", "40"]
    written = []
    for where in (tmp_path, tmp_path / "checkpoint.safetensors"):
        assert main(["sample", str(where), "--prompt", "The ", "--length", "30", "--seed", "3"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0].startswith("The ")
    assert len(written[0]) == len("The ") + 30 + 1
    assert written[0] == written[1]
    stamp = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    assert main(["language", *command[1:]]) == 0, "the same command by its other name"
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == stamp


def test_ctrl_c_stops_with_a_word_on_how_to_go_on_and_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--arch", "rnn", "--out", str(tmp_path), *QUICK[:-1], "8"]
    program = "import sys; from streamnorm.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from the last checkpoint" in said
    before = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert 0 < before["done"] < before["updates"]
    assert main(arguments) == 0
    assert "epoch   8 " in capsys.readouterr().out
    after = checkpoint.load(tmp_path / "checkpoint.safetensors")["metrics"]
    assert same(after[: len(before["metrics"])], before["metrics"])


def test_a_text_of_ones_own_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(WORDS * 40)
    command = ["train", "--arch=gru", "--data", str(path), "--out", str(tmp_path / "run"), *QUICK[2:]]
    assert main([*command, "--limit", "1500"]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--prompt", "Zebra"]) == 2
    assert "unknown characters: 'Z', 'b'" in capsys.readouterr().err
    path.write_text("ZZ" + WORDS * 40)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "1 unknown characters: 'Z'" in capsys.readouterr().err
    path.write_text("the " + WORDS * 40)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "it was trained on another text: mine.txt: 1500 characters" in capsys.readouterr().err


def test_what_is_no_language_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path), "--epochs", "1", "--width", "8"]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path)]) == 2
    assert "holds a classifier of digits, no language model" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--lengths", "100"]) == 2
    assert "--lengths are those of a language model" in capsys.readouterr().err
