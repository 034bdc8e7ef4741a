"""Weight updates reach the layers: one hook for all optimizers of torch (paper, sections 3.3.1, 3.3.2). Imports torch.

A layer that remembers has to know when weights are updated, whoever made the optimizer, and however often model and
optimizer are copied, pickled, wrapped or replaced. So nothing links the two: after every ``optimizer.step()`` each
living layer is asked whether this was its update.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from streamnorm.nn.replicas import beside, has_processes, merge
from streamnorm.nn.wrapped import watch

CHECK = 20
"""Training calls without a weight update after which a layer looks for what is missing, and again each so many."""
FORGOTTEN = 1000
"""Training calls without a weight update that are reported whatever the reason may be."""
STEPS = Optimizer.profile_hook_step.__code__.co_filename
"""Where torch keeps what runs around every step."""
NEAR = 256
"""Operations before a layer's input that are searched for a parameter."""


class Follows:
    """Whose steps are a layer's weight updates: of the optimizer that holds its first parameter.

    A layer without parameters follows the optimizer of the parameters nearest before its input. If there are none, as
    for a layer that normalizes the data, it follows every optimizer. Processes that train together all decide alike: by
    the parameters ``beside`` it. It is not saved, and a copy looks anew.

    Attributes:
        nearest: the parameters before the input; None: not looked for yet.
        attached: whether ``attach`` names its optimizer.
        unfolded: training calls since the latest weight update.
        evaluated: calls in eval mode that may be differentiated, since then.
        folds: weight updates so far.
    """

    __slots__ = (
        *("_idle", "_latest", "_steps", "_version", "attached", "evaluated", "folds", "has_warned"),
        *("nearest", "unfolded"),
    )

    def __init__(self) -> None:
        self.nearest: Sequence[ref[Tensor]] | None = None
        self.attached = self.has_warned = False
        self.unfolded = self.evaluated = self.folds = 0
        self._idle = self._version = 0
        self._steps: int | None = None
        self._latest: ref[Optimizer] | None = None

    def is_updated_by(self, layer: nn.Module, optimizer: Optimizer, held: set[int]) -> bool:
        """Whether a step of this optimizer, which holds the parameters of these ids, is a weight update."""
        own = first_parameter(layer)
        if own is not None:
            return id(own) in held
        if self.attached:
            return False
        near: Sequence[Tensor | None] = beside(layer, optimizer) or [found() for found in self.nearest or ()]
        nearest = [p for p in near if p is not None]
        if nearest:
            return any(id(p) in held for p in nearest)
        self.nearest = None
        if self.unfolded:
            self._expect_one(layer, optimizer)
        return True

    def _expect_one(self, layer: nn.Module, optimizer: Optimizer) -> None:
        """Warn if a layer that follows every optimizer meets a second one."""
        before = None if self._latest is None else self._latest()
        self._latest = ref(optimizer)
        if before is not None and before is not optimizer:
            self._warn(
                layer,
                "has no parameter, and none comes before it, so that the steps of every optimizer count as its weight "
                "updates, and there are several: name one by streamnorm.attach(model, optimizer)",
            )

    def called(self, layer: nn.Module, x: Tensor) -> None:
        """A training call."""
        self.unfolded += 1
        if self._steps is None:  # the first call since the latest weight update
            own = first_parameter(layer)
            self._steps, self._version = _updates.steps, 0 if own is None else own._version
            if own is None and self.nearest is None and x.requires_grad:
                self.nearest = [ref(p) for p in nearest_parameters(x)]
        elif self.unfolded % CHECK == 0 and self.unfolded > 0:  # below 0 inside a sequence, which counts as one call
            self._look_for_updates(layer)

    def folded(self, layer: nn.Module) -> None:
        """A weight update."""
        self.folds += 1
        if self.evaluated and not self.unfolded and not layer.frozen:
            self._idle += 1
            if self._idle == CHECK:
                self._warn(
                    layer,
                    f"was in eval mode for {CHECK} weight updates, so that its statistics did not move; call "
                    "model.train() before the forward pass, or streamnorm.freeze(model) if this is meant",
                )
        else:
            self._idle = 0
        self.unfolded = self.evaluated = 0
        self._steps = None

    def _look_for_updates(self, layer: nn.Module) -> None:
        """Warn if weights were updated since the latest fold, and the layer was not told."""
        if not layer.is_updated:
            return
        own = first_parameter(layer)
        missed = _updates.steps - (self._steps or 0)
        if own is not None and own._version - self._version > 1:
            why = "its gain was changed, by no step of a torch.optim.Optimizer; call layer.fold() after each update"
        elif missed and not self.folds:
            why = (
                f"no parameter of it is held by the optimizer of the {missed} steps since; name the one whose steps "
                "are its weight updates: streamnorm.attach(model, optimizer)"
            )
        elif self.unfolded == FORGOTTEN:
            why = "call optimizer.step() of a torch.optim.Optimizer, or layer.fold() after each update"
        else:
            return
        self._warn(layer, f"has seen {self.unfolded} training calls and no weight update: {why}")

    def _warn(self, layer: nn.Module, what: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(f"{layer!r} {what}", stacklevel=6)


class _Updates:
    """The living layers that fold, those that several processes merge alone, and the number of steps that any optimizer
    has made."""

    def __init__(self) -> None:
        self.layers: dict[int, ref[Any]] = {}
        self.averaging: dict[int, ref[Any]] = {}
        self.steps = 0
        self.inner: set[int] = set()  # what optimizers hold whose steps are part of a step that is still running
        self.hook: Any = None

    def after_step(self, optimizer: Optimizer) -> None:
        """Fold every layer whose weight update a step of this optimizer was."""
        self.steps += 1
        several = has_processes()
        refs = [*self.layers.values(), *(self.averaging.values() if several else ())]
        layers = [layer for layer in (found() for found in refs) if layer is not None]
        if not layers:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if several:
            held |= self.inner
            inside = is_inside_a_step(optimizer)
            self.inner = held if inside else set()
            if inside:
                return
        happened = has_happened(optimizer)
        updated = [layer for layer in layers if layer.follows.is_updated_by(layer, optimizer, held)]
        for layer, has_stepped in merge(updated, happened):
            layer.fold_alone(has_stepped)


_updates = _Updates()


@_disable_dynamo  # the layers of the whole process would be compiled with one optimizer
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _updates.after_step(optimizer)


def enlist(layer: Any) -> None:
    """Let a layer hear of weight updates for as long as it lives."""
    layers, key = _updates.layers if layer.is_updated else _updates.averaging, id(layer)
    layers[key] = ref(layer, lambda _: layers.pop(key, None))
    if _updates.hook is None:
        _updates.hook = register_optimizer_step_post_hook(_after_step)
        watch()


def hook_id() -> int | None:
    """The key of the hook among those that torch calls for all optimizers; None: there is no layer yet."""
    return None if _updates.hook is None else _updates.hook.id


def has_happened(optimizer: Optimizer) -> Tensor | bool:
    """Whether the latest ``optimizer.step()`` updated the weights. A fused optimizer under a gradient scaler skips
    inside its kernel; then this is a tensor on its device."""
    overflow = vars(optimizer).get("found_inf")
    return True if overflow is None else overflow == 0


def is_inside_a_step(optimizer: Optimizer) -> bool:
    """Whether the step of another optimizer, such as ``ZeroRedundancyOptimizer``, is running, of which this one's is a
    part. Several processes merge at the outer one: each may hold other parameters in the inner.

    It reads the stack, as only the stack forgets a step that has raised: torch calls no hook then, so that a mark left
    by a hook before the step would stay, and the next step would be taken for an inner one. What runs around each step
    is one function of torch, whose first argument is the optimizer.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == STEPS:
            running = frame.f_locals.get("args", (None,))[:1]
            if running and running[0] is not optimizer:
                return True
        frame = frame.f_back
    return False


def first_parameter(layer: nn.Module) -> Tensor | None:
    """The gain; the first parameter of a layer that has another kind."""
    affine = layer._modules.get("affine")
    gain = None if affine is None else affine._parameters.get("weight")
    return next(iter(layer.parameters()), None) if gain is None else gain


def nearest_parameters(x: Tensor) -> list[Tensor]:
    """The parameters that ``x`` was computed from, as few operations before it as there are any."""
    if isinstance(x, nn.Parameter):
        return [x]
    level, seen = [x.grad_fn], 0
    while level and seen < NEAR:
        leaves = [getattr(node, "variable", None) for node in level]
        found: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        if found:
            return found
        seen += len(level)
        below = (node for above in level if above is not None for node, _ in above.next_functions)
        level = list(dict.fromkeys(node for node in below if node is not None))
    return []
