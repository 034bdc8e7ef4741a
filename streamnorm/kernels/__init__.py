"""Kernels: reduce and map, forward and backward, on the canonical view ``x (g, m, G, q, *place)``.

A backend is a module with the five functions below. Kernels are told the definition of a layer (R, S and N) and know
neither policy nor stream. ``choose`` picks the fastest backend that serves a definition; ``generic`` serves them all.

::

    forward    mu = mean(x)    sigma = sigma(x, mu, center)    y = apply(x, mu_hat, sigma_hat)
    backward   dE/ds_hat = stat_grads(dy, x, mu_hat, sigma_hat)    dx = input_grad(dy, x, statistics, g_mu, g_sigma)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from streamnorm.kernels import cpu, eager, generic
from streamnorm.kernels.definition import Definition, Statistics
from streamnorm.tracing import is_traced

__all__ = ["BACKENDS", "Definition", "Statistics", "choose", "cpu", "eager", "generic", "limit", "may_use", "using"]

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "generic": generic}
"""Every backend by name, fastest first: compiled, in torch operations, by autograd."""

_ORDER = {name: place for place, name in enumerate(BACKENDS)}
_fastest = ContextVar("_fastest", default=0)
limit = _fastest.get
"""The number of the fastest backend that ``using`` allows; 0 where it does not say."""


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Inside, no backend faster than ``name`` is used, to compare or to find a fault; None: the fastest.

    Raises:
        ValueError: for a name that is none.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backends are {', '.join(BACKENDS)}, got {name!r}")
    token = _fastest.set(0 if name is None else _ORDER[name])
    try:
        yield
    finally:
        _fastest.reset(token)


def may_use(name: str) -> bool:
    """Whether ``using`` allows this backend."""
    return _ORDER[name] >= _fastest.get()


def choose(definition: Definition, x: Tensor | None = None) -> ModuleType:
    """The fastest backend that serves this definition, for an input like ``x``, or (None) for any input."""
    if is_traced():
        return eager if eager.serves(definition) else generic
    if x is not None and may_use("cpu") and cpu.takes(x) and cpu.serves(definition):
        return cpu
    return eager if may_use("eager") and eager.serves(definition) else generic
