"""The table of what works: every row is there once, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|(.*)\|$", (ROOT / "docs/compatibility.md").read_text(), re.MULTILINE)


def test_every_row_is_there_once() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 66))


def test_what_works_names_a_test_that_exists() -> None:
    for number, _, here, shown in ROWS:
        paths = re.findall(r"`(tests/[\w/]+\.py)`", shown)
        assert paths or not here.startswith("yes"), f"row {number} names no test"
        assert all((ROOT / path).is_file() for path in paths), f"row {number}: {paths}"
