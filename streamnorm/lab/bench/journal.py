"""The journal of a benchmark: a file of JSON lines, one as soon as there is something to say, so that nothing is lost.

The first line says what was asked and on which machine; then come the memory floor, once for each process that timed
something, and a line for each case with every time that was taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamnorm.files import append, write
from streamnorm.lab.bench.case import Case, Traffic
from streamnorm.lab.bench.floor import Row
from streamnorm.lab.bench.timing import Times
from streamnorm.reading import ReadError, misfit, parsed

Line = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """A case that was timed, as the journal has it."""

    allocator: str
    group: str
    name: str
    reference: str
    series: str
    size: int
    ours: Sequence[str]
    traffic: Mapping[str, Traffic]
    times: Mapping[str, Times]
    floor: Sequence[Row]
    """Measured by the same process."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """The most bytes that a step holds, of the variants whose memory is compared."""


SHAPES = {
    "start": {"asked": {str: object}, "facts": {str: object}},
    "floor": {"allocator": str, "rows": [object, ...]},
    "green": {"command": str, "case": str},
    "case": {
        **dict.fromkeys(("allocator", "group", "name", "reference", "series"), str),
        "size": int,
        "ours": [str, ...],
        "traffic": {str: {str: object}},
        "times": {str: object},
    },
}
"""Of each kind of line."""


class Journal:
    """Reads and extends the file at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, asked: Line, facts: Line) -> None:
        """A new file, which says what was asked and the facts of the machine."""
        write(self.path, "")
        self._add({"kind": "start", "asked": asked, "facts": facts})

    def lines(self) -> Iterator[Line]:
        """Every line; one that was cut off when the process ended is left out."""
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            found, wrong = parsed(line, {"kind": ("start", "floor", "green", "case")})
            if found is not None and not wrong:
                wrong = misfit(found, SHAPES[found["kind"]])
            if found is not None and wrong:
                raise ReadError(
                    f"{self.path} is no journal of a benchmark: in line {number} {wrong}; give another --out"
                )
            if found is not None:
                yield found

    def head(self) -> tuple[Line, Line]:
        """What was asked, and the facts of the machine.

        Raises:
            ValueError: for a file that is no journal.
        """
        first = next(self.lines(), None)
        if first is None or first["kind"] != "start":
            raise ValueError(f"{self.path} is no journal of a benchmark; give another --out")
        return first["asked"], first["facts"]

    def add_floor(self, allocator: str, rows: Sequence[Row]) -> None:
        self._add({"kind": "floor", "allocator": allocator, "rows": rows})

    def add_green(self, command: str, case: Case) -> None:
        """The variants of a case were right when this command ran."""
        self._add({"kind": "green", "command": command, "case": str(case)})

    def add_case(
        self, allocator: str, case: Case, times: Mapping[str, Times], peaks: Mapping[str, int] | None = None
    ) -> None:
        variants = case.variants.items()
        self._add(
            {
                "kind": "case",
                "allocator": allocator,
                **{name: getattr(case, name) for name in ("group", "name", "reference", "series", "size")},
                "ours": [name for name, variant in variants if variant.check is not None],
                "traffic": {name: asdict(variant.traffic) for name, variant in variants if variant.traffic is not None},
                "times": times,
                **({"peaks": peaks} if peaks else {}),
            }
        )

    def green(self, command: str) -> set[str]:
        """The cases that this command found right."""
        return {line["case"] for line in self.lines() if line["kind"] == "green" and line["command"] == command}

    def cases(self) -> list[Timed]:
        """Everything that was timed, in order; what was timed twice counts as it was last."""
        found: dict[tuple[str, str, str], Timed] = {}
        floor: dict[str, list[Row]] = {}
        for line in self.lines():
            if line["kind"] == "floor":
                floor[line["allocator"]] = line["rows"]
            elif line["kind"] == "case":
                fields = {key: value for key, value in line.items() if key not in ("kind", "traffic")}
                traffic = {name: Traffic(**value) for name, value in line["traffic"].items()}
                case = Timed(**fields, traffic=traffic, floor=floor.get(line["allocator"], []))
                found[case.allocator, case.group, case.name] = case
        return list(found.values())

    def _add(self, line: Line) -> None:
        append(self.path, json.dumps(line).encode())
