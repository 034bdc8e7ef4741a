"""NormOP: the operation N(x, s) that uses a neuron's statistics (paper, section 3 and 3.3.3).

Two operations are built in; any object with the same ``__call__``, made of differentiable torch operations, can take
their place. Imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Standardize:
    """``N(x, {mu, sigma}) = (x - mu) / sigma``: the operation of the paper, of BN and of LN (sections 3, 3.3.3).

    Shapes: x of any shape, mu and sigma of one that broadcasts to it.

    >>> import torch
    >>> Standardize()(torch.tensor([1.0, 5.0]), torch.tensor(3.0), torch.tensor(2.0))
    tensor([-1.,  1.])
    """

    def __call__(self, x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        return (x - mu) / sigma


@dataclass(frozen=True)
class Scale:
    """``N(x, {mu, sigma}) = x / sigma``: division only. With ``Lp(2, "zero")`` over the features this is RMSNorm.

    Shapes: x of any shape, mu and sigma of one that broadcasts to it.

    >>> import torch
    >>> Scale()(torch.tensor([1.0, 5.0]), torch.tensor(3.0), torch.tensor(2.0))
    tensor([0.5000, 2.5000])
    """

    def __call__(self, x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        return x / sigma
