"""Whole calls of the compiled library as Python functions, and what they are told: the way around the overhead.

Around a small batch a layer written in Python spends more time than in its kernels. So the library holds the call
itself, ``native/calls.cpp``: it looks at the tensors, makes room, computes, and joins autograd. It knows nothing of
Python or torch when it is built; this file hands it their functions and objects, as pointers. Imports the library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

from streamnorm.kernels import library

PYTHON = (
    *("PyDict_GetItemWithError", "PyDict_Size", "PyObject_CallFunctionObjArgs", "PyObject_Call", "PyObject_GetAttr"),
    *("PyObject_SetAttr", "PyTuple_Pack", "PyTuple_GetItem", "PyTuple_Size", "PyObject_Type", "PyLong_AsVoidPtr"),
    *("PyLong_AsLongLong", "Py_IncRef", "Py_DecRef", "PyErr_Clear", "PyEval_SaveThread", "PyEval_RestoreThread"),
)
"""What the calls are given of Python's stable ABI, in the order of ``Python`` in ``native/python.h``."""

_NAMES = (
    *("weight", "bias", "tables", "address", "told", "to_save", "saved_tensors", "needs_input_grad"),
    *("is_neg", "is_inference", "is_cpu", "data_ptr", "dtype", "shape", "stride"),
)
_TORCH = (
    *(None, True, False, torch.Tensor, torch.nn.Parameter),
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64),
    *(torch.empty_like, torch.Tensor.new_empty, torch.is_grad_enabled, torch.get_num_threads),
)

MEMBERS, AXES = 7, 8
"""Members of a memory, and axes of a tensor that the calls take at most."""


class _Guard(ctypes.Structure):
    """What must still be as it was when a shortcut was made; the functions below say what."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("where", "key", "expected")), ("kind", ctypes.c_int32)]


class Guards(ctypes.Structure):
    """Several of them; the calls look at one after another."""

    _fields_ = [("first", ctypes.c_void_p), ("count", ctypes.c_int64)]


class RuleNumbers(ctypes.Structure):
    """F or G in numbers: ``sn_rule`` of ``native/norm.h``."""

    _fields_ = [("kind", ctypes.c_int64), ("numbers", ctypes.c_double * 3)]


LONG_SHORT, EXPONENTIAL, POOLED, RESIDUAL = range(4)
"""Kinds of rule that the kernels know."""


class Members(ctypes.Structure):
    """A memory: where its buffers are registered, under what names, and its rule."""

    _fields_ = [
        ("buffers", ctypes.c_void_p),
        ("names", ctypes.c_void_p * MEMBERS),
        ("rule", RuleNumbers),
    ]


class Told(ctypes.Structure):
    """What is known of one kind of input to one layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("plan", "forward", "backward", "fold")),
        *((name, Members) for name in ("h1", "h2")),
        ("keep", ctypes.c_double * 4),
        *((name, ctypes.c_int32) for name in ("has_h1", "has_h2", "folds", "code", "bits", "wide_bits", "ndim")),
        *((name, ctypes.c_int64 * AXES) for name in ("shape", "stride")),
        *((name, ctypes.c_int64) for name in ("slots", "scratch", "values")),
        *((name, ctypes.c_void_p) for name in ("self", "room", "room_dtype", "wide")),
        ("watch", Guards),
    ]


class Shortcut(ctypes.Structure):
    """The same for a layer that is as it was."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("told", "parameters")), ("guards", Guards), ("memories", Guards)]


CODES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16), torch.float16: (2, 16)}
"""Dtypes as DLPack writes them: code and bits."""

_IS, _ABSENT, _EMPTY_ITEM, _EMPTY, _ANSWERS, _OF_TYPE = range(6)
Guard = tuple[Any, Any, Any, int]
"""One of them in Python: where, key, expected, kind."""


def is_still(where: dict[str, Any], key: str) -> Guard:
    """The item of a dictionary stays the very object that it is, or away if it is."""
    return (where, key, where[key], _IS) if key in where else (where, key, None, _ABSENT)


def stays_empty(where: dict[str, Any], key: str | None = None) -> Guard:
    """A dictionary, or the one under ``key`` in it, stays empty."""
    return where, key, None, _EMPTY if key is None else _EMPTY_ITEM


def answers(function: Callable[[], Any], expected: Any) -> Guard:
    """A function keeps answering this, an object of which there is one."""
    return function, None, expected, _ANSWERS


def keeps_its_class(of: Any) -> Guard:
    """An object stays of the class that it is of."""
    return of, None, type(of), _OF_TYPE


class Kept:
    """Guards as the calls read them, and the objects they point to, kept alive."""

    def __init__(self, guards: Iterable[Guard]) -> None:
        self.objects = list(guards)
        self.array = (_Guard * len(self.objects))(
            *(_Guard(id(where), id(key), id(expected), kind) for where, key, expected, kind in self.objects)
        )
        self.guards = Guards(ctypes.addressof(self.array), len(self.objects))


@cache
def watch() -> Kept:
    """Nobody records or rewrites torch's operations: what ``is_traced`` asks, but for the compiler, which is not there
    when a call runs."""
    return Kept(
        [
            answers(torch._C._get_tracing_state, None),
            answers(torch._C._len_torch_dispatch_stack, 0),
            answers(torch._C._are_functorch_transforms_active, False),
            (vars(forward_ad), "_current_level", -1, _IS),
        ]
    )


class _Method(ctypes.Structure):
    """Python's own description of a function in C, ``PyMethodDef``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_FAST, _NO_ARGUMENTS = 0x0080, 0x0004


@cache
def _method(name: str) -> _Method:
    loaded = library.library()
    assert loaded is not None
    function = ctypes.cast(loaded[f"streamnorm_{name}"], ctypes.c_void_p).value
    return _Method(name.encode(), function, _NO_ARGUMENTS if name.endswith("fold") else _FAST, None)


def callable_of(name: str, told: ctypes.Structure | None = None) -> Callable[..., Any]:
    """The library's function ``name`` for what is ``told``, which must live as long as it."""
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.argtypes, new.restype = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return new(ctypes.addressof(_method(name)), None if told is None else ctypes.addressof(told), None)


def method_of(kind: type, name: str) -> Any:
    """The library's function ``name`` as a method of a class."""
    new = ctypes.pythonapi.PyDescr_NewMethod
    new.argtypes, new.restype = [ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return new(kind, ctypes.addressof(_method(name)))


_handed_over: list[Any] = []


def hand_over(apply: Any, as_read: Any, like: Any, otherwise: Any, exchange: bool = True) -> None:
    """Give the library what it calls: Python, torch, and these functions of ``fused``. Once, before the first call.

    ``exchange=False`` leaves out torch's exchange table, as if torch had none.
    """
    loaded = library.library()
    assert loaded is not None
    objects = (*_TORCH, apply, as_read, like, otherwise, *_NAMES)
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in PYTHON]
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None) if exchange else None
    table = None
    if capsule is not None:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        table = pointer(capsule, b"dlpack_exchange_api")
    take = loaded.streamnorm_python
    take.argtypes, take.restype = [ctypes.c_void_p] * 3, None
    take((ctypes.c_void_p * len(functions))(*functions), (ctypes.c_void_p * len(objects))(*map(id, objects)), table)
    _handed_over.append(objects)  # alive as long as the process
