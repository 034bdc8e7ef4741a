"""A new journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ASKED, FACTS
from streamnorm.lab.bench.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "2026-01-31-some-cpu.jsonl")
    journal.start(ASKED, FACTS)
    return journal
