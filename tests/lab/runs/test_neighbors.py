"""Nearest neighbors by hand, and the commands that train an auto-encoder, test it and show them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from films import WORDS, collection

from streamnorm.lab.cli import main
from streamnorm.lab.runs.autoencoder.data import Bags
from streamnorm.lab.runs.autoencoder.model import Autoencoder
from streamnorm.lab.runs.autoencoder.neighbors import codes, nearest, precision, precision_by_chance, side_by_side
from streamnorm.nn.layers import SampleNorm


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
    monkeypatch.setattr("streamnorm.lab.runs.autoencoder.neighbors.QUERIES", 5)
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
