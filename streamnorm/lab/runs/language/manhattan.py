"""The Manhattan update rule: every weight moves by the learning rate against the sign of its gradient.

The optimizer of the paper's language models (section 7.6), which takes it from Liao, Leibo and Poggio (2015). Imports
torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Manhattan(Optimizer):
    """``w <- w - lr sign(g)`` with g the gradient as it stands, sign(0) = 0: no momentum, no weight decay.

    Whether g is a sum or a mean over mini-batches does not matter to the weights. It still matters to a streaming
    layer, whose H2 remembers gradients in the units of the loss.

    A gradient of NaN has no sign, so that weight stays where it is, as with a gradient of 0; an infinite one has a sign
    and moves its weight by lr like every other. So no gradient makes a weight non-finite, and nothing is asked of the
    device; a loss that is not finite is for the loop to notice.

    Args:
        params: as of every torch optimizer: tensors, or groups with their own ``lr`` and ``maximize``.
        lr: the distance that a weight moves in one update.
        maximize: go with the sign of the gradient instead of against it.

    Raises:
        ValueError: for a rate that is not a finite number >= 0.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    >>> optimizer = Manhattan([w], lr=0.25)
    >>> (w * torch.tensor([100.0, -1e-9, 0.0])).sum().backward()
    >>> optimizer.step()
    >>> w.data
    tensor([0.7500, 1.2500, 1.0000])
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 0.01, *, maximize: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every torch optimizer; the rate is checked for each group."""
        lr = param_group.get("lr", self.defaults["lr"])
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr is a finite number >= 0, got {lr!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; the loss of ``closure`` where there is one. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            toward = group["lr"] if group["maximize"] else -group["lr"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise ValueError(
                        "Manhattan moves by the sign of a dense gradient, got a sparse one of "
                        f"{tuple(gradient.shape)}; use nn.Embedding(..., sparse=False)"
                    )
                parameter.add_(torch.sign(torch.nan_to_num(gradient, nan=0.0)), alpha=toward)
        return loss
