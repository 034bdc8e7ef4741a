"""A few of the histories of ``make kill`` and of the files of ``make hostile``, which are far more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def passes(script: str, *flags: str) -> str:
    """What a script of this folder says, which has to end well."""
    done = subprocess.run([sys.executable, str(TESTS / script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("seed", ["1", "9"])
def test_killed_commands_go_on_to_the_same_end(seed: str) -> None:
    said = passes("kill.py", "--seed", seed, "--command", "train", "--command", "learn")
    assert "(0 wrong)" in said.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read there")
def test_hostile_files_are_refused_in_a_line() -> None:
    kinds = ("classifier", "learn", "csv", "mnist", "monitor")
    said = passes("hostile.py", "--files", "100", *[word for kind in kinds for word in ("--kind", kind)])
    assert ", 0 wrong, " in said.splitlines()[-1]
