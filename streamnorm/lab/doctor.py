"""What ``streamnorm doctor`` tells: versions, machine, threads, the compiled kernels, and which backend serves what.

A report of an error, or of something slow, begins with it. It says how things are and changes nothing.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from streamnorm.definition.ref import BA1, BA3, BA6, SP1, SP2, SP5, NormRef
from streamnorm.nn.layers import BatchNorm, SampleNorm, StreamingNorm
from streamnorm.nn.norm import Norm
from streamnorm.ops import backends, library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layers() -> list[Norm]:
    """One layer of each kind that people use, and one with a window."""
    return [
        *(StreamingNorm(64, ref=ref) for ref in (BA1, BA6, SP1, SP2)),
        StreamingNorm(64, p=1, center="zero"),
        StreamingNorm(64, p=3),
        *(BatchNorm(64, ref=ref) for ref in (BA1, BA6)),
        *(SampleNorm(64, ref=ref) for ref in (SP1, SP2, SP5, NormRef(8, "all", "one"))),
        StreamingNorm(64, ref=BA3),
    ]


def serving() -> list[tuple[str, ...]]:
    """Each layer as it is written, the backends that serve it, by dtype, and why no faster one does."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no library is said with its reason, above
        for layer in layers():
            inputs = (torch.empty(1, layer.num_features, dtype=dtype) for dtype in DTYPES)
            names, reasons = zip(*(backends.serving(layer.definition, x) for x in inputs), strict=True)
            rows.append((repr(layer), *names, reasons[0]))
    return rows


def report() -> str:
    """Everything, as text."""
    native = library.status()
    reason = native.pop("reason", None)
    if reason is not None:
        native |= {"not used": reason} | ({"to mend that": library.MEND} if library.wanted() else {})
    parts = {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("streamnorm", "torch", "numpy")},
        },
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": str(os.cpu_count())},
        "threads": {
            "torch": str(torch.get_num_threads()),
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ},
        },
        "compiled kernels": native,
    }
    text = [f"{title}\n{_columns(lines.items())}" for title, lines in parts.items()]
    header = ("", *(str(dtype).removeprefix("torch.") for dtype in DTYPES), "why none faster")
    return "\n\n".join([*text, f"backends\n{_columns([header, *serving()])}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)
