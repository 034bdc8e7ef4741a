"""A parquet file is learned as the JSON lines of its rows."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from pathlib import Path
from typing import Any

import pytest

from streamnorm.lab.cli import main
from streamnorm.lab.learning.parquet import ROWS, ParquetLines

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    return path


def some(count: int) -> list[dict[str, Any]]:
    return [{"a": i % 7, "b": None if i % 5 == 0 else i / 3, "word": "xyz"[i % 3], "y": i % 2} for i in range(count)]


@pytest.mark.parametrize("at_once", [1, 100, 1 << 16])
def test_all_rows_come_in_order_however_they_are_read(at_once: int, tmp_path: Path) -> None:
    rows = some(ROWS + 50)
    file, read = ParquetLines(written(tmp_path / "rows.parquet", rows)), b""
    while part := file.read(at_once):
        read += part
    assert [json.loads(line) for line in read.splitlines()] == rows


def test_numbers_stay_numbers_and_the_rest_is_words(tmp_path: Path) -> None:
    row = {"price": decimal.Decimal("1.50"), "day": dt.date(2026, 1, 2), "raw": b"\xff", "parts": [1, 2], "yes": True}
    (line,) = ParquetLines(written(tmp_path / "row.parquet", [row])).read().splitlines()
    found = json.loads(line)
    assert found == {"price": 1.5, "day": "2026-01-02", "raw": str(b"\xff"), "parts": [1, 2], "yes": True}


def test_it_is_learned_as_its_rows_in_json_are(tmp_path: Path) -> None:
    rows = some(300)
    path = written(tmp_path / "rows.parquet", rows)
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, limits in ((path, (120, 300)), (text, (300,))):  # the first is stopped, and goes on
        for limit in limits:
            out = str(tmp_path / file.suffix[1:])
            assert main(["learn", str(file), "--target", "y", "--limit", str(limit), "--out", out]) == 0
    binary, plain = (json.loads((tmp_path / kind / "results.json").read_text()) for kind in ("parquet", "jsonl"))
    assert binary["curve"] == plain["curve"]


def test_what_is_none_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("a,y\n1,2\n")
    assert main(["learn", str(path), "--target", "y", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged, or no parquet file" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["learn", str(path), "--target", "y", "--format", "csv"]) == 2
    assert "--format is for text" in capsys.readouterr().err
