"""Trained language models in use: text from them, and the command line."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from close import same
from texts import WORDS, small, tiny, to_the_end

from streamnorm.lab.cli import main
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.language.data import encode
from streamnorm.lab.runs.language.loop import TextTrainer
from streamnorm.lab.runs.language.model import build, sample

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


def test_lengths_that_take_turns_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--arch", "rnn", "--arm", "tsbn", "--out", str(tmp_path), *QUICK, "--steps", "5", "10"]
    assert main(command) == 0
    found = re.findall(r"validation loss ([\d.]+) nats", capsys.readouterr().out)
    assert main(["evaluate", str(tmp_path)]) == 0
    assert re.findall(r"validation loss ([\d.]+) nats", capsys.readouterr().out) == found[-1:]
    assert main(["sample", str(tmp_path), "--length", "30"]) == 0


def test_ctrl_c_stops_with_a_word_on_how_to_go_on_and_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--arch", "rnn", "--out", str(tmp_path), *QUICK[:-1], "8"]
    program = "import sys; from streamnorm.lab.cli import main; sys.exit(main(sys.argv[1:]))"
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
    assert "holds a classifier, which has no --lengths; leave that out" in capsys.readouterr().err
