"""The curvature of a loss: the largest eigenvalue of its Hessian H, from gradients alone. Never trains.

Our layers refuse a second derivative, so ``H v`` is a central difference of the gradient, in float64. With ReLU the
loss is smooth between kinks. The step is so small that it crosses none but by a rare chance, and H is that of autograd.
Where a unit's input is exactly 0, as behind units that are all dead, the weights stand on the kink, and H is large.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from streamnorm.nn.norm import norms

Product = Callable[[Tensor], Tensor]
"""``v -> A v`` of a symmetric matrix A."""
STEP = 1e-8
"""How far the weights move to either side. The gradient's rounding, 1e-16 of it, then is 1e-8 of it in ``H v``."""


def exact_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 and in training mode, where normalizations use each mini-batch's own statistics.

    Raises:
        ValueError: for a layer that trains with a running estimate.
    """
    if streaming := [layer for layer in norms(model) if layer.policy.uses_estimate]:
        raise ValueError(
            "the gradient that a running estimate gives is no derivative of a loss, so that there is no Hessian; "
            f"normalize with Batch() or Sample(), got {streaming[0]!r}"
        )
    return copy.deepcopy(model).double().train()


def loss_and_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, and its gradient with respect to all parameters end to end, ``(parameters,)``."""
    loss = F.cross_entropy(model(x), y)
    return loss.detach(), parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Product:
    """``v -> H v`` of the mean cross-entropy of a mini-batch, with respect to all parameters end to end.

    Raises:
        ValueError: as ``exact_copy``.
    """
    moved, x = exact_copy(model), x.double()
    here = parameters_to_vector(moved.parameters()).detach()

    def gradient(weights: Tensor) -> Tensor:
        vector_to_parameters(weights, moved.parameters())
        return loss_and_gradient(moved, x, y)[1]

    def product(v: Tensor) -> Tensor:
        length = v.norm()
        aside = STEP / length * v
        return (gradient(here + aside) - gradient(here - aside)) * (length / (2 * STEP))

    return product


def relative(product: Product, model: nn.Module) -> Product:
    """``v -> D H D v``, D holding for each parameter the norm of the tensor that it belongs to.

    Its steps are shares of each tensor's norm. A weight in front of a batch normalization may be scaled without any
    change of the loss, and this product does not change either.
    """
    lengths = torch.cat([p.detach().double().norm().expand(p.numel()) for p in model.parameters()])
    return lambda v: lengths * product(lengths * v)


def largest_eigenvalue(product: Product, size: int, steps: int, seed: int = 0) -> float:
    """Of a symmetric matrix: the largest Ritz value among v, A v, ... A^(steps-1) v, for a random v (Lanczos 1950).

    The last of these vectors is that of power iteration, which would find the largest absolute value.

    >>> matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0]).double())
    >>> round(largest_eigenvalue(lambda v: matrix @ v, 3, 3), 9)
    3.0
    """
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    for _ in range(min(steps, size)):
        length = v.norm()
        for q in basis * 2:  # once more, for what rounding left
            v = v - (q @ v) * q
        if v.norm() <= 1e-9 * length:
            break  # the images of all these vectors lie among them
        basis.append(v / v.norm())
        images.append(product(basis[-1]))
        v = images[-1]
    within = torch.stack(basis) @ torch.stack(images).T
    return torch.linalg.eigvalsh((within + within.T) / 2)[-1].item()
