"""The gate: nothing is timed that is not right."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import idle, work
from streamnorm import StreamingNorm
from streamnorm.lab.bench import run, worker
from streamnorm.lab.bench.case import WrongError
from streamnorm.lab.bench.gate import check_cycle, check_layer
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.layers import OURS
from streamnorm.lab.cli import main


class Off(StreamingNorm):
    """Wrong in the sixth digit of what it returns, beyond what float32 explains."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-4)


class Forgetful(StreamingNorm):
    """Right in what it returns, wrong in what it remembers for testing."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.H1 is not None:
            self.H1.estimate.mul_(1.001)
        return y


class Broken(StreamingNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 4, 3)], ids=str)
def test_gate_is_green_for_what_is_right(name: str, shape: tuple[int, ...]) -> None:
    check_layer(OURS[name], shape)
    check_layer(OURS[name], shape, torch.bfloat16)
    if name != "BatchNorm" and " A" not in name and name != "full":
        check_cycle(OURS[name], 5)


@pytest.mark.parametrize(
    ("layer", "what"),
    [(Off, r"y of a .* is off by \S+e-0\d"), (Forgetful, r"H1\.estimate of a"), (Broken, "no such kernel")],
)
def test_a_wrong_layer_turns_the_gate_red_and_nothing_is_timed(layer: Any, what: str, journal: Journal) -> None:
    calls: list[str] = []
    wrong = idle(name="wrong", calls=calls, check=partial(check_layer, layer, (4, 6)))
    with pytest.raises(WrongError, match=what) as caught:
        work([idle(calls=calls), wrong], journal, "tuned", 1)
    assert "features, wrong: ours: " in str(caught.value)
    assert not calls
    assert {line["kind"] for line in journal.lines()} == {"start", "green"}


def test_a_red_gate_fails_the_command(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, worker.RED))
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 2
    assert "do not compute what they should; nothing was timed" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.md"))
