"""Checkpoints: one safetensors file that holds a nested state, written whole or not at all.

Tensors go into the file as they are, everything else as JSON into its header, and there a sha256 of all of it: the
format itself vouches for no tensor. Imports torch and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "streamnorm checkpoint 1"


class CheckpointError(ValueError):
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
    return _put(json.loads(header["state"]), tensors)


def write(path: Path, data: bytes | str) -> None:
    """Put ``data`` at ``path`` so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed inside ``write`` left in ``folder``; nobody else may be writing there."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` last, where the system can: a rename alone may be lost with the power."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


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
