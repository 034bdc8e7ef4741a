"""The compiled kernels' shared library: found, checked and opened at its first use, through ctypes.

It is built without Python and torch, and registers its operators through torch's C shim (``csrc/register.cpp``). It
uses torch's OpenMP runtime, since a second one in the process would compete for the cores, or hang. Without the
library everything runs in torch, with one warning that it could be faster.

Environment: ``STREAMNORM_BACKEND=eager`` does not use the library, ``STREAMNORM_LIBRARY`` opens another file,
``STREAMNORM_ISA`` selects a lower instruction set (``base``, ``v3``, ``v4``) than the machine has.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

ABI = 12
"""What ``streamnorm_abi`` must return; increase it in both places together."""

ISAS = {"base": 0, "v3": 3, "v4": 4}
"""Instruction sets with the library's number for each, the lowest first."""

OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
"""The functions of torch's OpenMP runtime that the library gets, in the order of ``streamnorm_use``."""

MEND = (
    "install a C++ compiler, then: pip install --force-reinstall --no-deps --no-binary streamnorm streamnorm "
    "(in a checkout: make build)"
)
"""What to do about a missing library."""


def path() -> Path:
    """The library's file."""
    name = "_native.dylib" if sys.platform == "darwin" else "_native.so"
    return Path(os.environ.get("STREAMNORM_LIBRARY") or Path(__file__).with_name(name))


def wanted() -> bool:
    """Whether compiled kernels may be used.

    Raises:
        ValueError: for an unknown ``STREAMNORM_BACKEND``.
    """
    backend = os.environ.get("STREAMNORM_BACKEND") or "native"
    if backend not in ("native", "eager"):
        raise ValueError(f"STREAMNORM_BACKEND is 'native' (the default) or 'eager', got {backend!r}")
    return backend == "native"


@cache
def library() -> ctypes.CDLL | None:
    """The library, opened once; None if there is none, with a warning unless that was chosen."""
    if not wanted():
        return None
    found, why_not = _open()
    if found is None:
        warnings.warn(
            f"streamnorm runs without its compiled kernels: {why_not}. It computes the same, slower. To mend that, "
            f"{MEND}. `streamnorm doctor` tells more; STREAMNORM_BACKEND=eager says that this is meant.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


@cache
def isa() -> str | None:
    """The instruction set to use: the best of this machine, or a lower one named in ``STREAMNORM_ISA``.

    Raises:
        ValueError: if that one is unknown or higher than this machine's.
    """
    loaded = library()
    if loaded is None:
        return None
    best = loaded.streamnorm_isa()
    usable = [name for name, level in ISAS.items() if level <= best]
    asked = os.environ.get("STREAMNORM_ISA") or usable[-1]
    if asked not in usable:
        raise ValueError(f"STREAMNORM_ISA is one of {usable} on this machine, got {asked!r}")
    return asked


def function(name: str, argtypes: Sequence[Any], restype: Any = None) -> Callable[..., Any]:
    """The library's function of that name for this machine's instruction set, with its C types.

    Raises:
        RuntimeError: without a library; check ``library()`` first.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"no compiled kernels to take {name!r} from")
    found = loaded[f"{name}_{isa()}"]
    found.argtypes, found.restype = argtypes, restype
    return found


REGISTERED = (
    *(f"{name}_{dtype}" for name in ("forward", "backward") for dtype in ("f32", "f64", "bf16", "f16")),
    *(f"{name}_{dtype}" for name in ("fold", "scan_forward", "scan_backward", "online") for dtype in ("f32", "f64")),
)
"""The kernels behind the operators, in the order of ``sn_kernels`` in ``csrc/operators.h``."""


class Operators(NamedTuple):
    """The operators of ``csrc/register.cpp``, without torch's Python dispatch around them: they are never called where
    operators are recorded (``cpu.takes``)."""

    forward: Any
    backward: Any
    fold: Any
    scan_forward: Any
    scan_backward: Any
    gather: Any
    online: Any


@cache
def operators() -> Operators:
    """The operators ``torch.ops.streamnorm``, registered at the first use.

    Raises:
        RuntimeError: without a library, or if torch does not accept them.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("no compiled kernels to make operators of")
    kernels = [ctypes.cast(loaded[f"{name}_{isa()}"], ctypes.c_void_p) for name in REGISTERED]
    register = loaded.streamnorm_register
    register.argtypes = [ctypes.c_void_p, ctypes.c_int]
    if register((ctypes.c_void_p * len(kernels))(*kernels), len(kernels)):
        raise RuntimeError(f"torch {torch.__version__} refuses the operators of {path()}")
    return Operators(*(getattr(torch.ops.streamnorm, name).default._op for name in Operators._fields))


def status() -> dict[str, str]:
    """What was found, as text: ``library``, then ``abi``, ``isa`` and ``threads``, or the ``reason`` it is not used."""
    report = {"library": str(path())}
    if not wanted():
        return {**report, "reason": "STREAMNORM_BACKEND=eager"}
    loaded, why_not = _open()
    if loaded is None:
        return {**report, "reason": why_not}
    return {**report, "abi": str(loaded.streamnorm_abi()), "isa": str(isa()), "threads": _openmp()[1]}


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library ready for use, or why there is none."""
    file = path()
    if not file.is_file():
        return None, f"there is no {file}"
    try:
        loaded = ctypes.CDLL(str(file))
        abi, use = loaded.streamnorm_abi(), loaded.streamnorm_use
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be used ({error})"
    if abi != ABI:
        return None, f"{file} has ABI version {abi}, and this streamnorm needs {ABI}"
    use.argtypes, use.restype = [ctypes.c_void_p] * len(OPENMP), None
    use(*_openmp()[0])
    return loaded, ""


@cache
def _openmp() -> tuple[tuple[int | None, ...], str]:
    """Pointers to torch's OpenMP and the file they are in, or nulls and the reason. Only looks at loaded libraries."""
    nothing = (None,) * len(OPENMP)
    if _forked:
        return nothing, "none: a forked process computes on one thread"
    folder = Path(torch.__file__).parent / "lib"
    files = [file for pattern in ("libgomp*", "libomp*", "libiomp*") for file in sorted(folder.glob(pattern))]
    for file in (None, *files):
        try:
            runtime = ctypes.CDLL(str(file), os.RTLD_NOLOAD) if file else ctypes.CDLL(None)
            pointers = [ctypes.cast(runtime[name], ctypes.c_void_p) for name in OPENMP]
        except (OSError, AttributeError):
            continue
        return tuple(pointer.value for pointer in pointers), _file_of(pointers[0])
    return nothing, "none found: the kernels compute on one thread"


def _file_of(pointer: ctypes.c_void_p) -> str:
    """The shared library that an address belongs to."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_char_p) for name in ("file", "file_start", "symbol", "symbol_start")]

    info = Info()
    return os.fsdecode(info.file) if ctypes.CDLL(None).dladdr(pointer, ctypes.byref(info)) else "unknown"


_forked = False


def _after_fork() -> None:
    """Use one thread from here on: a fork does not copy the runtime's threads, and waiting for them would hang."""
    global _forked
    _forked = True
    _openmp.cache_clear()
    if _open.cache_info().currsize and (loaded := _open()[0]) is not None:
        loaded.streamnorm_use(*_openmp()[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
