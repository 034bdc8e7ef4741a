"""Damage done to what a run has kept: to the bytes of a file, to JSON, and to the state in a checkpoint, whose checksum
is right all the same."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamnorm.lab.runs import checkpoint

Random = random.Random
DEEP = "[" * 20_000 + "]" * 20_000
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 7, 10**30, 10**400, 0.5, math.nan, math.inf, "", "x", "a\nb", [], [1], [[]], {}, {"x": 1}),
)


def tensors_like(value: Tensor, made: Random) -> Tensor:
    """Of another shape or dtype."""
    kinds: list[Callable[[], Tensor]] = [
        lambda: value.reshape(1, *value.shape),
        lambda: torch.cat([value.flatten(), value.flatten()[:1]]),
        lambda: value.flatten()[: value.numel() // 2],
        lambda: value.to(torch.int64 if value.is_floating_point() else torch.float32),
        lambda: value.double() if value.dtype is not torch.float64 else value.float(),
        lambda: torch.zeros(0),
    ]
    other = made.choice(kinds)()
    return torch.zeros(3, 3, 3) if (other.shape, other.dtype) == (value.shape, value.dtype) else other


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every part of a nest."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any, made: Random) -> tuple[Any, str]:
    """A nest in which one member is missing, or of another type, shape or dtype; and what that was."""
    value = copy.deepcopy(value)
    every = [*places(value)]
    if not every:
        return made.choice(STRANGE), "all of it"
    # as likely near the root as among the many leaves
    depth = made.choice(sorted({len(path) for path in every}))
    *way, last = made.choice([path for path in every if len(path) == depth])
    holder = value
    for key in way:
        holder = holder[key]
    what = made.choice(("missing", "strange", "other"))
    if what == "missing":
        del holder[last]
    elif what == "other" and isinstance(holder[last], Tensor):
        holder[last] = tensors_like(holder[last], made)
    else:
        holder[last] = made.choice(STRANGE)
    return value, f"{'.'.join(map(str, [*way, last]))} {what}"


def damage_state(path: Path, made: Random) -> str:
    """Write a checkpoint anew, with another state."""
    state, said = changed(checkpoint.load(path), made)
    checkpoint.save(path, state)
    return said


def damage_json(path: Path, made: Random) -> str:
    """A file of JSON, or of JSON lines, one of which is other JSON."""
    is_lines = path.suffix == ".jsonl"
    texts = (path.read_text().splitlines() if is_lines else [path.read_text()]) or ["null"]
    at = made.randrange(len(texts))
    said = made.choice(("{}", "[]", "null", "0", '"x"', DEEP, '{"a":' * 20_000, "NaN", "1" * 5000, "member"))
    if said == "member":
        value, said = changed(json.loads(texts[at]), made)
        texts[at] = json.dumps(value)
    else:
        texts[at] = said
    path.write_text("\n".join(texts) + "\n")
    return f"line {at + 1}: {said[:60]}"


def damage_bytes(path: Path, made: Random) -> str:
    """A file that is cut, empty, a folder, or has other bytes somewhere."""
    data = path.read_bytes()
    what = made.choice(("cut", "empty", "folder", "flip", "insert", "zeros", "not utf-8"))
    at = made.randrange(len(data) or 1)
    if what == "folder":
        path.unlink()
        path.mkdir()
        return what
    other = {
        "cut": data[:at],
        "empty": b"",
        "flip": data[:at] + bytes([(data or b"0")[at] ^ 1 << made.randrange(8)]) + data[at + 1 :],
        "insert": data[:at] + bytes([made.randrange(256)]) + data[at:],
        "zeros": bytes(len(data)),
        "not utf-8": data[:at] + b"\xff\xfe" + data[at:],
    }
    path.write_bytes(other[what])
    return f"{what} at {at}"


def damage(path: Path, made: Random) -> str:
    """Any of these."""
    kinds = [damage_bytes, damage_state if path.suffix == ".safetensors" else damage_json]
    return made.choice([*kinds, kinds[1], kinds[1]])(path, made)
