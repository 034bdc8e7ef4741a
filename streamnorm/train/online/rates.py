"""An optimizer as the compiled step sees it: its rates and its state.

Imports torch alone.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

Served = SGD | Adam | AdamW

SGD_RULE, ADAM_RULE, ADAMW_RULE = range(3)
"""Kinds of optimizer that a compiled step supports."""

_of_sgd = itemgetter("lr", "weight_decay", "momentum", "dampening", "nesterov")
_of_adam = itemgetter("lr", "weight_decay", "betas", "eps", "decoupled_weight_decay")
_REFUSED = ("amsgrad", "capturable", "differentiable")


class Rates:
    """An optimizer's settings and state for compiled steps.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``.

    Attributes:
        params: those that steps update, in order.
        numbers: of each group the kind, lr, weight decay, momentum or beta1, dampening, nesterov, beta2 and eps, as in
            ``sn_rates`` of ``csrc/online.h``; then for each parameter whether its averages are new.

    Raises:
        TypeError, ValueError: for an optimizer or option that is not supported.
    """

    def __init__(self, optimizer: Served) -> None:
        if type(optimizer) not in (SGD, Adam, AdamW):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer is a torch.optim.SGD, Adam or AdamW, got {kind}; use a loop")
        for name in _REFUSED:
            if any(group.get(name) for group in optimizer.param_groups) and type(optimizer) is not SGD:
                raise ValueError(f"{type(optimizer).__name__} with {name}=True is not served. Use a loop")
        self.optimizer = optimizer
        self.of_adam = type(optimizer) is not SGD
        self._groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._names = ("exp_avg", "exp_avg_sq", "step") if self.of_adam else ("momentum_buffer",)
        self._count = len(optimizer.param_groups)
        self.params: list[Tensor] = []
        self.numbers = torch.empty(0, device="cpu")
        self._told: Any = None  # the settings in numbers
        self._new: list[tuple[Tensor, dict[str, Tensor]]] = []  # state that the optimizer does not have yet

    def add(self, parameter: Tensor) -> int:
        """Add a parameter, and return the index of its group."""
        self.params.append(parameter)
        return self._groups.get(id(parameter), 0)

    def moves(self, parameter: Tensor) -> bool:
        """Whether steps of the optimizer update a parameter."""
        return parameter.requires_grad and id(parameter) in self._groups

    def holds(self) -> bool:
        """Whether the number of groups is unchanged."""
        return len(self.optimizer.param_groups) == self._count

    def reads(self, moving: bool) -> list[Tensor] | None:
        """Read the optimizer's current settings, and return its state tensors if parameters are ``moving``. None: not
        supported."""
        groups = self.optimizer.param_groups
        settings = [(_of_adam if self.of_adam else _of_sgd)(group) for group in groups]
        if any(group["maximize"] for group in groups) or (
            self.of_adam and any(group[name] for group in groups for name in _REFUSED)
        ):
            return None
        state: list[Tensor] = []
        fresh: list[int] = []
        self._new = []
        remembered, averages = self.optimizer.state, [self.of_adam or group["momentum"] for group in groups]
        for i, parameter in enumerate(self.params if moving else ()):
            if averages[self._groups[id(parameter)]]:
                held = remembered.get(parameter)
                if not held or (not self.of_adam and held.get("momentum_buffer") is None):
                    fresh.append(i)
                    held = self._empty(parameter)
                    self._new.append((parameter, held))
                state += [held[name] for name in self._names]
        if (settings, fresh) != self._told:
            numbers = [value for values in settings for value in self._numbers(*values)]
            numbers += [i in fresh for i in range(len(self.params))]
            self.numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            told = any(isinstance(value, Tensor) for values in settings for value in values)
            self._told = None if told else (settings, fresh)  # a tensor may be changed in place
        return state

    def _numbers(self, lr: Any, decay: Any, momentum: Any, last: Any, flag: Any) -> tuple[float, ...]:
        """A group's settings in numbers. The last two are dampening and nesterov, or eps and decoupled decay."""
        if not self.of_adam:
            return SGD_RULE, float(lr), float(decay), float(momentum), float(last), float(flag), 0, 0
        beta1, beta2 = map(float, momentum)
        return ADAMW_RULE if flag else ADAM_RULE, float(lr), float(decay), beta1, 0, 0, beta2, float(last)

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, requires_grad=False)
        if not self.of_adam:
            return {"momentum_buffer": zeros}
        wide = torch.get_default_dtype() is torch.float64 and not self.optimizer.param_groups[0]["fused"]
        step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros)}

    def written(self) -> None:
        """Give the optimizer the state that compiled steps created."""
        for parameter, new in self._new:
            self.optimizer.state[parameter].update(new)
        self._new = []
