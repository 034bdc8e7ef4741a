"""The command line: its flags, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamnorm.lab.cli import main
from streamnorm.lab.commands.classifiers import Compare, arms

QUICK = ["--epochs", "2", "--width", "16", "--batches-per-update", "16"]
RUN_FLAGS = [
    *("--data", "--architecture", "--loops", "--width", "--p", "--center", "--alpha", "--beta", "--kappa"),
    "--backward-stats",
    *("--samples-per-batch", "--batches-per-update", "--epochs", "--learning-rate", "--momentum", "--weight-decay"),
    *("--warmup", "--train-limit", "--test-limit"),
]
TEXT_FLAGS = [
    *("--data", "--arch", "--hidden", "--layers", "--nonlinearity", "--arm", "--p", "--center", "--alpha", "--beta"),
    *("--kappa", "--backward-stats", "--vertical", "--samples-per-batch", "--batches-per-update", "--steps"),
    *("--carry-state", "--epochs", "--learning-rate", "--validate-every", "--warmup", "--weight-scale"),
    *("--limit", "--seed"),
]
AUTOENCODER_FLAGS = [
    *("--data", "--arch", "--vocabulary", "--hidden", "--nonlinearity", "--arm", "--normalized", "--top-bias"),
    *("--dropout", "--p", "--center", "--alpha", "--beta", "--kappa", "--samples-per-batch", "--batches-per-update"),
    *("--epochs", "--learning-rate", "--warmup", "--train-limit", "--seed"),
]
FLAGS = {
    "learn": [
        *("--target", "--ignore", "--arm", "--arms", "--format", "--limit", "--checkpoint-every", "--strict"),
        *("--fresh", "--out", "--task", "--width", "--depth", "--optimizer", "--learning-rate"),
        *("--scale", "--words", "--max-classes", "--seed"),
    ],
    "compare": ["--arms", "--seeds", "--out", "--data-root", *RUN_FLAGS],
    "train": ["--arch", "--out", "--data-root", "--monitor", *RUN_FLAGS, "--arm", "--seed"],
    "language": ["--out", "--data-root", *TEXT_FLAGS],
    "autoencoder": ["--out", "--data-root", *AUTOENCODER_FLAGS],
    "neighbors": ["--search", "--beside", "--k", "--data-root"],
    "evaluate": ["--data-root", "--lengths", "--loops"],
    "recalibrate": [
        *("--estimator", "--passes", "--samples-per-batch", "--limit", "--data", "--data-root", "--out"),
    ],
    "gap": ["--samples-per-batch", "--limit", "--data", "--data-root"],
    "reproduce": ["--list", "--tier", "--out", "--data-root", "--seeds", "--threads", "--processes"],
    "report": ["--results", "--out"],
    "sample": ["--prompt", "--length", "--temperature", "--seed"],
    "bench": [
        "--groups",
        "--rounds",
        "--threads",
        "--out",
        "--allocator",
        "--device",
        "--quick",
        "--compile",
        "--resume",
    ],
    "doctor": [],
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_pinned(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    found = re.findall(r"^\W*(?:-h, )?(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(found) == sorted([*FLAGS[command], "--help"])


def test_nothing_asks_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "Learn from a stream, row by row" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, streamnorm.lab.cli; assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compare_reports_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--out", str(tmp_path), "--seeds", "0", "1", "--arms", "none", "batch", "streaming", *QUICK]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "batch normalization could not train" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1] * 3
    errors = [run["metrics"][-1]["test_error"] for run in results["runs"] if run["arm"] == "streaming"]
    assert max(errors) < 0.5, "two epochs of digits leave chance (0.9) far behind"
    assert "<html" in (tmp_path / "report.html").read_text()
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(checkpoints) == 6
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == checkpoints
    again = json.loads((tmp_path / "results.json").read_text())
    assert [run["metrics"] for run in again["runs"]] == [run["metrics"] for run in results["runs"]]


@pytest.mark.parametrize("command", ["doctor", "--help"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    """As in ``streamnorm doctor | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([sys.executable, "-m", "streamnorm", command], stdout=writing, stderr=-1, text=True)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")


def test_train_then_evaluate_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path), "--arm", "streaming", *QUICK]) == 0
    trained = capsys.readouterr().out
    assert main(["evaluate", str(tmp_path)]) == 0
    evaluated = capsys.readouterr().out
    last = re.findall(r"test loss ([\d.]+) nats, error ([\d.]+%)", trained)[-1]
    assert re.findall(r"test loss ([\d.]+) nats, error ([\d.]+%)", evaluated) == [last]
    assert main(["evaluate", str(tmp_path / "checkpoint.safetensors")]) == 0
    assert capsys.readouterr().out == evaluated
    assert "already" not in trained
    assert main(["train", "--out", str(tmp_path), "--arm", "streaming", *QUICK]) == 0
    assert "It has finished: nothing is left to do." in capsys.readouterr().out


def test_a_monitored_run_trains_as_any_other_and_leaves_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("plain", "monitored")]
    for folder, flags in zip(folders, ([], ["--monitor", "5"]), strict=True):
        assert main(["train", "--out", str(folder), *flags, *QUICK]) == 0
    ends = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in folders]
    assert [{**end, "seconds": 0} for end in ends[:1]] == [{**end, "seconds": 0} for end in ends[1:]]
    records = [json.loads(line) for line in (folders[1] / "monitor.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(0, ends[0]["updates"], 5))
    assert (folders[1] / "monitor.png").read_bytes().startswith(b"\x89PNG")
    assert not (folders[0] / "monitor.jsonl").exists()
    capsys.readouterr()
    assert main(["train", "--out", str(folders[0]), "--monitor", "5", *QUICK]) == 0
    assert "Monitor: nothing was left to record" in capsys.readouterr().out
    assert main(["train", "--out", str(tmp_path / "never"), "--monitor", "0", *QUICK]) == 2
    assert not (tmp_path / "never").exists()


def test_recalibrated_statistics_are_kept_in_a_folder_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = tmp_path / "run", tmp_path / "run-recalibrated"
    assert main(["train", "--out", str(run), *QUICK]) == 0
    before = (run / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()

    def distances(folder: Path) -> list[float]:
        assert main(["gap", str(folder)]) == 0
        table = capsys.readouterr().out.splitlines()[4:]
        assert [line.split()[0] for line in table] == ["2", "5", "8"], "the norms of architecture A"
        return [float(line.split()[1]) for line in table]

    assert min(distances(run)) > 1e-3
    assert main(["recalibrate", str(run), "--samples-per-batch", "1"]) == 0
    said = capsys.readouterr().out
    assert f"statistics of 1437 samples of digits, pooled, 3 passes; kept in {done}" in " ".join(said.split())
    after = re.findall(r"after +test (loss [\d.]+ nats, error [\d.]+%)", said)
    assert main(["evaluate", str(done)]) == 0
    assert re.findall(r"test (loss [\d.]+ nats, error [\d.]+%)", capsys.readouterr().out) == after
    assert max(distances(done)) < 1e-4
    assert json.loads((done / "run.json").read_text())["recalibrated"]["passes"] == 3
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert main(["recalibrate", str(run), "--out", str(run)]) == 2
    assert "is the run itself" in capsys.readouterr().err
    assert main(["recalibrate", str(done), "--out", str(run)]) == 2
    assert "holds another run, which would be lost" in capsys.readouterr().err
    assert (run / "checkpoint.safetensors").read_bytes() == before
    for limit in ("1", "0", "-100"):
        assert main(["recalibrate", str(run), "--limit", limit]) == 2
        assert f"limit is a number of samples >= 2, of which there is a sigma, got {limit}" in capsys.readouterr().err


def test_a_study_is_reproduced_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "specialcase", "--tier", "smoke", "--seeds", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    said, record = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    assert f"Record: {tmp_path / 'results.md'}" in said
    assert "| C-36: " in record
    assert "trains far too little for its verdicts to mean anything" in said[: said.index("C-36")], "before them"
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(checkpoints) == 2, "the pair, with one seed"
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == checkpoints


def test_doctor_tells_what_serves_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name}  " in said for name in ("torch", "processor", "library"))
    assert re.search(r"^  StreamingNorm\(64\) +\w+ +\w+ +\w+ +\w+$", said, re.MULTILINE)


def test_an_arm_may_have_its_own_batch() -> None:
    runs = arms(Compare(arms=("streaming", "batch:64x1"), seeds=(3,)))
    assert [(r.arm, r.samples_per_batch, r.batches_per_update, r.seed) for r in runs] == [
        ("streaming", 1, 32, 3),
        ("batch", 64, 1, 3),
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare", "--arms", "streming"], "unknown arm 'streming'; did you mean 'streaming'?"),
        (["compare", "--arms", "batch:64"], "an arm is a name, or a name with its S/B x B/U like batch:64x1"),
        (["compare", "--arms", "none", "none"], "every arm and seed once"),
        (["compare", "--seeds"], "give at least one arm and one seed"),
        (["compare", "--data", "digit"], "digits"),
        (["compare", "--arms", "none", "batch:4000x1"], "4000 samples"),
        (["compare", "--out", __file__], "test_cli.py is a file, and the run needs a folder"),
        (["train", "--out", __file__], "test_cli.py is a file, and the run needs a folder"),
        (["train", "--arm", "streming"], "unknown arm 'streming'"),
        (["trian"], "unknown command 'trian' (did you mean train?); the commands are learn, compare, train, "),
        (
            ["train", "--lerning-rate", "1"],
            "train has no --lerning-rate (did you mean --learning-rate?); see",
        ),
        (["train", "--learning_rat=1"], "train has no --learning-rat (did you mean --learning-rate?)"),
        (["language", "--no-carry-stat"], "language has no --no-carry-stat (did you mean --no-carry-state?)"),
        (["train", "--arch", "gru", "--monitor", "5"], "language has no --monitor, which belongs to train; see"),
        (["train", "--arch", "gur"], "--arch takes rnn, gru, lstm, autoencoder, got gur (did you mean gru?)"),
        (["train", "--arch=autoencodr"], "got autoencodr (did you mean autoencoder?)"),
        (["train", "--arch"], "--arch takes rnn, gru, lstm, autoencoder, got nothing"),
        (["train", "--epochs", "x"], "--epochs: invalid literal for int() with base 10: 'x'; see streamnorm train"),
        (
            ["train", "--alpha", "1"],
            "'--alpha'. Expected 2 values; see streamnorm train --help",
        ),
        (
            ["train", "--architecture", "E"],
            "invalid choice 'E' for argument '--architecture'. Expected one of",
        ),
        (["train", "--out=--arch", "--epochs", "x"], "parsing --epochs"),
        (["evaluate", "--lengths", "x", "--", "-x"], "parsing --lengths"),
        (["doctor", "a" * 200], "a" * 200),
        (["evaluate"], "Missing from streamnorm evaluate: PATH Folder of a run that"),
        (["train", "--data", "tinyshakespeare"], "is a text; train on it by streamnorm train --arch gru --data tiny"),
        (
            ["compare", "--data", "movies"],
            "a collection of documents; train on it by streamnorm train --arch autoencoder",
        ),
        (["train", "--batches-per-update", "2000"], "2000 samples"),
        (["train", "--data", "mnist", "--data-root", "nowhere"], "nowhere"),
        (["train", "--loops", "5", "5"], "loops is for architectures C and D, A has none; got (5, 5)"),
        (["train", "--architecture", "C", "--loops", "5"], "loops is two whole numbers >= 1, k1 and k2"),
        (["train", "--architecture", "D", "--loops", "0"], "loops is one whole number >= 1, k, for architecture D"),
        (["train", "--backward-stats", "latest"], "for architectures C and D alone"),
        (["compare", "--architecture", "B", "--loops", "2", "2"], "loops is for architectures C and D, B has none"),
        (["evaluate", "nowhere"], "no checkpoint at nowhere"),
        (["train", "--arch", "gru", "--data", "shakespere"], "Did you mean 'shakespeare'?"),
        (["train", "--arch", "gru", "--arm", "streming"], "did you mean 'streaming'?"),
        (["language", "--limit", "5000"], "too short for chunks of 100 time steps"),
        (["train", "--arch", "autoencoder", "--data", "movie"], "Did you mean 'movies'?"),
        (["train", "--arch=autoencoder", "--vocabulary", "100000"], "fewer than a vocabulary of 100000"),
        (["neighbors", "nowhere", "Toy Story"], "no checkpoint at nowhere"),
        (["sample", "nowhere"], "no checkpoint at nowhere"),
        (["recalibrate", "nowhere"], "no checkpoint at nowhere"),
        (["reproduce", "onlin"], "unknown study 'onlin'; did you mean 'online'?"),
        (["reproduce", "online", "--seeds"], "a study needs at least one seed"),
        (["reproduce", "online", "--threads", "0"], "threads is a whole number >= 1, got 0"),
        (["reproduce", "online", "--processes", "2"], "the study online trains one run after another"),
        (["gap", "nowhere", "--samples-per-batch", "0"], "samples_per_batch is a whole number >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    command: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    output, said = capsys.readouterr()
    assert said.startswith("streamnorm: ")
    assert message in said
    assert "Traceback" not in said
    assert said.count("\n") == 1
    if command[:1] in (["train"], ["compare"]) and "--arch" not in command:
        assert not output.strip(), "a classifier says on what it works once nothing is refused any more"


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--arm", "batch"], "--samples-per-batch 8, or --arm streaming --center estimate"),
        (["--arm", "instance"], "--arm layer"),
        (["--arm", "none", "--learning-rate", "1e30"], "a lower --learning-rate"),
    ],
)
def test_a_run_that_cannot_train_says_by_which_flags_it_might(
    flags: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "failed"), *flags, *QUICK]) == 2
    said = capsys.readouterr().err
    assert "could not train: " in said
    assert f"; try {remedy}" in said
    tried = {
        "--samples-per-batch 8": ["--arm", "batch", "--samples-per-batch", "8"],
        "--arm streaming": ["--arm", "streaming", "--center", "estimate"],
        "--arm layer": ["--arm", "layer"],
        "a lower": ["--arm", "none"],
    }
    for i, flags in enumerate(tried[words] for words in tried if words in remedy):
        assert main(["train", "--out", str(tmp_path / str(i)), *flags, *QUICK, "--epochs", "1"]) == 0


def test_other_settings_do_not_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path), *QUICK]) == 0
    before = (tmp_path / "run.json").read_text()
    assert main(["train", "--out", str(tmp_path), *QUICK, "--learning-rate", "0.05"]) == 2
    assert "learning_rate 0.1 there and 0.05 here" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("command", [["train"], ["compare", "--arms", "none", "--seeds", "0"]], ids=lambda c: c[0])
def test_ctrl_c_stops_with_a_word_on_how_far_it_came_and_how_to_go_on(command: list[str], tmp_path: Path) -> None:
    begin = [sys.executable, "-c", "import sys; from streamnorm.lab.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*begin, *command, "--out", str(tmp_path), "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not any(path.read_text() for path in tmp_path.rglob("metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)
    assert process.returncode == 130
    if command == ["train"]:
        assert "epoch   1   train loss " in output, "each epoch as it closes"
    assert re.search(
        r"stopped at update \d+ of 4400000 \(.*\); the same command goes on from the last checkpoint", said
    )
    assert "Traceback" not in said


def test_a_classifier_is_what_arch_none_says(tmp_path: Path) -> None:
    for arch in (["--arch", "None"], ["--arch=None"]):
        assert main(["train", *arch, "--out", str(tmp_path), *QUICK]) == 0


def test_a_run_is_recalibrated_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *QUICK]) == 0
    monkeypatch.chdir(tmp_path / "run")
    for folder in (".", "checkpoint.safetensors"):
        assert main(["recalibrate", folder]) == 0
    assert (tmp_path / "run-recalibrated/checkpoint.safetensors").is_file()
