"""The backend that supports every definition: R, S and N as they are written, their gradients by autograd.

It is for a user's own R, S or N, for windows with another p than 2, and the reference that faster backends are tested
against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamnorm.definition.layer import Definition, Statistics


def unsupported(d: Definition) -> str | None:
    """None: it supports every definition."""


def mean(x: Tensor, d: Definition) -> Tensor:
    """``mu`` of every reference."""
    return d.moment.mean(x, d.ref)


def sigma(x: Tensor, d: Definition, mu: Tensor, center: Tensor | None) -> Tensor:
    """``sigma`` of every reference, about ``mu``, the constant ``center``, or 0, as the setting says."""
    return d.moment.sigma(x, d.ref, mu, center)


def apply(x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> Tensor:
    """``y = N(x, s_hat)``."""
    return d.op(x, mu_hat, sigma_hat)


def stat_grads(dy: Tensor, x: Tensor, d: Definition, mu_hat: Tensor, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """``dE/ds_hat``, summed over all activations that s_hat normalizes."""
    with torch.enable_grad():
        mu_hat, sigma_hat = mu_hat.detach().requires_grad_(), sigma_hat.detach().requires_grad_()
        y = apply(x.detach(), d, mu_hat, sigma_hat)
    g_mu, g_sigma = _gradients([y], [mu_hat, sigma_hat], [dy])
    return g_mu, g_sigma


def input_grad(dy: Tensor, x: Tensor, d: Definition, s: Statistics, g_mu: Tensor, g_sigma: Tensor) -> Tensor:
    """``dx = (dN/dx)' dy + (dS/dx)' g_hat``; the center of Setting B is a constant."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = apply(x, d, s.mu_hat, s.sigma_hat)
        mu = mean(x, d)
        std = sigma(x, d, mu, s.center)
    return _gradients([y, mu, std], [x], [dy, g_mu.expand_as(mu), g_sigma.expand_as(std)])[0]


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = (
        torch.autograd.grad([o for o, _ in pairs], list(inputs), [g for _, g in pairs], allow_unused=True)
        if pairs
        else [None] * len(inputs)
    )
    return [torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True)]
