"""Whatever becomes of what a run has kept: the run goes on right, or is refused in one line that names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import texts
from close import same
from mutations import damage, damage_json
from rows_of import learned, mixed
from toy import small, toy

from streamnorm.lab.cli import main
from streamnorm.lab.runs import keeping
from streamnorm.lab.runs.classifier.loop import train
from streamnorm.lab.runs.language.loop import train_text


class StopError(Exception):
    """What interrupts a run in these tests."""


def stop_at(update: int) -> Callable[..., None]:
    def interrupt(*now: Any) -> None:
        if (now[0] if isinstance(now[0], int) else now[0].done) == update:
            raise StopError

    return interrupt


def classifier(folder: Path, progress: Any = None) -> Any:
    return train(small(), toy(), folder, progress, 2)["metrics"]


def convolutional(folder: Path, progress: Any = None) -> Any:
    run = small(architecture="B", arm="BA6-S", epochs=2, width=4)
    return train(run, toy(), folder, progress)["metrics"]


def language(folder: Path, progress: Any = None, **changes: Any) -> Any:
    record = train_text(texts.small(epochs=1, validate_every=24, **changes), texts.tiny(500), folder, progress)
    return [{**line, "seconds": 0} for line in record["metrics"]]


def lstm(folder: Path, progress: Any = None) -> Any:
    return language(folder, progress, arch="lstm", hidden=4)


def stream(folder: Path, progress: Any = None, **changes: Any) -> Any:
    limit = {} if progress is None else {"limit": 40}
    made, _ = learned(mixed(60), folder, arms=("layer", "streaming"), **limit, **changes)
    return made.learner.rows, made.learner.curve.state_dict()


def adam(folder: Path, progress: Any = None) -> Any:
    return stream(folder, progress, optimizer="adam", scale=True)


RUNS = {run.__name__: run for run in (classifier, convolutional, language, lstm, stream, adam)}
HOW_OFTEN = 50


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    """What comes of a call, or the line that the command line shows, with status 2, where it is refused."""
    try:
        return call(), ""
    except (ValueError, OSError) as error:
        return None, str(error)


@pytest.fixture(scope="module", params=RUNS)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A run, a folder where it was stopped, and what it ends as."""
    run, folder = RUNS[request.param], tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        with suppress(StopError):
            run(folder / "stopped", stop_at(6))
    return run, folder / "stopped", run(folder / "whole")


def without_time(metrics: Any) -> Any:
    return [{**line, "seconds": 0} for line in metrics] if isinstance(metrics, list) else metrics


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("part", range(2))
def test_a_run_goes_on_right_or_names_what_is_damaged(part: int, begun: tuple[Any, Path, Any], tmp_path: Path) -> None:
    run, stopped, whole = begun
    made = random.Random(part)
    files = sorted(path.name for path in stopped.iterdir() if path.suffix in (".json", ".jsonl", ".safetensors"))
    for i in range(HOW_OFTEN // 2):
        folder = tmp_path / str(i)
        shutil.copytree(stopped, folder)
        name = made.choice([*files, "checkpoint.safetensors", "checkpoint.safetensors"])
        said = damage(folder / name, made)
        result, line = refusal(lambda folder=folder: run(folder))
        where = f"{part} {i}: {name}, {said}: {line}"
        if line:
            assert "\n" not in line, where
            assert name in line, where
            assert len(line) < 1000, where
        elif name in ("run.json", "metrics.jsonl"):
            assert same(without_time(result), without_time(whole)), where
        assert not (folder / ".lock").exists(), where
        shutil.rmtree(folder)


# --- By the command line

TINY = ["--epochs", "1", "--width", "4", "--train-limit", "128", "--test-limit", "20"]
COMPARE = ["compare", "--arms", "layer", "--seeds", "0", *TINY]
TEXT = ["train", "--arch", "rnn", "--hidden", "4", "--epochs", "1", "--limit", "3000", "--steps", "20"]


def refused(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert said in line


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "", '{"runs": {}}', '{"runs": [{"label": 3, "seed": 0}]}', "[" * 50_000, "\0", '{"runs": [NaN]}'],
    ids=lambda text: text[:20] or "empty",
)
def test_the_results_of_a_comparison(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(content)
    refused([*COMPARE, "--out", str(tmp_path)], "results.json is damaged: ", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_metrics_that_are_cut_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--arm", "layer", "--out", str(tmp_path), *TINY]
    assert main(command) == 0
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for text in (whole[:-9], "{}\n", "", whole + "[]\n", "\0", '{"updates": "1"}\n'):
        path.write_text(text)
        assert main(command) == 0, capsys.readouterr().err
        assert path.read_text() == whole


def test_whatever_reads_a_checkpoint_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TEXT, "--out", str(tmp_path / "text")]) == 0
    assert (
        main(
            [
                "train",
                "--arm",
                "batch",
                "--samples-per-batch",
                "8",
                "--batches-per-update",
                "4",
                "--out",
                str(tmp_path / "image"),
                *TINY,
            ]
        )
        == 0
    )
    made = random.Random(0)
    commands = [("text", ["sample", "--length", "3"]), ("image", ["evaluate"]), ("image", ["gap", "--limit", "40"])]
    refusals = 0
    for i in range(45):
        kind, (name, *flags) = made.choice(commands)
        folder = tmp_path / f"{kind}{i}"
        shutil.copytree(tmp_path / kind, folder)
        said = damage(folder / "checkpoint.safetensors", made)
        capsys.readouterr()
        status = main([name, str(folder), *flags])
        line = capsys.readouterr().err
        assert status in (0, 2), f"{i}: {name}, {said}"
        if status:
            refusals += 1
            assert line.count("\n") == 1, f"{i}: {name}, {said}: {line}"
            assert str(folder) in line, f"{i}: {name}, {said}: {line}"
    assert refusals > 20


def test_a_file_of_a_monitor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--arm", "streaming", "--monitor", "2", "--out", str(tmp_path / "run"), *TINY]
    assert main(command) == 0
    made = random.Random(0)
    for i in range(6):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "run", folder)
        said = damage_json(folder / "monitor.jsonl", made)
        capsys.readouterr()
        status = main([*command[: -len(TINY) - 1], str(folder), *TINY])
        line = capsys.readouterr().err
        assert status in (0, 2), said
        assert not status or ("monitor.jsonl is damaged" in line and line.count("\n") == 1), f"{said}: {line}"
