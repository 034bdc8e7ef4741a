"""Validation of data read from files against a schema, here called shape, so that users can rely on it. Imports
nothing, so that the command line starts fast.

A shape is ``int``, ``float`` (a finite number), ``str``, ``bool``, ``None``, ``Tensor`` or ``object`` (anything); any
other value: exactly that; ``range(5)``: a whole number in it; a tensor: one of its shape and dtype; a tuple: one of
several; ``[shape, ...]``: a list of any length; ``[a, b]``: a list of two; ``{"key": shape}``: a dict with this key and
maybe others; ``{str: shape}``: one with any keys of that type.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
LARGEST = 2.0**1023


def misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """Where ``value`` does not match ``shape``, and what was expected there; None if it matches.

    >>> misfit({"done": 3, "sums": {"loss": "0"}}, {"done": range(4), "sums": {"loss": float}})
    "sums.loss is '0', not a finite number"
    >>> misfit({"lines": [{"epoch": 1}, {}]}, {"lines": [{"epoch": int}, ...]})
    'lines.1.epoch is missing'
    """
    if isinstance(shape, tuple):
        alike = [one for one in shape if isinstance(one, (list, dict)) and isinstance(value, type(one))]
        fits = any(misfit(value, one) is None for one in shape)
        if not fits and len(alike) == 1:
            return misfit(value, alike[0], at)
    elif isinstance(shape, list) and isinstance(value, list):
        shapes = [shape[0]] * len(value) if _is_any_length(shape) else shape
        if len(shapes) == len(value):
            return _first(
                misfit(part, one, _to(at, i)) for i, (part, one) in enumerate(zip(value, shapes, strict=True))
            )
        fits = False
    elif isinstance(shape, dict) and isinstance(value, dict):
        kind = next((key for key in shape if isinstance(key, type)), None)
        if kind is None:
            return _first(
                misfit(value[key], part, _to(at, key)) if key in value else f"{_to(at, key)} is missing"
                for key, part in shape.items()
            )
        return _first(
            misfit(part, shape[kind], _to(at, key)) if isinstance(key, kind) else f"{_to(at, key)} is no key there"
            for key, part in value.items()
        )
    else:
        fits = _is(value, shape)
    return None if fits else f"{at or 'it'} is {_shown(value)}, not {_said(shape)}"


def _is_any_length(shape: list[Any]) -> bool:
    return len(shape) == 2 and shape[1] is ...


def _is(value: Any, shape: Any) -> bool:
    if _is_tensor(shape):
        return _is_tensor(value) and value.shape == shape.shape and value.dtype == shape.dtype
    if isinstance(value, bool) and shape in (int, float):
        return False
    if isinstance(shape, range):
        return _is(value, int) and value in shape
    if shape is float:
        return isinstance(value, (int, float)) and -LARGEST < value < LARGEST
    return isinstance(value, shape) if isinstance(shape, type) else type(value) is type(shape) and value == shape


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _to(at: str, key: Any) -> str:
    text = f"{at}.{key}" if at else f"{key}"
    return text if len(text) <= 120 and text.isprintable() else ascii(text)[:120] + " ..."


def _shown(value: Any) -> str:
    if _is_tensor(value):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def _said(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_said, shape))
    if isinstance(shape, list):
        return "a list" if _is_any_length(shape) else f"a list of {len(shape)}"
    if isinstance(shape, range):
        return f"a whole number from {shape.start} to {shape.stop - 1}"
    if isinstance(shape, type):
        return WORDS.get(shape) or f"a {shape.__name__.lower()}"
    return "an object" if isinstance(shape, dict) else _shown(shape)


def _is_tensor(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def of_annotation(annotation: Any) -> Any:
    """The JSON shape for a type annotation, for instance of a dataclass field.

    >>> misfit([0.7, "0.3"], of_annotation(tuple[float, float] | None))
    "1 is '0.3', not a finite number"
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return parts
    if origin in (Union, types.UnionType):
        return tuple(None if part is type(None) else of_annotation(part) for part in parts)
    if origin is tuple:
        return [part if part is ... else of_annotation(part) for part in parts]
    return annotation


class ReadError(ValueError):
    """A file with invalid content."""


def read_json(path: Path, shape: Any, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        ReadError: with the path, what is wrong and the ``remedy``, for a file that is not JSON, or of another shape.
        OSError: if it cannot be read.
    """
    value, wrong = parsed(path.read_bytes(), shape)
    if wrong:
        raise ReadError(f"{path} is damaged: {wrong}; {remedy}")
    return value


def read_lines(path: Path, shape: Any, remedy: str) -> Iterator[tuple[Any, int]]:
    """The content of each line of a JSON lines file, and where the line ends. A last line without a newline is left
    out: its write was interrupted.

    Raises:
        ReadError: as ``read_json``, with the number of the line.
        OSError: if it cannot be read.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            value, wrong = parsed(line, shape)
            if wrong:
                raise ReadError(f"{path} is damaged: in line {number} {wrong}; {remedy}")
            end += len(line)
            yield value, end


def parsed(data: str | bytes, shape: Any) -> tuple[Any, str]:
    """The value of a JSON text, and what is wrong with it; an empty string if it matches the shape."""
    try:
        value = json.loads(data)
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:
        return None, f"it is no JSON ({error})" if data.strip() else "it is empty"
    return value, misfit(value, shape) or ""
