"""Pure online learning, one sample and one weight update at a time, in one compiled call for one or many steps.

The cost of a multi-layer perceptron's step on one sample is reading and writing its weights. A PyTorch loop does that
several times (each weight has a separate gradient matrix); ``csrc/online.cpp`` reads them once in the backward pass,
and once in the forward pass while it updates them. The model, its buffers and the optimizer are used in place and hold
the same numbers, so that compiled steps and PyTorch steps can be mixed. Imports ``dau``, the plan and what stands below
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from streamnorm.inputs import expect_floating, expect_tensor
from streamnorm.nn.updates import hook_id
from streamnorm.ops import library
from streamnorm.ops.backends import may_use
from streamnorm.stream import Pooled
from streamnorm.tracing import has_global_hook, is_traced
from streamnorm.train.online.plan import CROSS_ENTROPY, Plan
from streamnorm.train.online.rates import Served
from streamnorm.train.warmup import Updates, Warmup

Loss = Callable[[Tensor, Tensor], Tensor]
MANY = 100
"""Skipped samples, if they are at least half of all, from which on there is a warning, once."""
WHY = ("", "input", "target", "activations", "loss", "gradients")
"""What is not finite in a sample, by the compiled step's codes."""
LOST = len(WHY)
"""The code for weights that are not finite."""


class OnlineTrainer:
    """Trains a multi-layer perceptron on one sample after another, with a weight update for each.

    A step is, up to rounding, ``loss_fn(model(x), target).backward(); optimizer.step(); optimizer.zero_grad()`` with
    ``Warmup(model, optimizer, warmup)``, and takes a fraction of the time with the compiled kernels. It runs exactly
    this PyTorch code without kernels, in eval mode, with frozen parameters, and if modules have hooks or the optimizer
    has any of its own (clipping, for instance).

    A sample is learned if it is finite: its input, its target, all activations, the loss, and all gradients as the
    optimizer uses them (times the learning rate for SGD, squared for Adam). Any other sample changes neither weights
    nor optimizer nor statistics.

    Args:
        model: ``nn.Sequential`` of ``nn.Linear``, each but the last optionally followed by a norm (``StreamingNorm``
            with p = 1 or 2 in Setting B or C, or ``nn.LayerNorm``) and/or ``nn.ReLU``, in this order. A norm may come
            before the first, for raw input. float32 or float64, on the CPU.
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``; its rates, averages and weight decay are read at each
            call.
        loss_fn: ``F.cross_entropy`` for integer targets, ``F.mse_loss`` for targets of the shape of the output, or
            ``nn.CrossEntropyLoss()`` and ``nn.MSELoss()``.
        warmup: first updates that gather statistics and leave the weights alone, for the paper's rule (``Warmup``).
        on_nonfinite: for a sample that is not finite: ``"skip"``, its loss and output are NaN; or ``"raise"``, it ends
            the call with an error after the samples before it were learned. If many are skipped, there is one warning.

    Attributes:
        warmup: the ``Warmup``; save its ``state_dict()`` in checkpoints if there is one.
        skipped: number of samples that were not finite.

    Raises:
        TypeError, ValueError: for anything unsupported, with the module and what to do; nothing has changed then.
        OverflowError: from ``step`` and ``steps``, when parameters are no longer finite.

    >>> from streamnorm import StreamingNorm
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), StreamingNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> online = OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.01))
    >>> loss, output = online.step(torch.randn(4), torch.tensor(2))
    >>> output.shape
    torch.Size([3])
    >>> losses, outputs = online.steps(torch.randn(20, 4), torch.randint(3, (20,)))
    >>> outputs.shape
    torch.Size([20, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Served,
        loss_fn: Loss = F.cross_entropy,
        warmup: Updates = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f'on_nonfinite is "skip" or "raise", got {on_nonfinite!r}')
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        self._seen, self._has_warned = 0, False
        self._plan = Plan(model, optimizer, loss_fn)
        self._norms = self._plan.norms
        self.warmup = Warmup(model, optimizer, warmup)
        self._own = [hook.id for hook in self.warmup.hooks]

    def step(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one sample ``x (d,)`` or ``(1, d)`` with its ``target``, a class ``()`` or ``(1,)``, or values
        of the shape of the output.

        Returns:
            Its loss ``()`` and the model's output before the update, ``(c,)`` or ``(1, c)``, detached.

        Raises:
            ValueError: for another shape or dtype, or an unknown class; nothing has changed then. With
                ``on_nonfinite="raise"`` also for a sample that is not finite.
        """
        expect_tensor("a sample", x)
        lead = (1,) if x.ndim == 2 else ()
        self._check(x, target, lead)
        plan = self._plan
        loss, output = x.new_empty(()), x.new_empty((*lead, plan.outputs))
        self._train(x, target, 1, loss, output)
        return loss, output

    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Train on the samples ``x (n, d)`` in order, with n weight updates: the same as n calls of ``step``, but
        faster. It cannot be interrupted; pass only as many at a time as you are willing to wait for.

        Returns:
            The losses ``(n,)`` and the outputs ``(n, c)``, each from before its own update, detached.

        Raises:
            ValueError: as for ``step``, before the first sample; for one that is not finite, after those before it.
        """
        expect_tensor("the input", x)
        lead = (*x.shape[:1],)
        self._check(x, targets, lead)
        plan = self._plan
        losses, outputs = x.new_empty(lead), x.new_empty((*lead, plan.outputs))
        self._train(x, targets, len(x), losses, outputs)
        return losses, outputs

    def _check(self, x: Tensor, targets: Tensor, lead: tuple[int, ...]) -> None:
        """Raise for samples that do not fit the model as it is now."""
        expect_tensor("the target", targets)
        plan = self._renew()
        if x.shape != (*lead, plan.inputs):
            raise ValueError(f"a sample is {plan.inputs} values, got {tuple(x.shape)}; for many samples call steps")
        expect_floating("a sample", x)
        if x.dtype is not plan.dtype or not x.is_cpu:
            raise ValueError(f"the model computes in {plan.dtype} on the CPU, got {x.dtype} on {x.device}")
        by_class = plan.loss == CROSS_ENTROPY
        dtype, shape = (torch.int64, lead) if by_class else (plan.dtype, (*lead, plan.outputs))
        if targets.shape != shape or targets.dtype is not dtype or not targets.is_cpu:
            raise ValueError(
                f"the targets of a loss by {self.loss_fn} are {dtype} of {shape} here, got {targets.dtype} of "
                f"{tuple(targets.shape)} on {targets.device}"
            )
        if by_class and targets.numel():
            least, most = map(int, (targets, targets) if targets.numel() == 1 else targets.aminmax())
            if least < 0 or most >= plan.outputs:
                raise ValueError(f"the model knows the classes 0 to {plan.outputs - 1}, got {least} to {most}")

    def _renew(self) -> Plan:
        """The plan, made anew if it no longer holds."""
        if not self._plan.holds():
            plan = Plan(self.model, self.optimizer, self.loss_fn)
            if plan.norms != self._norms:
                raise ValueError("the model has other norms than it had; make another OnlineTrainer for it")
            self._plan = plan
        return self._plan

    def _train(self, x: Tensor, targets: Tensor, n: int, losses: Tensor, outputs: Tensor) -> None:
        """Train on n samples and store their losses and outputs."""
        x, targets = (given.resolve_neg().contiguous() for given in (x, targets))
        skipped = self.skipped
        done = self._skip_leading(x, targets, n, losses, outputs)
        while done < n:
            served = self._is_served()
            warming = self._is_warming()
            many = 1 if warming else n - done
            if not (served and self._compiled(x, targets, n, done, many, warming, losses, outputs)):
                many = 1
                samples, wanted = x.detach().reshape(n, -1), targets.detach().reshape(n, *targets.shape[x.ndim - 1 :])
                result = self._ordinary(samples[done : done + 1], wanted[done : done + 1], done)
                losses.view(n)[done], outputs.view(n, -1)[done] = result
            done += many
            if done < n:
                self._renew()
        self._seen += n
        if self.skipped > skipped and not self._has_warned and self.skipped >= max(MANY, self._seen / 2):
            self._has_warned = True
            warnings.warn(
                f"{self.skipped:,} of {self._seen:,} samples were skipped, for they were not finite in their input, "
                'target, activations, loss or gradients; on_nonfinite="raise" says which and in what',
                stacklevel=4,
            )

    def _skip_leading(self, x: Tensor, targets: Tensor, n: int, losses: Tensor, outputs: Tensor) -> int:
        """Before a norm's first sample: skip all leading samples that are not finite at once, and return how many."""
        if self.on_nonfinite == "raise" or not self._begins():
            return 0
        sound = x.detach().reshape(n, -1).isfinite().all(1) & targets.detach().reshape(n, -1).isfinite().all(1)
        leading = int(sound.int().argmax()) if sound.any() else n
        losses.view(n)[:leading] = float("nan")
        outputs.view(n, -1)[:leading] = float("nan")
        self.skipped += leading
        return leading

    def _begins(self) -> bool:
        """Whether a norm has not seen a sample yet: its first estimate depends on all features and is made by torch."""
        memories = (norm.H1 for norm in self._plan.norms)
        return any(m is not None and isinstance(m.rule, Pooled) and m.rule.prior and not m.known for m in memories)

    def _is_warming(self) -> bool:
        self.warmup.decide()
        return not self.warmup.is_over

    def _is_served(self) -> bool:
        """Whether the next step may be a compiled one."""
        optimizer, plan = self.optimizer, self._plan
        if (
            library.library() is None
            or not may_use("cpu")
            or is_traced()
            or any(plan.hooks)
            or has_global_hook()
            or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in plan.params)
            or not plan.all_move
            or [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks] != self._own
            or _global_optimizer_pre_hooks
            or [*_global_optimizer_post_hooks] not in ([], [hook_id()])
        ):
            return False
        for norm in plan.norms:
            if not norm.training or norm.loss_scale != 1:
                return False
            norm._calls.reference_size = 1
        return True

    def _compiled(
        self, x: Tensor, targets: Tensor, n: int, start: int, many: int, warming: bool, losses: Tensor, outputs: Tensor
    ) -> bool:
        """Train on ``many`` of n samples from ``start`` in one call. False: not supported, nothing has changed."""
        given = x, targets, losses, outputs
        if many < n:
            given = tuple(tensor[start : start + many] for tensor in given)
        plan = self._plan
        done = plan.train(given, moving=not warming, raises=self.on_nonfinite == "raise")
        if done is None:
            return False
        self.skipped += done.skipped
        if done.learned:
            for norm in plan.norms:
                norm.follows.folded(norm)
            self.warmup.count(done.learned)
            self.optimizer._opt_called = True  # type: ignore[union-attr]  # schedulers check whether it stepped
        if done.why == LOST:
            raise self._lost(start + done.latest if done.latest >= 0 else None)
        if done.why:
            raise _refused(start + done.learned, WHY[done.why])
        return True

    def _ordinary(self, x: Tensor, target: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The same step in PyTorch."""
        why, loss, output = self._try(x, target)
        if why not in ("input", "target") and not all(p.isfinite().all() for p in self._plan.params):
            raise self._lost(None if why else number)
        if not why:
            return loss, output[0]
        if self.on_nonfinite == "raise":
            raise _refused(number, why)
        self.skipped += 1
        nothing = x.new_tensor(float("nan"))
        return nothing, nothing.expand(self._plan.outputs)

    @torch.enable_grad()
    def _try(self, x: Tensor, target: Tensor) -> tuple[str, Tensor, Tensor]:
        """A step in PyTorch, or what is not finite in the sample; then nothing has changed."""
        if not x.isfinite().all():
            return "input", x, x
        if not target.isfinite().all():
            return "target", x, x
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        follows = [(norm.follows, norm.follows.unfolded) for norm in self._plan.norms]
        refusals = self._refusals()
        self.optimizer.zero_grad()
        with _watching(self.model) as strange:
            output = self.model(x)
        loss, why = self.loss_fn(output, target), ""
        if strange or self._refusals() != refusals:
            why = "activations"
        elif not loss.isfinite():
            why = "loss"
        else:
            loss.backward()
            if not self._is_warming() and (self._refusals() != refusals or not self._fits()):
                why = "gradients"
        if not why:
            self.optimizer.step()
        else:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for one, unfolded in follows:
                one.unfolded = unfolded
        self.optimizer.zero_grad()
        return why, loss.detach(), output.detach()

    def _refusals(self) -> list[int]:
        """The number of arrivals that each memory of a norm has skipped."""
        memories = [memory for norm in self._plan.norms for memory in (norm.H1, norm.H2)]
        return [int(memory.skipped) for memory in memories if memory is not None]

    def _fits(self) -> bool:
        """Whether the optimizer's step does not overflow for any gradient."""
        for group in self.optimizer.param_groups:
            for grad in [p.grad for p in group["params"] if p.grad is not None]:
                most = grad.abs().max()
                if not (most.isfinite() and (most * (most if self._plan.rates.of_adam else group["lr"])).isfinite()):
                    return False
        return True

    def _lost(self, number: int | None) -> OverflowError:
        names = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        when = "before the call" if number is None else f"after the update by sample {number} of this call"
        return OverflowError(
            f"parameters are not finite any more {when}: {', '.join(names)}. Go back to a checkpoint, with a smaller lr"
        )


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[Any]]:
    """Inside, collects modules of ``model`` whose output is not finite, and layer norms whose input variance is not."""
    strange: list[Any] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        no_variance = isinstance(module, nn.LayerNorm) and not inputs[0].var(correction=0).isfinite()
        if no_variance or not output.isfinite().all():
            strange.append(module)

    handles = [module.register_forward_hook(look) for module in model._modules.values()]  # type: ignore[union-attr]
    try:
        yield strange
    finally:
        for handle in handles:
            handle.remove()


def _refused(number: int, why: str) -> ValueError:
    return ValueError(
        f"sample {number} of this call is not finite in its {why}; the {number} before it were learned, it and those "
        'after it were not. Mend or leave it out, or take on_nonfinite="skip"'
    )
