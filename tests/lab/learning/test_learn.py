"""Learning from a stream: test-then-train exactly, networks that grow, figures, arms side by side, the report."""

from __future__ import annotations

import io
import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from close import same
from rows_of import as_json, job, learned, mixed, state

from streamnorm.lab.cli import main
from streamnorm.lab.learning import prequential, session
from streamnorm.lab.learning.arms import ARMS
from streamnorm.lab.learning.figures import sentence
from streamnorm.lab.learning.network import Drawn, Network
from streamnorm.lab.learning.prequential import POINTS, Curve, Track


def numbers(n: int) -> str:
    made = random.Random(1)
    rows = [[made.gauss(0, 1), made.gauss(1, 2)] for _ in range(n)]
    return "u,v,y\n" + "".join(f"{u!r},{v!r},{int(u > v)}\n" for u, v in rows)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arm", ["none", "layer", "streaming"])
def test_it_is_a_loop_that_predicts_before_it_learns(arm: str, optimizer: str, tmp_path: Path) -> None:
    text = numbers(150)
    made, _ = learned(text, tmp_path, arms=(arm,), optimizer=optimizer, learning_rate=0.01)
    rows = [[float(x) for x in line.split(",")] for line in text.splitlines()[1:]]
    network = Network(arm, 2, 8, 2, Drawn(0))
    model = network.model
    order = list(dict.fromkeys(int(y) for *_, y in rows))
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    optimize = kind(model.parameters(), lr=0.01)
    right: list[float] = []
    for i, (*x, y) in enumerate(rows):
        k, known = order.index(int(y)), len({row[-1] for row in rows[:i]})
        network.grow_outputs(max(known, k + 1), optimize)
        output = model(torch.tensor([x]))
        right.append(float(known > 0 and int(output[0, :known].argmax()) == k))
        model.zero_grad()
        F.cross_entropy(output, torch.tensor([k])).backward()
        optimize.step()
    assert abs(made.learner.tracks[arm].sum - sum(right)) <= 1, "a guess between equals may fall either way"
    for name, value in made.learner.arms[arm].network.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ("none", "layer", "streaming")
    whole, _ = learned(mixed(300), tmp_path / "a", arms=arms, scale=True)
    monkeypatch.setattr(session, "CHUNK", chunk)
    cut, _ = learned(mixed(300), tmp_path / "b", arms=arms, scale=True)
    assert same(state(cut), state(whole))


def test_every_arm_learns_by_itself_as_it_does_beside_others(tmp_path: Path) -> None:
    together, _ = learned(mixed(200), tmp_path / "all", arms=tuple(ARMS))
    for arm in ARMS:
        alone, _ = learned(mixed(200), tmp_path / arm, arms=(arm,))
        assert same(state(alone)["arms"][arm], state(together)["arms"][arm])
    weights = [a.network.first.weight.shape for a in together.learner.arms.values()]
    assert {*weights} == {(8, 4 + 16)}, "columns, and inputs for words"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_class_that_comes_late_is_learned_too(optimizer: str, tmp_path: Path) -> None:
    made, _ = learned(mixed(2200), tmp_path, optimizer=optimizer, arms=("layer",), width=16, scale=True)
    assert [*made.learner.classes][2:] == ["late"]
    arm = made.learner.arms["layer"]
    assert arm.network.readout.weight.shape == (3, 16)
    assert {id(p) for p in arm.network.model.parameters()} == {
        id(p) for group in arm.optimizer.param_groups for p in group["params"]
    }
    for parameter, held in arm.optimizer.state.items():
        assert all(v.shape in (parameter.shape, ()) for v in held.values() if isinstance(v, torch.Tensor))
    tracks = made.learner.tracks
    assert tracks["layer"].recent > max(tracks[name].recent for name in made.learner.baselines.names) + 0.15


def test_growing_leaves_what_was_there() -> None:
    network = Network("layer", 3, 8, 2, Drawn(0))
    optimizer = torch.optim.Adam(network.model.parameters())
    x = torch.randn(5, 3)
    network.model(x).square().sum().backward()
    optimizer.step()
    before = network.model(x)
    network.grow_outputs(4, optimizer)
    network.grow_inputs(10, optimizer)
    after = network.model(torch.cat([x, torch.zeros(5, 7)], 1))
    torch.testing.assert_close(after[:, :1], before)
    first = network.model[0].weight
    assert torch.equal(optimizer.state[first]["exp_avg"][:, 3:], torch.zeros(8, 7))


def test_json_lines_are_learned_as_the_same_csv_is(tmp_path: Path) -> None:
    text = mixed(200)
    csv, _ = learned(text, tmp_path / "csv")
    lines, _ = learned(as_json(text), tmp_path / "json", format="jsonl")
    assert same(state(lines), state(csv))


def test_regression_is_measured_beside_the_last_value_and_the_mean(tmp_path: Path) -> None:
    made = random.Random(0)
    x = [made.gauss(0, 1) for _ in range(1500)]
    text = "x,y\n" + "".join(f"{u},{1e5 + 3e4 * u}\n" for u in x)
    done, _ = learned(text, tmp_path, arms=("layer", "none"))
    assert (done.learner.schema.task, done.why) == ("regression", "not all whole")
    tracks = done.learner.tracks
    ys = [float(f"{1e5 + 3e4 * u}") for u in x]
    last = sum(abs(b - a) for a, b in pairwise(ys)) / 1499
    assert tracks["last value"].mean == pytest.approx(last)
    assert tracks["mean so far"].count == 1499, "of the first nothing can be known"
    assert tracks["none"].recent < tracks["mean so far"].recent / 4


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        (["a", "1", "2"], "classification"),
        (["1", "2", "1"], "classification"),
        (["1", "2.5"], "regression"),
        ([str(i) for i in range(20)], "classification"),
        ([str(i) for i in range(21)], "regression"),
        (["true", "false"], "classification"),
        (["1"] * 100 + ["0.5"], "classification"),  # decided from the first 100
    ],
)
def test_the_task_is_decided_from_the_first_rows(targets: list[str], task: str, tmp_path: Path) -> None:
    made, _ = learned("x,y\n" + "".join(f"1,{y}\n" for y in targets), tmp_path)
    assert made.learner.schema.task == task


def test_figures_and_curves_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    track, curve = Track(), Curve(["a"])
    for i in range(1, 40_001):
        track.add(float(i % 2))
        curve.note(i, {"a": track})
    assert len(track._latest) == prequential.WINDOW
    assert POINTS // 2 <= len(curve.rows) == len(curve.so_far["a"]) == len(curve.recent["a"]) <= POINTS
    assert {b - a for a, b in pairwise(curve.rows)} == {curve.stride}


def test_words_and_columns_take_bounded_memory(tmp_path: Path) -> None:
    text = "word,x,y\n" + "".join(f"w{i},{i % 7},{i % 3}\n" for i in range(100_000))
    made, _ = learned(text, tmp_path, arms=("layer",), width=4, depth=1)
    assert made.learner.rows == 100_000
    assert made.learner.arms["layer"].network.first.in_features == 2 + 16
    assert (tmp_path / "checkpoint.safetensors").stat().st_size < 400_000


def test_scaled_numbers_may_be_of_any_size(tmp_path: Path) -> None:
    made = random.Random(0)
    rows = [(made.gauss(0, 1), made.gauss(0, 1)) for _ in range(1500)]
    text = "u,v,y\n" + "".join(f"{1e6 + 1e5 * u},{1e-5 * v},{int(u > v)}\n" for u, v in rows)
    raw, _ = learned(text, tmp_path / "raw", arms=("layer",))
    scaled, _ = learned(text, tmp_path / "scaled", arms=("layer",), scale=True)
    assert scaled.learner.tracks["layer"].recent > 0.85 > raw.learner.tracks["layer"].recent


def test_an_arm_that_diverges_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    learned(mixed(300), tmp_path, arms=("none", "layer"), limit=100)
    stream = io.BytesIO(mixed(300).encode())
    with session.session(job(arms=("none", "layer")), tmp_path, stream, lambda _: None) as made:
        with torch.no_grad():
            made.learner.arms["none"].network.readout.bias.fill_(math.nan)
        made.run(lambda: None)
    learner = made.learner
    assert learner.arms["none"].failed == "diverged: its outputs were not finite at row 101"
    assert (learner.arms["layer"].failed, learner.failed) == (None, None)
    assert [learner.tracks[name].count for name in ("none", "layer")] == [100, 300]
    assert learner.curve.so_far["none"][-20:] == [None] * 20
    again, _ = learned(mixed(300) + "1,2,red,true,up\n", tmp_path, arms=("none", "layer"))
    assert again.learner.tracks["none"].count == 100
    assert "No normalization diverged at row 101" in sentence(again.record())


def test_when_no_arm_learns_any_more_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.csv"
    file.write_text("x,y\n" + "".join(f"{i % 7},{i % 5 + 0.5}\n" for i in range(1000)))
    command = ["learn", str(file), "--target", "y", "--arm", "none", "--learning-rate", "3"]
    for _ in range(2):
        assert main([*command, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "no network learns any more: diverged: its outputs were not finite at row " in said
        assert "try --scale, or a lower --learning-rate" in said


def test_the_command_reports_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.csv"
    file.write_text(mixed(400) + "1,2\n")
    command = ["learn", str(file), "--target", "y", "--arms", "none", "streaming", "--out", str(tmp_path / "run")]
    command += ["--width", "8", "--checkpoint-every", "150"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Task: classification, since the first targets are not all numbers" in said
    assert "line 402 skipped: 2 fields, and the header has 5" in said
    assert re.search(r"^300 rows .* rows a second$", said, re.MULTILINE)
    assert "1 row could not be used and was skipped" in said
    page = (tmp_path / "run/report.html").read_text()
    assert "<html" in page
    assert "most frequent class" in page
    assert not re.search(r"https?://", page)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["rows"] == 400
    file.write_text(mixed(400) + "1,2\n" + "1,2,red,true,up\n" * 50)
    assert main(command) == 0
    assert "400 rows were learned before; what was learned is left out" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run/results.json").read_text())["rows"] == 450
    assert main([*command, "--learning-rate", "1"]) == 2
    assert "other learning: learning_rate None there and 1.0 here; give another folder" in capsys.readouterr().err


def test_the_stream_to_try_it_out_can_be_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "drift", "--arms", "layer", "--limit", "3000", "--out", str(tmp_path), "--scale"]) == 0
    of = json.loads((tmp_path / "results.json").read_text())["recent"]
    assert of["layer"] > max(of["last class"], of["most frequent class"]) + 0.1


def test_nothing_is_left_of_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.csv"
    file.write_text(mixed(5))
    for flags, message in [
        (["--target", "Y"], "did you mean 'y'?"),
        ([], "name the column that is to be predicted: --target COLUMN, one of 'a', 'b'"),
        (["--target", "y", "--ignore", "colour"], "did you mean 'color'?"),
        (["--target", "y", "--arm", "streming"], "did you mean 'streaming'?"),
        (["--target", "y", "--arms", "none", "none"], "name every arm once"),
        (["--target", "y", "--limit", "0"], "limit is a whole number >= 1, got 0"),
    ]:
        assert main(["learn", str(file), *flags, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main(["learn", str(tmp_path / "none.csv"), "--target", "y"]) == 2
    assert "a stream made for trying this out: drift" in capsys.readouterr().err
    assert job().settings.rate == 0.01


@pytest.mark.parametrize("command", ["evaluate", "gap", "recalibrate", "sample", "neighbors"])
def test_other_commands_say_what_it_is(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned(mixed(20), tmp_path / "run")
    assert main([command, str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "holds a learner of a stream" in said
    assert said.count("\n") == 1
