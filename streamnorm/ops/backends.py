"""Backends: reductions and maps, forward and backward, on the canonical view ``x (g, m, G, q, *place)``.

A backend is a module with the functions of ``Backend``. It gets the definition of a layer (R, S and N) and knows
neither policy nor stream. ``choose`` picks the fastest that supports a definition; ``generic`` supports them all.

::

    forward    mu = mean(x)    sigma = sigma(x, mu, center)    y = apply(x, mu_hat, sigma_hat)
    backward   dE/ds_hat = stat_grads(dy, x, mu_hat, sigma_hat)    dx = input_grad(dy, x, statistics, g_mu, g_sigma)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics
from streamnorm.ops import cpu, eager, generic
from streamnorm.tracing import is_traced


class Backend(Protocol):
    """The interface of a backend, a module with these functions."""

    def unsupported(self, d: Definition) -> str | None:
        """Why this backend does not support a definition, as a message for the user; None: it does."""
        ...

    def mean(self, x: Tensor, d: Definition) -> Tensor:
        """``mu`` of every reference."""
        ...

    def sigma(self, x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
        """``sigma`` of every reference, about ``mu``, the constant ``center``, or 0, as the setting says."""
        ...

    def apply(self, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> Tensor:
        """``y = N(x, s_hat)``."""
        ...

    def stat_grads(
        self, dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
        ...

    def input_grad(self, dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
        """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
        ...


BACKENDS: dict[str, Backend] = {"cpu": cpu, "eager": eager, "generic": generic}
"""Every backend by name, fastest first: compiled, in torch operations, by autograd."""

_ORDER = {name: place for place, name in enumerate(BACKENDS)}
_fastest = ContextVar("_fastest", default=0)
limit = _fastest.get
"""The index of the fastest backend that ``using`` allows; 0 by default."""


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Inside, no backend faster than ``name`` is used, for comparison or debugging; None: the fastest.

    Raises:
        ValueError: for an unknown name.
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


def choose(d: Definition, x: Tensor | None = None) -> Backend:
    """The fastest backend that supports this definition, for an input like ``x``, or (None) for any input."""
    if is_traced():
        return eager if eager.unsupported(d) is None else generic
    if x is not None and may_use("cpu") and cpu.takes(x) and cpu.unsupported(d) is None:
        return cpu
    return eager if may_use("eager") and eager.unsupported(d) is None else generic


def serving(d: Definition, x: Tensor) -> tuple[str, str]:
    """The name of the backend that ``choose`` picks, and why no faster one supports the definition, for ``doctor``."""
    chosen = choose(d, x)
    name = next(name for name, backend in BACKENDS.items() if backend is chosen)
    faster = (backend.unsupported(d) for backend in BACKENDS.values())
    return name, next((why for why in faster if why is not None), "")
