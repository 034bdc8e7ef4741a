"""`streamnorm recalibrate` and `gap` of language models and auto-encoders: the same commands as for classifiers."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import tiny
from torch import Tensor, nn

from streamnorm.calibration.postproc import layers
from streamnorm.calibration.recalibrate import TOLERANCE
from streamnorm.lab.cli import main
from streamnorm.lab.runs.autoencoder import loop as autoencoder
from streamnorm.lab.runs.autoencoder.data import load_documents
from streamnorm.lab.runs.keeping import MADE_BY, kind, state_at
from streamnorm.lab.runs.language import loop as language_loop
from streamnorm.lab.runs.language.data import decode, load_text
from streamnorm.lab.runs.reopen import KINDS, reopen

ROUNDING = 1e-6
"""Of a sigma: float32 rounds, by 6e-8, what goes into a layer, what is stored, and that of the layers below."""

Told = dict[str, Tensor]
"""For each set of statistics by its name ``(2, c)``: mean and sigma, float64."""


def text_file(folder: Path, characters: int = 1300) -> Path:
    """A made-up text of 1,287 training characters."""
    text, path = tiny(characters), folder / "text.txt"
    path.write_text(decode(torch.cat([text.train, text.validation[1:]]), text.vocabulary))
    return path


def documents_file(folder: Path) -> Path:
    """Documents of some 10 of 20 words, the first ones more often."""
    words = [3 * letter for letter in string.ascii_lowercase[:20]]
    chosen = torch.rand(80, 20, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.8, 0.2, 20)
    path = folder / "documents.jsonl"
    with path.open("w") as file:
        for i, row in enumerate(chosen):
            text = " ".join(words[j] for j in row.nonzero()[:, 0].tolist())
            file.write(json.dumps({"title": f"document {i}", "text": text, "genres": [text[:3]]}) + "\n")
    return path


def train_text(folder: Path, *flags: str) -> Path:
    """A small language model's run in ``folder / "run"``, of 5 time steps and so of streams of 50 characters."""
    quick = ["--hidden", "6", "--samples-per-batch", "4", "--steps", "5", "--epochs", "1", "--validate-every", "1000"]
    data = ["--data", str(text_file(folder)), "--out", str(folder / "run")]
    assert main(["train", *data, *quick, "--arch", *(flags or ("rnn",))]) == 0
    return folder / "run"


def train_documents(folder: Path, *flags: str) -> Path:
    """A small auto-encoder's run in ``folder / "run"``, of 72 training documents."""
    quick = ["--vocabulary", "20", "--hidden", "6", "--learning-rate", "0.05", "--samples-per-batch", "4"]
    data = ["--data", str(documents_file(folder)), "--out", str(folder / "run")]
    assert main(["train", "--arch", "autoencoder", *data, *quick, *flags]) == 0
    return folder / "run"


def stored(model: nn.Module) -> Told:
    """What testing uses."""
    found = {site.name: site.stored() for layer in layers(model) for site in layer.sites}
    return {name: table for name, table in found.items() if table is not None}


def pooled(x: Tensor) -> Tensor:
    """Mean and sigma of all rows ``(2, c)``."""
    return torch.stack([x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()])


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest distance of two tables, in sigmas."""
    return ((found - wanted).abs() / wanted[1]).max().item()


def met_by(model: nn.Module, through: Callable[[], Any]) -> Told:
    """What each layer is given in testing, while ``through`` runs the model."""
    given: dict[str, list[Tensor]] = {}
    hooks = []
    for layer in layers(model):

        def keep(module: nn.Module, args: tuple[Any, ...], layer: Any = layer) -> None:
            given.setdefault(layer.at(args[1] if len(args) > 1 else 0).name, []).append(args[0].double())

        hooks.append(layer.module.register_forward_pre_hook(keep))
    model.eval()
    with torch.no_grad():
        through()
    for hook in hooks:
        hook.remove()
    return {name: pooled(torch.cat(parts)) for name, parts in given.items()}


# --- exact


@pytest.mark.parametrize(
    ("flags", "streams"),
    [
        ("gru --arm streaming", [(25, 50, 5)]),
        ("rnn --arm batch", [(25, 50, 5)]),
        ("rnn --arm tsbn", [(25, 50, 5)]),
        ("rnn --arm batch --layers 2 --no-carry-state", [(257, 5, 5)]),
        ("rnn --arm streaming --steps 4 6", [(32, 40, 4), (21, 60, 6)]),
        ("rnn --arm tsbn --steps 4 6 --no-carry-state", [(321, 4, 4), (214, 6, 6)]),
    ],
)
def test_statistics_of_a_language_model_are_those_of_its_streams(
    flags: str, streams: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    """By hand: so many streams, of so many characters, in chunks of so many steps."""
    run = train_text(tmp_path, *flags.split())
    assert main(["recalibrate", str(run), "--samples-per-batch", "60"]) == 0
    _, model, _ = language_loop.trained(tmp_path / "run-recalibrated")
    symbols = load_text(str(tmp_path / "text.txt")).train

    def through() -> None:
        for n, length, steps in streams:
            state: Any = None
            for start in range(0, length, steps):
                x = symbols[: n * length].view(n, length)[:, start : start + steps]
                _, state = model(x.T, state)

    found, wanted = stored(model), met_by(model, through)
    assert found.keys() == wanted.keys()
    for name in found:
        # What acts on itself stands still only so far as its passes go on; what comes in does not depend on it.
        exact = name.startswith("recurrent.cells.l0.norm_ih")
        assert off(found[name], wanted[name]) < (ROUNDING if exact else TOLERANCE), name


@pytest.mark.parametrize("arm", ["streaming", "batch"])
def test_statistics_of_an_auto_encoder_are_those_of_its_training_documents(arm: str, tmp_path: Path) -> None:
    run = train_documents(tmp_path, "--arm", arm, "--normalized", "all", "--dropout", "0.3", "--train-limit", "70")
    assert main(["recalibrate", str(run), "--samples-per-batch", "16"]) == 0
    _, model, _ = autoencoder.trained(tmp_path / "run-recalibrated")
    documents = load_documents(str(tmp_path / "documents.jsonl"), vocabulary=20)
    x = documents.words.dense(torch.float64)[:70]
    found, model = stored(model), model.double()
    with torch.no_grad():
        before = x @ model.read.weight
        hidden = pooled(before)
        code = torch.relu((before - hidden[0]) / hidden[1] * model.norms[0].weight + model.norms[0].bias)
        top = pooled(code @ model.linears[0].weight.T)
    assert off(found["norms.0"], hidden) < ROUNDING
    assert off(found["norms.1"], top) < ROUNDING
    every = documents.words.dense(torch.float64) @ model.read.weight.detach()
    assert off(found["norms.0"], pooled(every)) > 100 * ROUNDING, "documents that were left out would show"


# --- in use


def test_a_recalibrated_language_model_is_a_run_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = train_text(tmp_path, "gru", "--alpha", "0.9", "0.1"), tmp_path / "run-recalibrated"
    before = (run / "checkpoint.safetensors").read_bytes()
    loss = r"validation loss [\d.]+ nats, [\d.]+ bits per character of 13"
    assert main(["evaluate", str(run)]) == 0
    first = re.findall(loss, capsys.readouterr().out)
    assert main(["recalibrate", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"gru streaming 4 S/B x 2 B/U: statistics of 1250 characters of text.txt, pooled, \d+ passes; kept in {done}",
        said[0],
    )
    assert re.findall(f"^before  ({loss})$", said[1]) == first
    after = re.findall(f"^after   ({loss})$", said[2])
    assert first != after
    assert main(["evaluate", str(done), "--lengths", "7"]) == 0
    tested = capsys.readouterr().out
    assert re.findall(loss, tested) == after
    assert re.search(r"^7 time steps, each sequence from a state of 0: [\d.]+ nats, [\d.]+ bits$", tested, re.MULTILINE)
    assert main(["sample", str(done), "--prompt", "the ", "--length", "20"]) == 0
    assert len(capsys.readouterr().out) == len("the ") + 20 + 1
    assert gap_of(run, capsys) > 1e-2
    assert gap_of(done, capsys) < 1e-4
    kept = json.loads((done / "run.json").read_text())
    assert kept["run"] == json.loads((run / "run.json").read_text())["run"]
    assert kept["recalibrated"]["characters"] == 1250
    assert (run / "checkpoint.safetensors").read_bytes() == before
    again = ["recalibrate", str(run / "checkpoint.safetensors"), "--estimator", "corrected", "--limit", "1000"]
    assert main(again) == 0, "a result may be made again, and a run named by its file"
    assert f"1000 characters of text.txt, corrected, 1 pass; kept in {done}" in capsys.readouterr().out


def gap_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """The largest distance of a mean that the command tells."""
    capsys.readouterr()
    assert main(["gap", str(folder)]) == 0
    return max(float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[4:])


def test_a_recalibrated_auto_encoder_is_a_run_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = train_documents(tmp_path, "--arm", "streaming"), tmp_path / "run-recalibrated"
    before = (run / "checkpoint.safetensors").read_bytes()
    cost = r"test cost [\d.]+ nats a document, [\d.]+ a word, of 8; [\d.]+ from how often each word occurs"
    assert main(["evaluate", str(run)]) == 0
    first = re.findall(cost, capsys.readouterr().out)
    assert main(["recalibrate", str(run), "--data", str(tmp_path / "documents.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"statistics of 72 documents of documents.jsonl, pooled, 1 pass; kept in {done}")
    assert re.findall(f"^before  ({cost})$", said[1]) == first
    after = re.findall(f"^after   ({cost})$", said[2])
    assert first != after
    assert main(["evaluate", str(done)]) == 0
    assert re.findall(cost, capsys.readouterr().out) == after
    assert main(["neighbors", str(run), "document 3", "--beside", str(done), "--k", "2"]) == 0
    assert capsys.readouterr().out.count("of the 2 nearest of 8 held-out documents share a label") == 2
    assert gap_of(run, capsys) > 1e-2
    assert gap_of(done, capsys) < 1e-4
    assert json.loads((done / "run.json").read_text())["recalibrated"]["documents"] == 72
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert main(["recalibrate", str(run), "--limit", "9", "--out", str(tmp_path / "other")]) == 0
    assert "statistics of 9 documents" in capsys.readouterr().out


def test_another_text_of_the_same_symbols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = train_text(tmp_path), tmp_path / "other.txt"
    other.write_text("a dog sat on the mat; " * 30)  # 653 training characters
    assert main(["gap", str(run), "--data", str(other)]) == 0
    assert "what testing uses, beside 650 characters of other.txt" in capsys.readouterr().out
    assert main(["recalibrate", str(run), "--data", str(other)]) == 0
    assert "statistics of 650 characters of other.txt" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run-recalibrated")]) == 0
    assert "rnn streaming 4 S/B x 2 B/U on text.txt" in capsys.readouterr().out, "tested on its own text"


def test_a_checkpoint_file_of_any_name_is_what_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_text(tmp_path)
    assert main(["recalibrate", str(run)]) == 0
    after = capsys.readouterr().out.splitlines()[-1].removeprefix("after   ")
    (run / "mine.safetensors").write_bytes((tmp_path / "run-recalibrated" / "checkpoint.safetensors").read_bytes())
    assert main(["evaluate", str(run / "mine.safetensors")]) == 0
    assert capsys.readouterr().out.rstrip().endswith(after)


def test_every_kind_of_run_can_be_reopened_and_has_the_other_tests_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    folders = [train_text(tmp_path), train_documents(tmp_path / "documents"), tmp_path / "digits"]
    assert main(["train", "--out", str(folders[-1]), "--epochs", "1", "--width", "4"]) == 0
    states = {kind(state["run"]): (folder, state) for folder in folders for state in [state_at(folder)]}
    assert KINDS.keys() == MADE_BY.keys() - {"a learner of a stream"} == states.keys()
    for name, (folder, state) in states.items():
        assert reopen(folder, state).others.keys() == KINDS[name].others


# --- refused


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(command: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert main(command) == 2
    said = capsys.readouterr().err.strip()  # a bar that is gone leaves an empty line
    assert said.startswith("streamnorm: ")
    assert "\n" not in said
    assert message in said
    assert contents(folder) == before


def test_what_a_language_model_cannot_use_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, strange, short = train_text(tmp_path, "rnn", "--arm", "tsbn"), tmp_path / "strange.txt", tmp_path / "short.txt"
    strange.write_text("Zebras ran to the den; " * 30)
    short.write_text("the")
    other = tmp_path / "other"
    assert main(["train", "--out", str(other), "--epochs", "1", "--width", "4"]) == 0
    for flags, message in (
        (["--data", str(strange)], "unknown characters: 'Z'"),
        (["--data", str(short)], "2 training characters of short.txt are fewer than the 5 time steps"),
        (["--data", str(tmp_path / "nowhere.txt")], "no text file at"),
        (["--limit", "4"], "4 training characters of text.txt are fewer than the 5 time steps"),
        (["--limit", "5"], "norm_ih.h.times.0: sigma of a single activation"),
        (["--limit", "1"], "limit is a number of samples >= 2"),
        (["--samples-per-batch", "0"], "samples_per_batch is a whole number >= 1, got 0"),
        (["--out", str(run)], "is the run itself"),
        (["--out", str(other)], "holds another run, which would be lost"),
        (["--out", str(short / "under")], "short.txt is a file, and the run needs a folder"),
    ):
        assert_refused(["recalibrate", str(run), *flags], message, tmp_path, capsys)
    text_file(tmp_path, 1400)
    assert_refused(["gap", str(run)], "it was trained on another text: text.txt: 1300 characters", tmp_path, capsys)


def test_what_an_auto_encoder_cannot_use_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = train_documents(tmp_path, "--arm", "batch"), tmp_path / "other"
    assert main(["train", "--out", str(other), "--epochs", "1", "--width", "4"]) == 0
    for flags, message in (
        (["--data", "pydoc"], "words of its own documents"),
        (["--limit", "1"], "limit is a number of samples >= 2"),
        (["--estimator", "moving", "--samples-per-batch", "1"], "sigma of a single activation"),
        (["--out", str(run)], "is the run itself"),
        (["--out", str(other)], "holds another run, which would be lost"),
    ):
        assert_refused(["recalibrate", str(run), *flags], message, tmp_path, capsys)
    (tmp_path / "documents.jsonl").write_text((tmp_path / "documents.jsonl").read_text().replace("aaa", "zzz"))
    assert_refused(["recalibrate", str(run)], "was trained on other documents", tmp_path, capsys)


@pytest.mark.parametrize("command", ["recalibrate", "gap"])
def test_runs_without_statistics_and_runs_that_failed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, arm in enumerate(("layer", "none")):
        for name, train in (("text", train_text), ("documents", train_documents)):
            folder = tmp_path / f"{name}{i}"
            folder.mkdir()
            run = train(folder, *(["rnn"] if name == "text" else []), "--arm", arm)
            message = "has no layer that keeps statistics for testing"
            assert_refused([command, str(run)], message, tmp_path, capsys)
    one = ["--arm", "batch", "--samples-per-batch", "1", "--out"]
    for data in (["rnn", "--data", str(text_file(tmp_path))], ["autoencoder", "--data", str(documents_file(tmp_path))]):
        out = tmp_path / f"failed {data[0]}"
        size = ["--vocabulary", "20"] if data[0] == "autoencoder" else ["--steps", "5"]
        assert main(["train", "--arch", *data, *size, *one, str(out)]) == 2
        capsys.readouterr()
        assert_refused([command, str(out)], "holds a run that could not train: ", tmp_path, capsys)
