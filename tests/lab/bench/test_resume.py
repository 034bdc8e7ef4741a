"""A record goes on where it stopped, and is neither overwritten nor mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import idle, work
from streamnorm.lab.bench import run
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.settings import Bench


def test_what_is_in_the_journal_is_not_timed_again(journal: Journal) -> None:
    calls: list[str] = []
    work([idle(calls=calls)], journal, "tuned", 2)
    assert "ours" in calls
    with journal.path.open("a") as file:
        file.write('{"kind": "case", "allocator": "tun')  # the process was killed here
    calls.clear()
    other: list[str] = []
    work([idle(calls=calls), idle(name="two", calls=other)], journal, "tuned", 2)
    assert not calls
    assert "ours" in other
    work([idle(calls=calls)], journal, "default", 2)
    assert "ours" in calls
    assert [(c.allocator, c.name) for c in journal.cases()] == [("tuned", "one"), ("tuned", "two"), ("default", "one")]


def test_a_command_asks_the_gate_once_for_both_allocators(journal: Journal) -> None:
    asked: list[int] = []
    case = idle(check=lambda: asked.append(1))
    for command, allocator in (("a", "tuned"), ("a", "default")):
        work([case], journal, allocator, 1, command)
    assert len(asked) == 1
    work([idle(name="two", check=lambda: asked.append(1))], journal, "tuned", 1, "b")
    assert len(asked) == 2


def test_a_record_is_neither_overwritten_nor_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []

    def timed(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        wishes = json.loads(command[-1])
        work([idle()], Journal(Path(wishes["journal"])), wishes["allocator"], wishes["rounds"], wishes["command"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", timed)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    asked = Bench(rounds=1, out=tmp_path)
    path, _ = run.bench(asked)
    assert environments[0].items() >= run.TUNED.items()
    assert not set(run.TUNED) & set(environments[1]), "the default allocator, whatever was set outside"
    with pytest.raises(ValueError, match="is there already; --resume goes on with it"):
        run.bench(asked)
    with pytest.raises(ValueError, match="measured otherwise: rounds 1 there and 2 here"):
        run.bench(Bench(rounds=2, out=tmp_path, resume=True))
    monkeypatch.setattr("streamnorm.lab.bench.run.date", type("Tomorrow", (), {"today": lambda: None}))
    assert run.bench(Bench(rounds=1, out=tmp_path, resume=True))[0] == path


def test_quick_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamnorm", "bench", "--quick", "--groups", "single", "--threads", "1"]
    command += ["--allocator", "tuned"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    record = next(tmp_path.glob("*.md"))
    assert f"Record: {record}" in done.stdout
    text = record.read_text()
    assert "A quick run on tiny inputs" in text
    assert "| full B eager |" in text
    assert "streamnorm bench --quick --groups single" in text
    assert len(list(tmp_path.glob("*.png"))) == 1
