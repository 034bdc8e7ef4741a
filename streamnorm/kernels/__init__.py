"""Kernels: reduce and map, forward and backward, on the canonical view ``x (g, m, G, q, *place)``.

A backend is a module with the five functions below. Kernels are told the definition of a layer (R, S and N) and know
neither policy nor stream. ``choose`` picks the fastest backend that serves a definition; ``generic`` serves them all.

::

    forward    mu = mean(x)    sigma = sigma(x, mu, center)    y = apply(x, mu_hat, sigma_hat)
    backward   dE/ds_hat = stat_grads(dy, x, mu_hat, sigma_hat)    dx = input_grad(dy, x, statistics, g_mu, g_sigma)
"""

from __future__ import annotations

from types import ModuleType

from streamnorm.kernels import eager, generic
from streamnorm.kernels.definition import Definition, Statistics

__all__ = ["BACKENDS", "Definition", "Statistics", "choose", "eager", "generic"]

BACKENDS: dict[str, ModuleType] = {"eager": eager, "generic": generic}
"""Every backend by name, fastest first."""


def choose(definition: Definition) -> ModuleType:
    """The fastest backend that serves this definition."""
    return eager if eager.serves(definition) else generic
