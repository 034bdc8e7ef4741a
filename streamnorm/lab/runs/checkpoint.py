"""Checkpoints: one safetensors file that holds a nested state, written whole or not at all.

Tensors go into the file as they are, everything else as JSON into its header, and there a sha256 of all of it: the
format itself vouches for no tensor. Imports torch, safetensors, and how files are written and read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamnorm.files import sweep as sweep
from streamnorm.files import write as write
from streamnorm.reading import ReadError, misfit

FORMAT = "streamnorm checkpoint 1"


class CheckpointError(ReadError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``, a nest of dicts and lists with tensors and JSON values, replacing ``path`` in one step."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_take(state, "", tensors))
    write(path, to_bytes(tensors, {"format": FORMAT, "state": rest, "sha256": _digest(rest, tensors)}))


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and a checkpoint is a file; move it away to start over")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 safe_open is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start over") from error
    if (said := header.get("format")) != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version: it says {said!r}, not {FORMAT!r}")
    if _digest(header.get("state", ""), tensors) != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged (its contents do not fit their sha256); delete it to start over")
    try:
        return _put(json.loads(header["state"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged (its state is no nest of ours); delete it to start over") from error


def expect(state: Any, shape: Any) -> None:
    """Refuse the state of a checkpoint that is not as ``shape`` says (``streamnorm.reading``).

    Raises:
        CheckpointError: with where it is not.
    """
    if wrong := misfit(state, shape):
        raise CheckpointError(f"the checkpoint is damaged: {wrong}")


@contextmanager
def said_of(path: Path, remedy: str = "") -> Iterator[None]:
    """Inside, what cannot be done with the checkpoint at ``path`` is said with that path, and the ``remedy``.

    Raises:
        CheckpointError: for each ``ValueError``, and for what torch says of sizes that no network has.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        said = str(error).partition("\n")[0]
        where = "" if str(path) in said else f"{path}: "
        raise CheckpointError(f"{where}{said}{remedy}") from error


def _digest(rest: str, tensors: dict[str, Tensor]) -> str:
    """Of everything that a checkpoint says: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(rest.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two tensors of this state are called {name!r}; use keys without a slash")
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]}
    return {"value": value}


def _put(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put(part, tensors) for key, part in content}
    if kind == "list":
        return [_put(part, tensors) for part in content]
    return content
