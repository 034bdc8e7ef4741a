"""Streams of rows for tests, and what is learned from them without a command."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from streamnorm.lab.learning.session import Job, Session, session
from streamnorm.lab.learning.settings import Settings

SMALL = {"width": 8, "depth": 2, "words": 16}


def mixed(n: int, seed: int = 0) -> str:
    """CSV of numbers, words and gaps; its third class first comes after half of it."""
    made = random.Random(seed)
    lines = ["a,b,color,flag,y"]
    for i in range(n):
        a, b, color = made.gauss(0, 1), made.gauss(5, 2), made.choice(["red", "green", "blue", ""])
        y = "up" if a + 0.3 * b > 1.5 else "down"
        if i > n // 2 and color == "red":
            y = "late"
        lines.append(f"{a:.3f},{b:.3f},{color},{made.choice(['true', 'false'])},{y}")
    return "\n".join(lines) + "\n"


def job(target: str | None = "y", arms: tuple[str, ...] = ("streaming",), **other: Any) -> Job:
    """A small one; what belongs to the settings goes there."""
    settings = {k: other.pop(k) for k in list(other) if k in Settings.__dataclass_fields__}
    values = {"name": "rows", "format": "csv", **other}
    return Job(target=target, arms=arms, settings=Settings(**{**SMALL, **settings}), **values)


def learned(text: str | bytes, folder: Path, work: Job | None = None, **other: Any) -> tuple[Session, list[str]]:
    """A session that has run to its end, and what it said."""
    said: list[str] = []
    data = text.encode() if isinstance(text, str) else text
    with session(work or job(**other), folder, io.BytesIO(data), said.append) as made:
        made.run(lambda: None)
    return made, said


def state(made: Session) -> dict[str, Any]:
    """All that a checkpoint has, without what time it took."""
    found = made.learner.state_dict()
    for arm in found["arms"].values():
        del arm["seconds"]
    return found


def as_json(text: str) -> str:
    """The rows of CSV, as JSON lines with types of their own."""
    head, *lines = text.splitlines()
    names = head.split(",")

    def cell(word: str) -> Any:
        if word in ("", "true", "false"):
            return {"": None, "true": True, "false": False}[word]
        try:
            return float(word)
        except ValueError:
            return word

    rows = ({k: cell(v) for k, v in zip(names, line.split(","), strict=True)} for line in lines)
    return "".join(json.dumps(row) + "\n" for row in rows)
