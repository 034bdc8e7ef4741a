"""The warm-up of the paper's rule: first weight updates that gather statistics and leave the weights alone.

Imports the layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.checks import is_whole
from streamnorm.nn.norm import Norm, norms
from streamnorm.nn.replicas import has_processes, replicas_of
from streamnorm.nn.updates import has_happened
from streamnorm.stream.policy import Streaming
from streamnorm.train.attach import innermost

Updates = int | Literal["auto"]
AUTO_WARMUP = 4
"""Updates that ``"auto"`` holds back for a model with tiny references."""
TINY = 4
"""A reference of fewer activations than this is tiny: its first sigma may be nearly 0 by chance."""


def has_tiny_references(layers: Iterable[Norm]) -> bool:
    """Whether a layer of the paper's rule was last called with fewer than ``TINY`` activations in a reference."""
    sizes = (layer.reference_size for layer in layers if isinstance(layer.policy, Streaming))
    return any(size is not None and size < TINY for size in sizes)


class Warmup:
    """The first ``optimizer.step()`` calls update the statistics but not the weights: their gradients are dropped.

    Only for the paper's rule (``Streaming``), where the first estimate of sigma from a single activation is nearly 0
    and its gradient would ruin the weights.

    Args:
        model: contains the layers.
        optimizer: updates the weights of ``model``.
        updates: so many steps are held back. ``"auto"``: 4 if a reference of such a layer holds fewer than 4
            activations at the first step (one to three samples per batch on a fully connected layer), otherwise 0. With
            ``torch.distributed`` initialized, 4 if it does in any process; they make their first step together.

    Raises:
        TypeError: for anything but a module and an optimizer.
        ValueError: for anything else as ``updates``.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), StreamingNorm(3, alpha=(0.7, 0.3)))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> warmup = Warmup(model, optimizer, updates=1)
    >>> before = model[0].weight.clone()
    >>> model(torch.randn(8, 4)).square().sum().backward(); optimizer.step()
    >>> torch.equal(model[0].weight, before), warmup.is_over
    (True, True)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, updates: Updates = "auto") -> None:
        if updates != "auto" and not is_whole(updates, least=0):
            raise ValueError(f'a warm-up is a number of weight updates >= 0 or "auto", got {updates!r}')
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Warmup(model, optimizer) takes a module and an optimizer, got {type(model).__name__} and "
                f"{type(optimizer).__name__}"
            )
        self.model = model
        self.asked: Updates = updates
        self._cycles = None if updates == "auto" else updates
        self._steps = 0
        self._skipped: Tensor | None = None
        self._is_over = False
        optimizer = innermost(optimizer)
        self.hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def updates(self) -> int:
        """Number of weight updates, including those that were held back."""
        return self._steps - (0 if self._skipped is None else int(self._skipped))

    @property
    def is_over(self) -> bool:
        """Whether the next step moves the weights. Unknown, and so false, before the first step with ``"auto"``."""
        if not self._is_over and self._cycles is not None and self._steps >= self._cycles:
            self._is_over = self.updates >= self._cycles
        return self._is_over

    def decide(self) -> None:
        """Find out what ``"auto"`` means here, if the layers have been called."""
        if self._cycles is not None:
            return
        layers = [layer for layer in norms(self.model) if isinstance(layer.policy, Streaming)]
        called = not layers or any(layer.reference_size is not None for layer in layers)
        tiny = has_tiny_references(layers)
        if has_processes():  # a process without data takes part too
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            found = torch.tensor([float(called), float(tiny)], device=device)
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group(layers))
            called, tiny = map(bool, found.tolist())
        if called:
            self._cycles = AUTO_WARMUP if tiny else 0

    @staticmethod
    def _group(layers: list[Norm]) -> Any:
        """The processes that decide together."""
        found = (replicas_of(layer) for layer in layers)
        return next((replicas.group for replicas in found if replicas is not None), None)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.decide()
        if self.is_over:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if self._cycles is not None:
                _drop_gradients(optimizer)
            return None

        def without_gradients() -> Any:
            loss = closure()
            self.decide()
            if not self.is_over and self._cycles is not None:
                _drop_gradients(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": without_gradients}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count(1, has_happened(optimizer))

    def count(self, steps: int, happened: Tensor | bool = True) -> None:
        """So many weight updates were made; those that were held back leave no gradient in H2."""
        if self._cycles and not self.is_over:
            for layer in norms(self.model):
                if layer.policy.uses_estimate and layer.H2 is not None:
                    layer.H2.clear()
        self._steps += steps
        if isinstance(happened, Tensor):
            self._skipped = (~happened).sum() + (0 if self._skipped is None else self._skipped)

    def remove(self) -> None:
        """End it."""
        for hook in self.hooks:
            hook.remove()

    def state_dict(self) -> dict[str, int | None]:
        """For a checkpoint: the progress."""
        return {"updates": self.updates, "cycles": self._cycles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a ``state_dict()``."""
        self._steps, self._skipped, self._is_over = state["updates"], None, False
        self._cycles = state.get("cycles") if self.asked == "auto" else self.asked


def _drop_gradients(optimizer: Optimizer) -> None:
    """Make the step a no-op: without gradients an optimizer changes neither weights nor its own averages."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
