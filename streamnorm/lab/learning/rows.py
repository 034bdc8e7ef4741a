"""Rows of a stream, from CSV or JSON lines: named values that are a number, a word or missing, and a target.

A row that cannot be used says why, and the next one can be asked for. Imports the lines.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streamnorm.lab.learning.lines import LineError, Lines, Mark

Value = float | str | None
Format = Literal["csv", "jsonl"]
MISSING = frozenset({"", "na", "n/a", "nan", "null"})
"""What stands for a missing value, in capitals or not; in JSON null does, and a key that is not there."""
DELIMITERS = (",", ";", "\t", "|")
"""Between the fields of CSV: the first of these that the header has."""
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "jsonl"}
"""Everything else is CSV."""
LOOKED_AT = 100
"""Rows from which the columns of JSON lines are taken, and the task."""


@dataclass(slots=True)
class Row:
    """A row.

    Attributes:
        line: the number of its first line, from 1 on.
        cells: the values of its features, by their names.
        target: what is to be predicted, as a number if it is one.
        label: the same as a word.
        wrong: why the row cannot be used, or None.
        mark: the place behind it.
    """

    line: int
    cells: dict[str, Value]
    target: Value
    label: str
    wrong: str | None
    mark: Mark


def number(text: str) -> float | None:
    """The number that a text is, which may be infinite; None for a word.

    >>> number("1e3"), number("true"), number("1_000"), number("red")
    (1000.0, 1.0, None, None)
    """
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return {"true": 1.0, "false": 0.0}.get(text.lower())


def value(text: str) -> Value:
    """What a field of CSV is.

    >>> value(" 3 "), value("NA"), value("red ")
    (3.0, None, 'red')
    """
    text = text.strip()
    if text.lower() in MISSING:
        return None
    found = number(text)
    return text if found is None else found


def label(target: Value, text: str) -> str:
    """The name of the class that a target is: 1 and 1.0 are one class, whatever wrote them.

    >>> label(1.0, "1.0"), label(1.0, "true"), label("a", "a"), label(0.5, ".5")
    ('1', 'true', 'a', '0.5')
    """
    if not isinstance(target, float) or text.lower() in ("true", "false"):
        return text
    return str(int(target)) if target.is_integer() else repr(target)


def near(word: str, known: Collection[str]) -> str:
    """``did you mean``, where there is something to mean."""
    found = difflib.get_close_matches(word, known, 1) or [name for name in known if name.lower() == word.lower()]
    return f" (did you mean {found[0]!r}?)" if found else ""


def shown(names: Sequence[str], most: int = 20) -> str:
    """Names, the first of them if they are many."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


class CsvRows:
    """Rows of CSV, whose first line has the names.

    Args:
        lines: from the header on.
        target: the column to be predicted.
        ignore: columns that are no features.

    Raises:
        ValueError: for a header that cannot be used.
    """

    def __init__(self, lines: Lines, target: str | None, ignore: Sequence[str] = ()) -> None:
        self.lines = lines
        header = b"\n"
        while header in (b"\n", b"\r\n"):  # an empty line is no header
            header = lines.take()
        if not header:
            raise ValueError(f"{lines.name} is empty; it begins with a line that names the columns")
        if header[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in header:
            raise ValueError(f"{lines.name} is no text in UTF-8; write it as such")
        text = _text(header).removeprefix("\N{BYTE ORDER MARK}")
        self._delimiter = next((mark for mark in DELIMITERS if mark in text), ",")
        self._first = [text]
        self._reader = csv.reader(self, delimiter=self._delimiter, strict=True)
        try:
            names = [name.strip() or f"column {i}" for i, name in enumerate(next(self._reader), 1)]
        except csv.Error as error:
            raise ValueError(f"the header of {lines.name} cannot be read: {error}") from error
        self.names = names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{lines.name} has more than one column called {shown(twice)}; give each its own name")
        _expect(lines.name, target, ignore, names)
        assert target is not None
        self.target = target
        self.columns = tuple(name for name in names if name != target and name not in ignore)
        self._wanted = [(i, name) for i, name in enumerate(names) if name in self.columns]
        self._at = names.index(target)

    def __next__(self) -> str:
        """The next line, for the reader of CSV."""
        if self._first:
            return self._first.pop()
        line = self.lines.take()
        if not line:
            raise StopIteration
        return _text(line)

    def __iter__(self) -> Any:
        return self

    def rows(self) -> Iterator[Row]:
        """The rows; what fills no field, an empty line, is none."""
        while True:
            line = self.lines.mark.lines + 1
            try:
                fields = next(self._reader, None)
            except (csv.Error, LineError) as error:
                last = self.lines.mark.lines
                until = f", up to line {last:,}" if last > line else ""
                yield Row(line, {}, None, "", f"{error}{until}", self.lines.mark)
                continue
            if fields is None:
                return
            if fields:
                yield self._row(line, fields)

    def _row(self, line: int, fields: list[str]) -> Row:
        mark = self.lines.mark
        if len(fields) != len(self.names):
            count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
            return Row(line, {}, None, "", f"{count}, and the header has {len(self.names)}", mark)
        text = fields[self._at].strip()
        target = value(text)
        cells = {name: value(fields[i]) for i, name in self._wanted}
        return Row(line, cells, target, label(target, text), _no_target(target), mark)


class JsonRows:
    """Rows of JSON, an object a line. An object inside is taken apart: ``{"a": {"b": 1}}`` has the column ``a.b``.

    Args:
        lines: of the stream.
        target: the key of what is to be predicted.
        ignore: keys that are no features.

    Raises:
        ValueError: without a target.
    """

    def __init__(self, lines: Lines, target: str | None, ignore: Sequence[str] = ()) -> None:
        if target is None:
            raise ValueError("name what is to be predicted: --target KEY")
        self.lines, self.target = lines, target
        self.columns: tuple[str, ...] = ()
        self._dropped = {target, *ignore}

    def rows(self) -> Iterator[Row]:
        """The rows; an empty line is none."""
        while True:
            line, data = self.lines.mark.lines + 1, b""
            try:
                data = self.lines.take()
                if not data:
                    return
                if not data.strip():
                    continue
                found = json.loads(_text(data).removeprefix("\N{BYTE ORDER MARK}"))
                cells: dict[str, Any] = {}
                if isinstance(found, dict):
                    _flatten(found, "", cells)
            except LineError as error:
                yield Row(line, {}, None, "", str(error), self.lines.mark)
                continue
            except (ValueError, RecursionError) as error:
                if line == 1 and data.lstrip()[:1] == b"[":
                    raise ValueError(
                        f"{self.lines.name} is one JSON array, and JSON lines are an object a line; "
                        "jq -c '.[]' makes them"
                    ) from error
                yield Row(line, {}, None, "", f"no JSON: {error}", self.lines.mark)
                continue
            if not isinstance(found, dict):
                yield Row(line, {}, None, "", f"no JSON object: {_text(data).strip()[:40]}", self.lines.mark)
                continue
            yield self._row(line, cells)

    def _row(self, line: int, cells: dict[str, Value]) -> Row:
        target = cells.get(self.target)
        if isinstance(target, bool):
            target, text = float(target), str(target).lower()
        else:
            text = str(target)
            target = value(text) if target is not None else None
        features = {k: float(v) if isinstance(v, bool) else v for k, v in cells.items() if k not in self._dropped}
        return Row(line, features, target, label(target, text), _no_target(target), self.lines.mark)

    def columns_of(self, rows: Sequence[Row], ignore: Sequence[str] = ()) -> tuple[str, ...]:
        """The names of the features of rows, as they come.

        Raises:
            ValueError: if none of them has the target.
        """
        names = list(dict.fromkeys(name for row in rows for name in row.cells))
        usable = [row for row in rows if row.wrong is None]
        if rows and not usable:
            first = next((row for row in rows if row.cells), rows[0])
            said = f"no {self.target!r}{near(self.target, names)}" if first.cells else first.wrong
            raise ValueError(
                f"none of the first {len(rows)} rows of {self.lines.name} can be used; line {first.line:,}: {said}"
            )
        if rows and not names:
            raise ValueError(f"{self.lines.name} has nothing but {self.target!r}, from which to predict nothing")
        return tuple(names)


def _flatten(found: Any, prefix: str, cells: dict[str, Any]) -> None:
    for key, part in found.items() if isinstance(found, dict) else enumerate(found):
        name = f"{prefix}{key}"
        if isinstance(part, (dict, list)):
            _flatten(part, f"{name}.", cells)
        elif isinstance(part, str):
            part = part.strip()
            cells[name] = None if part.lower() in MISSING else part
        elif isinstance(part, int) and not isinstance(part, bool):
            try:
                cells[name] = float(part)
            except OverflowError:
                cells[name] = math.inf
        else:
            cells[name] = part


def _text(line: bytes) -> str:
    """UTF-8; what is none of it is shown as ``\\xe9`` and remains a word of its own."""
    return line.decode("utf-8", errors="backslashreplace")


def _no_target(target: Value) -> str | None:
    if target is None:
        return "no target"
    if isinstance(target, float) and not math.isfinite(target):
        return f"the target is {target}"
    return None


def _expect(name: str, target: str | None, ignore: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a target or columns to ignore that are not there."""
    if target is None:
        raise ValueError(f"name the column that is to be predicted: --target COLUMN, one of {shown(names)}")
    for flag, wanted in (("--target", [target]), ("--ignore", ignore)):
        for column in wanted:
            if column not in names:
                raise ValueError(
                    f"{name} has no column {column!r}{near(column, names)}; {flag} is one of {shown(names)}"
                )
    if len({*names} - {target, *ignore}) == 0:
        raise ValueError(f"{name} has no column beside {target!r}, from which to predict it")


READERS: dict[str, Callable[..., CsvRows | JsonRows]] = {"csv": CsvRows, "jsonl": JsonRows}
"""What reads each format."""
