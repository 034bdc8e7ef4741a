"""Streams as they come: hostile, broken, packed. What cannot be used is said with its line, never left out silently."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from close import same
from rows_of import as_json, job, learned, mixed, state

from streamnorm.lab.cli import main
from streamnorm.lab.learning.features import Encoder
from streamnorm.lab.learning.lines import LONGEST, LineError, Lines
from streamnorm.lab.learning.rows import CsvRows, JsonRows, Row

HEAD = "a,b,y\n"


def rows(text: str | bytes, **other: Any) -> list[Row]:
    data = text.encode() if isinstance(text, str) else text
    return [*CsvRows(Lines(io.BytesIO(data), "rows"), "y", **other).rows()]


def cells(text: str | bytes) -> list[Any]:
    return [[row.wrong] if row.wrong else [*row.cells.values(), row.label] for row in rows(text)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows is empty; it begins with a line that names the columns"),
        ("\n\n", "rows is empty"),
        (HEAD, "rows has no row that could be learned"),
        (HEAD + "1,2\n" * 3, "no row that could be learned; 3 cannot be used, the first in line 2: 2 fields, and the"),
        (HEAD + "1,2,\n" * 3, "the first in line 2: no target"),
        ("a,b,Y\n1,2,3\n", "no column 'y' (did you mean 'Y'?); --target is one of 'a', 'b', 'Y'"),
        ("a,a,y\n1,2,3\n", "more than one column called 'a'; give each its own name"),
        ("y\n1\n", "no column beside 'y', from which to predict it"),
        ('a,"b\n', "the header of rows cannot be read"),
        ("a,y\n".encode("utf-16"), "is no text in UTF-8"),
        (b"a\0,y\n", "is no text in UTF-8"),
        (gzip.compress(HEAD.encode(), mtime=0)[:-6], "ends early, after line"),
        (gzip.compress(HEAD.encode(), mtime=0)[:20] + b"x" * 50, "is damaged after line"),
    ],
)
def test_a_stream_that_cannot_be_used_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is looked at
        learned(text, tmp_path / "run")
    assert message in str(caught.value)


@pytest.mark.parametrize("task", ["auto", "classification"])
def test_a_header_alone_is_refused_whatever_the_task(task: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no row that could be learned"):
        learned(HEAD, tmp_path, task=task)


def test_fields_are_read_as_they_are_meant() -> None:
    assert cells("\ufeffa,b,y\r\n1, red ,u\r\n\r\n2,,v") == [[1.0, "red", "u"], [2.0, None, "v"]]
    assert cells('a,b,y\n"1","two\nlines, quoted ""so""",u\n3,4,v\n') == [
        [1.0, 'two\nlines, quoted "so"', "u"],
        [3.0, 4.0, "v"],
    ]
    assert cells("a;b;y\n1,5;2;u\n") == [["1,5", 2.0, "u"]]
    assert cells("a\tb\ty\nNaN\tNA\t1.0\n") == [[None, None, "1"]]
    assert cells("a,b,y\nTrue,1_000,007\n") == [[1.0, "1_000", "7"]]
    assert cells(b"a,b,y\ncaf\xe9,1,u\n") == [["caf\\xe9", 1.0, "u"]]


def test_the_lines_of_rows_are_told_right() -> None:
    found = rows('a,b,y\n1,"two\nlines",u\n\n1,2\n1,2,3,4\n1,"x"y,z\n1,2,inf\n1,2,v\n')
    assert [(row.line, row.wrong) for row in found] == [
        (2, None),
        (5, "2 fields, and the header has 3"),
        (6, "4 fields, and the header has 3"),
        (7, "',' expected after '\"'"),
        (8, "the target is inf"),
        (9, None),
    ]


def test_a_quote_that_is_never_closed_costs_what_it_holds_and_says_so() -> None:
    text = HEAD + '1,"2,u\n' + "1,2,u\n" * 30_000
    first, *others = rows(text)
    assert first.wrong is not None
    assert first.wrong.startswith("field larger than field limit")
    assert "up to line" in first.wrong
    assert len(others) > 5_000


def test_a_line_too_long_is_left_out_and_the_next_is_read() -> None:
    long = b"1," + b"x" * (3 * LONGEST) + b",u\n"
    first, second = rows(HEAD.encode() + long + b"1,2,v\n")
    assert first.wrong == f"a line of {len(long):,} bytes, and {LONGEST:,} is the most that one may have"
    assert (second.line, second.label) == (3, "v")
    lines = Lines(io.BytesIO(long), "long")
    with pytest.raises(LineError):
        lines.take()
    assert len(lines._held) < LONGEST + (1 << 17), "it was not kept"


def test_json_lines_of_all_kinds() -> None:
    lines = [
        '{"a": 1, "b": {"c": "red", "d": [true, null]}, "y": "u"}',
        '{"y": 1.0}',
        '{"a": 1}',
        "[1, 2]",
        "{broken",
        "[" * 100_000,
        '{"a": 1' + "0" * 400 + ', "y": true}',
        '{"a": NaN, "y": "NA"}',
    ]
    found = [*JsonRows(Lines(io.BytesIO("\n".join(lines).encode()), "rows"), "y").rows()]
    assert found[0].cells == {"a": 1.0, "b.c": "red", "b.d.0": 1.0, "b.d.1": None}
    assert [row.label for row in found[:2]] == ["u", "1"]
    assert (found[6].cells, found[6].label) == ({"a": float("inf")}, "true")
    wrong = [row.wrong or "" for row in found]
    assert wrong[2] == wrong[7] == "no target"
    assert wrong[3] == "no JSON object: [1, 2]"
    assert wrong[4].startswith("no JSON: ")
    assert wrong[5].startswith("no JSON: ")


def test_json_that_is_no_json_lines_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is one JSON array, .* jq -c"):
        learned('[\n{"a": 1, "y": 2}\n]', tmp_path, format="jsonl")
    with pytest.raises(ValueError, match="line 1: no 'y' \\(did you mean 'Y'"):
        learned('{"a": 1, "Y": 2}\n', tmp_path, format="jsonl")


def test_a_key_that_first_comes_late_is_told(tmp_path: Path) -> None:
    text = '{"a": 1, "y": "u"}\n' * 150 + '{"a": 1, "z": 3, "y": "u"}\n' * 7
    made, _ = learned(text, tmp_path, format="jsonl")
    assert made.learner.encoder.unknown == {"z": 7}


def test_what_changes_its_kind_half_way_is_learned_on(tmp_path: Path) -> None:
    half = [f"{i % 5},7,{i % 2}\n" for i in range(200)]
    text = HEAD + "".join(half) + "".join(f"low{i % 3},7,{i % 2}\n" for i in range(200))
    made, said = learned(text, tmp_path, arms=("none", "layer", "streaming"))
    assert (made.learner.rows, said) == (400, [])
    assert made.learner.failed is None
    assert made.learner.encoder.has_words


def test_numbers_that_are_not_finite_count_as_missing(tmp_path: Path) -> None:
    text = HEAD + "1,2,u\ninf,2,v\n-inf,1e300,u\n1e18,1,v\n"
    made, _ = learned(text, tmp_path, arms=("layer",), scale=True)
    assert made.learner.encoder.not_finite == 3
    encoder = Encoder(("a",), 4)
    assert encoder.read({"a": float("inf")}) == encoder.read({}) == encoder.read({"a": None})


def test_a_number_too_large_or_no_number_is_no_target_of_a_regression(tmp_path: Path) -> None:
    text = "x,y\n1,0.5\n2,red\n3,1e30\n4,1.5\n"
    made, said = learned(text, tmp_path, task="regression")
    assert made.learner.rows == 2
    assert said == [
        "line 3 skipped: the target is 'red', no number",
        "line 4 skipped: the target is 1e+30, and 1e+18 is the most",
    ]


def test_many_rows_that_cannot_be_used_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    made, said = learned(HEAD + "1,2,u\n" + "1,2\n" * 50, tmp_path)
    assert made.skipped.count == 50
    assert [line.split(":")[0] for line in said[:5]] == [f"line {i} skipped" for i in range(3, 8)]
    assert said[5:] == ["further rows that cannot be used are counted, not shown"]


def test_strict_stops_at_such_a_row_and_keeps_those_before(tmp_path: Path) -> None:
    text = HEAD + "1,2,u\n" * 7 + "1,2\n" + "1,2,v\n"
    with pytest.raises(ValueError, match="rows, line 9: 2 fields, and the header has 3; without --strict it"):
        learned(text, tmp_path, strict=True)
    made, _ = learned(text, tmp_path)
    assert (made.resumed, made.learner.rows, made.skipped.count) == (7, 8, 1)


def test_more_classes_than_there_may_be_are_refused(tmp_path: Path) -> None:
    text = "x,y\n" + "".join(f"1,c{i}\n" for i in range(12))
    with pytest.raises(ValueError, match=r"line 12: 'c10' would be class 11, and --max-classes is 10; if the"):
        learned(text, tmp_path, max_classes=10)
    made, _ = learned(text, tmp_path, max_classes=10, limit=10)
    assert made.resumed == 10, "those before are kept"


def test_packed_files_are_learned_as_plain_ones(tmp_path: Path) -> None:
    text = mixed(300).encode()
    plain, _ = learned(text, tmp_path / "plain")
    for name, data in (
        ("one", gzip.compress(text, mtime=0)),
        ("two", gzip.compress(text[:999]) + gzip.compress(text[999:])),
    ):
        assert same(state(learned(data, tmp_path / name)[0]), state(plain))
    learned(gzip.compress(text, mtime=0), tmp_path / "part", limit=123)
    assert same(state(learned(text, tmp_path / "part")[0]), state(plain)), "what is unpacked counts"


def test_what_breaks_off_is_learned_as_far_as_it_goes(tmp_path: Path) -> None:
    text = mixed(3000).encode()
    with pytest.raises(ValueError, match="ends early, after line"):
        learned(gzip.compress(text, mtime=0)[:-9000], tmp_path)
    made, _ = learned(text, tmp_path)
    assert made.resumed > 500
    assert same(state(made), state(learned(text, tmp_path / "whole")[0]))


def test_a_constant_column_does_no_harm(tmp_path: Path) -> None:
    for scale in (False, True):
        made, _ = learned(
            HEAD + "1,7,u\n1,7,v\n" * 100, tmp_path / str(scale), arms=("streaming", "layer"), scale=scale
        )
        assert made.learner.failed is None


def test_the_command_knows_formats_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"s.csv": mixed(40), "s.jsonl": as_json(mixed(40)), "s.csv.gz": mixed(40), "s.json.gz": as_json(mixed(40))}
    seen = []
    for name, text in texts.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith("gz") else text.encode())
        out = tmp_path / f"run-{name}"
        assert main(["learn", str(tmp_path / name), "--target", "y", "--width", "4", "--out", str(out)]) == 0
        seen.append(json.loads((out / "results.json").read_text())["so_far"])
    assert seen == seen[:1] * 4
    assert main(["learn", str(tmp_path), "--target", "y"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert job(format="jsonl").identity()["format"] == "jsonl"
