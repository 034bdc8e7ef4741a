"""Decoupled accumulation and update (paper, section 2), and the notification of weight updates.

Gradients accumulate over n mini-batches of m samples; the weights are updated once for all of them. ``attach`` notifies
the layers of a model of an optimizer's updates in any training loop; ``DAU`` is such a loop. Imports the layers.

Legend: m samples per batch (S/B), n batches per update (B/U); one cycle is n mini-batches and one weight update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from streamnorm.checks import expect_whole, is_whole
from streamnorm.nn.norm import Norm, norms
from streamnorm.stream.policy import Streaming

Warmup = int | Literal["auto"]
AUTO_WARMUP = 4
"""Warm-up cycles that ``"auto"`` uses for a model with tiny references."""
TINY = 4
"""A reference of fewer activations than this is tiny: its first sigma may be nearly 0 by chance."""


def has_tiny_references(layers: Iterable[Norm]) -> bool:
    """Whether a layer of the paper's rule was last called with fewer than ``TINY`` activations in a reference."""
    sizes = (layer.reference_size for layer in layers if isinstance(layer.policy, Streaming))
    return any(size is not None and size < TINY for size in sizes)


class Attachment:
    """The link between a model and its optimizer that ``attach`` returns; ``remove()`` it, or use it in a ``with``."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, warmup: Warmup) -> None:
        if warmup != "auto" and not is_whole(warmup, least=0):
            raise ValueError(f'warmup is a number of weight updates >= 0 or "auto", got {warmup!r}')
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach(model, optimizer) takes a module and an optimizer, got {type(model).__name__} and "
                f"{type(optimizer).__name__}"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if (own := {id(p) for p in model.parameters()}) and not own & held:
            raise ValueError(
                "the optimizer holds none of the model's parameters, so that its steps are no weight updates of this "
                "model; give attach the optimizer that trains it, again when you make another"
            )
        self.layers = [layer for layer in norms(model) if layer.H1 is not None or layer.H2 is not None]
        self.warmup: Warmup = warmup
        self._steps = 0
        self._warm = False
        self._skipped: Tensor | None = None
        self.hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def warming_up(self) -> bool:
        """Whether the next weight update is part of the warm-up, which updates statistics but not weights."""
        if self._warm:
            return False
        cycles = self._cycles()
        self._warm = cycles > 0 and self._steps >= cycles and self.updates >= cycles
        return cycles > 0 and not self._warm

    @property
    def updates(self) -> int:
        """Number of weight updates, including those of the warm-up."""
        return self._steps - (0 if self._skipped is None else int(self._skipped))

    def _cycles(self) -> int:
        if self.warmup != "auto":
            return self.warmup
        return AUTO_WARMUP if has_tiny_references(self.layers) else 0

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.warming_up:
            return None
        _drop_gradients(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def without_gradients() -> Any:
            loss = closure()
            _drop_gradients(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": without_gradients}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under a gradient scaler runs step() and skips inside its kernel; found_inf says so.
        overflow = vars(optimizer).get("found_inf")
        happened = True if overflow is None else overflow == 0
        warming = self.warming_up
        for layer in self.layers:
            layer.fold(happened)
            if warming and layer.policy.uses_estimate and layer.H2 is not None:
                layer.H2.clear()
        self._steps += 1
        if isinstance(happened, Tensor):
            self._skipped = (~happened).sum() + (0 if self._skipped is None else self._skipped)

    def remove(self) -> None:
        """Undo ``attach``."""
        for hook in self.hooks:
            hook.remove()

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: the progress of the warm-up."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a ``state_dict()``."""
        self._steps, self._skipped, self._warm = state["updates"], None, False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _drop_gradients(optimizer: Optimizer) -> None:
    """Make the step a no-op: without gradients an optimizer changes neither weights nor its own averages."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def attach(model: nn.Module, optimizer: Optimizer, warmup: Warmup = 0) -> Attachment:
    """Notify every layer of ``model`` that has a memory of the weight updates of ``optimizer``.

    After each ``optimizer.step()`` the layers fold: ``long <- kappa1 long + kappa2 short`` and short is emptied
    (sections 3.3.1, 3.3.2). A step that a gradient scaler skips does not fold. Nothing else in a training loop changes,
    but note: H2 remembers gradients in the units of the loss, so a gradient scaler must keep one scale
    (``growth_interval=10**9``); and every backward pass counts, also a second one through the same forward call.

    Args:
        model: contains the layers; layers added later need another ``attach``.
        optimizer: updates the weights of ``model``.
        warmup: so many first steps update the statistics but not the weights: their gradients are dropped. Only for the
            paper's rule, where the first estimate of sigma from a single activation is nearly 0 and its gradient would
            ruin the weights. ``"auto"``: 4 if a reference of such a layer holds fewer than 4 activations (one to three
            samples per batch on a fully connected layer), otherwise 0.

    Returns:
        The link; save its ``state_dict()`` in checkpoints if there is a warm-up.

    Raises:
        ValueError: for a warmup that is not a number of steps, or an optimizer of another model.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), StreamingNorm(3), nn.ReLU(), nn.Linear(3, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> link = attach(model, optimizer)
    >>> for sample in torch.randn(16, 1, 4):
    ...     model(sample).pow(2).mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> model[1].H1.held  # samples that long counts as
    tensor(16)
    """
    return Attachment(model, optimizer, warmup)


@contextmanager
def vectorized(model: nn.Module, batches: int, averaged: bool = False) -> Iterator[None]:
    """Inside, every training call of ``model`` treats its first axis as ``batches`` mini-batches in order.

    The weights are constant inside a cycle, so all its mini-batches can be computed in one call: ``Norm`` layers take
    statistics per mini-batch, and F and G see the mini-batches arrive one after another, forward and backward, exactly
    as in a loop. The backward pass may come after the block. Needs memory for all mini-batches together.

    Args:
        model: contains the layers.
        batches: mini-batches per call.
        averaged: the loss is the mean over the mini-batches, not the sum of their losses as in a loop with a backward
            pass each: H2 then still remembers gradients in the units of the loop.

    Raises:
        ValueError: for ``torch.nn`` batch normalization, which would mix the mini-batches; and for a layer at its
            second call inside, where mini-batches would arrive in another order than in the loop.

    >>> from streamnorm import StreamingNorm
    >>> layer = StreamingNorm(3)
    >>> with vectorized(layer, 16):
    ...     y = layer(torch.randn(16, 3))
    >>> layer.H1.count
    tensor(16)
    """
    if batches < 1:
        raise ValueError(f"batches is a number of mini-batches >= 1, got {batches!r}")
    layers: list[Norm] = []
    for module in model.modules():
        if isinstance(module, Norm):
            layers.append(module)
        elif batches > 1 and isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, one in model.named_modules() if one is module)
            raise ValueError(
                f"{type(module).__name__} {name!r} would normalize {batches} mini-batches as one; use "
                "streamnorm.BatchNorm in its place, or the loop over mini-batches (vectorize=False)"
            )
    before = [(layer.steps, layer.unit) for layer in layers]

    def begin(*_: Any) -> None:
        for layer in layers:
            layer._calls.in_cycle = 0

    begins = model.register_forward_pre_hook(begin)  # each call of the model is a cycle
    try:
        for layer in layers:
            layer.steps, layer.unit = batches, batches if averaged else 1
        begin()
        yield
    finally:
        begins.remove()
        for layer, (steps, unit) in zip(layers, before, strict=True):
            layer.steps, layer.unit = steps, unit
            layer._calls.in_cycle = None if steps == 1 else layer._calls.in_cycle


class DAU:
    """Decoupled accumulation and update: gradients over n mini-batches of m samples, then one update (section 2).

    The update uses the mean of the n mini-batch gradients; the gradients are cleared after it; n = 1 is conventional
    training. Streaming layers are folded at every update (``attach``). Clip gradients in an
    ``optimizer.register_step_pre_hook``: they are the mean by then. Step a scheduler after ``update``, or after
    ``accumulate`` when ``accumulated`` is 0. For a gradient scaler, use ``attach`` and your own loop. To test with the
    weights that the statistics were taken with (section 3.3.1), test between ``cycle`` and ``step``.

    Args:
        model, optimizer: as in any loop.
        loss_fn: ``loss_fn(output, target)``, a mean over samples.
        samples_per_batch: m >= 1.
        batches_per_update: n >= 1.
        vectorize: run a whole cycle in one call, equal to the loop and faster, but with memory for m n samples. The
            loop (False) needs memory for m samples.
        warmup: as for ``attach``.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> dau = DAU(model, optimizer, nn.functional.cross_entropy, samples_per_batch=1, batches_per_update=16)
    >>> loss, output = dau.update(torch.randn(16, 4), torch.randint(3, (16,)))
    >>> output.shape
    torch.Size([16, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        samples_per_batch: int = 1,
        batches_per_update: int = 1,
        vectorize: bool = True,
        warmup: Warmup = 0,
    ) -> None:
        for name, value in (("samples_per_batch", samples_per_batch), ("batches_per_update", batches_per_update)):
            expect_whole(name, value)
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.m = samples_per_batch
        self.n = batches_per_update
        self.vectorize = vectorize
        self.link = attach(model, optimizer, warmup)
        self.accumulated = 0
        self._is_mean = False  # gradients are already the mean: a vectorized cycle uses the mean loss

    def accumulate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Process one mini-batch ``x (m, ...)``; the n-th since the last update triggers the weight update.

        Returns:
            Its mean loss and the model's output, detached.

        Raises:
            ValueError: for a number of samples other than m.
        """
        if len(x) != self.m or len(y) != self.m:
            raise ValueError(f"a mini-batch is {self.m} samples, got {len(x)} inputs and {len(y)} targets")
        if self.accumulated == self.n:
            raise ValueError(f"all {self.n} mini-batches of this cycle are accumulated; call step() first")
        results = self._one(x, y)
        if self.accumulated == self.n:
            self.step()
        return results

    def _one(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(x)
        loss = self.loss_fn(output, y)
        loss.backward()
        self.accumulated += 1
        return loss.detach(), output.detach()

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One whole cycle ``x (n m, ...)`` in order of arrival, then the weight update: ``cycle`` and ``step``; see
        there."""
        results = self.cycle(x, y)
        self.step()
        return results

    def cycle(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One whole cycle ``x (n m, ...)`` in order of arrival, without the weight update.

        Returns:
            The mean loss of the cycle and the model's outputs ``(n m, ...)``, detached.

        Raises:
            ValueError: for another number of samples, or if the previous cycle has not had its ``step``.
        """
        if len(x) != self.m * self.n or len(y) != len(x):
            raise ValueError(
                f"a cycle is {self.n} mini-batches of {self.m} samples, {self.m * self.n} in all; "
                f"got {len(x)} inputs and {len(y)} targets; leave out an unfilled last cycle (drop_last=True)"
            )
        if self.accumulated:
            raise ValueError(
                f"{self.accumulated} of {self.n} mini-batches are accumulated; finish that cycle and its step first"
            )
        if not self.vectorize or self.n == 1:
            results = [self._one(a, b) for a, b in zip(x.split(self.m), y.split(self.m), strict=True)]
            return torch.stack([loss for loss, _ in results]).mean(), torch.cat([output for _, output in results])
        with vectorized(self.model, self.n, averaged=True):
            output = self.model(x)
        loss = self.loss_fn(output, y)
        loss.backward()
        self.accumulated, self._is_mean = self.n, True
        return loss.detach(), output.detach()

    @torch.no_grad()
    def warm_up(self, x: Tensor) -> None:
        """A cycle that only updates statistics: training-mode forward passes over ``x (n m, ...)`` and a fold, no
        weight update."""
        was_training = self.model.training
        self.model.train()
        try:
            if self.vectorize:
                with vectorized(self.model, self.n):
                    self.model(x)
            else:
                for part in x.split(self.m):
                    self.model(part)
        finally:
            self.model.train(was_training)
        for layer in self.link.layers:
            layer.fold()

    @torch.no_grad()
    def needs_warmup(self, x: Tensor) -> bool:
        """Whether mini-batches like ``x (m, ...)`` lead to tiny references; tried on a copy of the model."""
        copy = deepcopy(self.model).train()
        copy(x)
        return has_tiny_references(norms(copy))

    def step(self) -> None:
        """The weight update at the end of a ``cycle``, with the mean of its gradients.

        Raises:
            ValueError: in the middle of a cycle.
        """
        if self.accumulated != self.n:
            raise ValueError(
                f"{self.accumulated} of {self.n} mini-batches are accumulated; the weights are updated after {self.n}"
            )
        if not self._is_mean:
            take_mean(self.optimizer, self.n)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulated, self._is_mean = 0, False


def take_mean(optimizer: Optimizer, n: int) -> None:
    """Divide the gradients accumulated over n mini-batches by n, in place."""
    if n > 1:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(n)
