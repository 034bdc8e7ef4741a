"""``attach``: whose steps are a layer's weight updates, where it cannot be known. Imports the layers."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamnorm.nn.norm import Norm, norms
from streamnorm.nn.replicas import merge
from streamnorm.nn.updates import has_happened

WRAPPED = "optimizer", "base_optimizer", "optim"
"""Attributes under which optimizers of other libraries hold the one that they wrap."""


class Attachment:
    """The link between a model and an optimizer that ``attach`` returns; ``remove()`` it, or use it in a ``with``.

    Attributes:
        model, optimizer: what it links.
        updates: number of weight updates so far. A step that a fused optimizer may have skipped is counted.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach(model, optimizer) takes a module and an optimizer, got {type(model).__name__} and "
                f"{type(optimizer).__name__}"
            )
        self.model, self.optimizer = model, innermost(optimizer)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no layer whose memory changes at a weight update, such as StreamingNorm; "
                "nothing needs to be attached"
            )
        self.updates = 0
        self._hook = self.optimizer.register_step_post_hook(self._after_step)
        self._mark(True)

    @property
    def layers(self) -> list[Norm]:
        """The layers of the model whose memory changes at a weight update, as the model is now."""
        return [layer for layer in norms(self.model) if layer.is_updated]

    def _mark(self, attached: bool) -> None:
        for layer in self.layers:
            layer.follows.attached = attached

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.updates += 1
        happened = has_happened(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = self.layers
        for layer in layers:
            layer.follows.attached = True
        # The others hear of the step by themselves.
        told = [layer for layer in layers if not layer.follows.is_updated_by(layer, optimizer, held)]
        for layer, has_stepped in merge(told, happened):
            layer.fold_alone(has_stepped)

    def remove(self) -> None:
        """Undo ``attach``."""
        self._hook.remove()
        self._mark(False)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def attach(model: nn.Module, optimizer: Optimizer) -> Attachment:
    """Count every step of ``optimizer`` as a weight update of the layers of ``model``.

    It is rarely needed. A layer hears by itself of the steps of the optimizer that holds its gain, or if it has no
    parameters, the nearest parameters before its input (``nn.updates``): long <- kappa1 long + kappa2 short, and short
    is emptied (sections 3.3.1, 3.3.2). ``attach`` says it for layers whose parameters no optimizer holds: a teacher
    that averages the weights of a student and is called in training mode, a frozen network with statistics that move,
    a layer that normalizes the data of a model trained by several optimizers.

    Args:
        model: contains the layers; they are looked for anew at each step.
        optimizer: of ``torch.optim``, or one that wraps it.

    Returns:
        The link. The optimizer holds it; a copy of the optimizer does not.

    Raises:
        TypeError: for anything else.
        ValueError: for a model without such layers.

    >>> import copy, torch
    >>> from streamnorm import StreamingNorm
    >>> student = nn.Sequential(nn.Linear(4, 3, bias=False), StreamingNorm(3))
    >>> teacher = copy.deepcopy(student)
    >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    >>> link = attach(teacher, optimizer)
    >>> x = torch.randn(8, 4)
    >>> with torch.no_grad():
    ...     target = teacher(x)
    >>> (student(x) - target).square().mean().backward()
    >>> optimizer.step()
    >>> student[1].H1.held, teacher[1].H1.held
    (tensor(8), tensor(8))
    """
    return Attachment(model, optimizer)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` updates the weights: the one that others, such as Accelerate's, wrap."""
    for name in WRAPPED:
        inner = vars(optimizer).get(name)
        if isinstance(inner, Optimizer):
            return innermost(inner)
    return optimizer
