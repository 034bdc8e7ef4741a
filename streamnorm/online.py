"""Pure online learning, one sample and one weight update at a time, in one compiled call for a step or for many.

What a step of a multi-layer perceptron costs at one sample is reading and writing its weights. An ordinary loop does
that several times over (the gradient of each weight is a matrix of its own); ``kernels/native/online.cpp`` reads them
once forward, and once backward while it moves them. The model, its buffers and the optimizer stay what they are and
hold the same numbers, so that either kind of step can follow the other. Imports ``dau``, the plan and what stands below
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import SGD

from streamnorm.dau import Warmup, attach
from streamnorm.kernels import library, may_use
from streamnorm.kernels.cpu import unseen
from streamnorm.onlineplan import CROSS_ENTROPY, Plan, compiled_steps

Loss = Callable[[Tensor, Tensor], Tensor]


class OnlineTrainer:
    """Trains a multi-layer perceptron on one sample after another, with a weight update for each.

    A step is, up to rounding, ``loss_fn(model(x), target).backward(); optimizer.step(); optimizer.zero_grad()`` with
    ``attach(model, optimizer, warmup)``, and with the compiled kernels it takes a fraction of the time. It is just that
    without them, for a sample whose activations are not finite, in eval mode, while parameters are frozen, and while
    modules have hooks or the optimizer has others than those of ``attach`` (clipping, for instance).

    Args:
        model: ``nn.Sequential`` of ``nn.Linear``, each of them but the last followed, in this order, by a norm
            (``StreamingNorm`` with p = 1 or 2 in Setting B or C, or ``nn.LayerNorm``) and ``nn.ReLU``, or either, or
            nothing. float32 or float64, on the CPU.
        optimizer: ``torch.optim.SGD``; its rates, momentum and weight decay are read at each step.
        loss_fn: ``F.cross_entropy`` for integer targets, ``F.mse_loss`` for targets of the shape of the output, or
            ``nn.CrossEntropyLoss()`` and ``nn.MSELoss()``.
        warmup: as for ``attach``, which is called here: the model needs no other.

    Attributes:
        link: what ``attach`` returned; its ``state_dict()`` belongs into a checkpoint while a warm-up may be under way.

    Raises:
        TypeError, ValueError: for what cannot be trained so, with the module and what to do; nothing has changed then.

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

    def __init__(self, model: nn.Module, optimizer: SGD, loss_fn: Loss = F.cross_entropy, warmup: Warmup = 0):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self._plan = Plan(model, optimizer, loss_fn)
        self.link = attach(model, optimizer, warmup)
        self._own = [hook.id for hook in self.link.hooks]

    def step(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one sample ``x (d,)`` or ``(1, d)`` with its ``target``, a class ``()`` or ``(1,)``, or values
        of the shape of the output.

        Returns:
            Its loss ``()`` and the model's output before the update, ``(c,)`` or ``(1, c)``, detached.

        Raises:
            ValueError: for another shape or dtype, or a class that the model does not know; nothing has changed then.
        """
        lead = (1,) if x.ndim == 2 else ()
        self._check(x, target, lead)
        plan = self._plan
        loss, output = x.new_empty(()), x.new_empty((*lead, plan.outputs))
        self._train(x, target, 1, loss, output)
        return loss, output

    def steps(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Train on the samples ``x (n, d)`` in their order, with n weight updates: what n calls of ``step`` do, and
        faster. It cannot be interrupted; hand over as many at a time as you would like to wait for.

        Returns:
            The losses ``(n,)`` and the outputs ``(n, c)``, each from before its own update, detached.

        Raises:
            ValueError: as for ``step``, before the first sample.
        """
        lead = (*x.shape[:1],)
        self._check(x, targets, lead)
        plan = self._plan
        losses, outputs = x.new_empty(lead), x.new_empty((*lead, plan.outputs))
        self._train(x, targets, len(x), losses, outputs)
        return losses, outputs

    def _check(self, x: Tensor, targets: Tensor, lead: tuple[int, ...]) -> None:
        """Refuse what does not fit the model as it is now."""
        plan = self._renew()
        if x.shape != (*lead, plan.inputs):
            raise ValueError(f"a sample is {plan.inputs} values, got {tuple(x.shape)}; for many samples call steps")
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
        """The plan, made anew if anything lies elsewhere than it did."""
        if not self._plan.holds():
            plan = Plan(self.model, self.optimizer, self.loss_fn)
            if plan.norms != self.link.layers:
                raise ValueError("the model has other norms than it had; make another OnlineTrainer for it")
            self._plan = plan
        return self._plan

    def _train(self, x: Tensor, targets: Tensor, n: int, losses: Tensor, outputs: Tensor) -> None:
        """Train on n samples and write down their losses and outputs."""
        x, targets = x.contiguous(), targets.contiguous()
        done = 0
        while done < n:
            served = self._is_served()
            warming = not self.link._warm and self.link.warming_up
            many = 1 if warming else n - done
            did = self._compiled(x, targets, n, done, many, warming, losses, outputs) if served else 0
            done += did
            if did < many:
                samples, wanted = x.detach().reshape(n, -1), targets.detach().reshape(n, *targets.shape[x.ndim - 1 :])
                loss, output = self._ordinary(samples[done : done + 1], wanted[done : done + 1])
                losses.view(n)[done], outputs.view(n, -1)[done] = loss, output[0]
                done += 1
            if done < n:
                self._renew()

    def _is_served(self) -> bool:
        """Whether the next step may be a compiled one."""
        optimizer, plan = self.optimizer, self._plan
        if (
            library.library() is None
            or not may_use("cpu")
            or unseen()
            or any(plan.hooks)
            or _has_any_global_hook()
            or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in plan.params)
            or not plan.all_move
            or [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks] != self._own
        ):
            return False
        for norm in plan.norms:
            if not norm.training:
                return False
            norm._calls.reference_size = 1
        return True

    def _compiled(
        self, x: Tensor, targets: Tensor, n: int, start: int, many: int, warming: bool, losses: Tensor, outputs: Tensor
    ) -> int:
        """Train on ``many`` of n samples from ``start`` in one call; returns how many: the next is not finite."""
        plan = self._plan
        if not plan.reads(moving=not warming):
            return 0
        addresses = [tensor.data_ptr() for tensor in (x, targets, losses, outputs)]
        if start:
            sizes = [t.numel() // n * t.element_size() for t in (x, targets, losses, outputs)]
            addresses = [address + start * size for address, size in zip(addresses, sizes, strict=True)]
        done = compiled_steps()(plan.address, *addresses, many, plan.dtype is torch.float64, not warming)
        if done:
            plan.written(moved=not warming)
            for norm in plan.norms:
                norm._calls.unfolded = 0
                if warming and norm.H2 is not None:
                    norm.H2.clear()
            self.link._steps += done
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether it stepped
        return done

    @torch.enable_grad()
    def _ordinary(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        output = self.model(x)
        loss = self.loss_fn(output, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), output.detach()
