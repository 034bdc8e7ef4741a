"""What the compiled step of ``online`` is told about an optimizer: its rates, and where it keeps what it remembers.

Imports torch alone.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from operator import is_not, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

Served = SGD | Adam | AdamW


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure of ``csrc/online.cpp``."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_DOUBLES = ("lr", "decay", "momentum", "dampening", "nesterov", "beta2", "eps")
_CRates = structure("_CRates", kind=c_int64, **dict.fromkeys(_DOUBLES, c_double))
CParam = structure(
    "CParam",
    **dict.fromkeys(("at", "average", "square", "count"), c_void_p),
    **dict.fromkeys(("group", "fresh", "wide_count"), c_int64),
)

_SGD, _ADAM, _ADAMW = range(3)
_of_sgd = itemgetter("lr", "weight_decay", "momentum", "dampening", "nesterov")
_of_adam = itemgetter("lr", "weight_decay", "betas", "eps", "decoupled_weight_decay")
_REFUSED = ("amsgrad", "capturable", "differentiable")


class Rates:
    """An optimizer as compiled steps know it.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: for what is not served.
    """

    def __init__(self, optimizer: Served, dtype: torch.dtype) -> None:
        if type(optimizer) not in (SGD, Adam, AdamW):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer is a torch.optim.SGD, Adam or AdamW, got {kind}; use attach and a loop")
        for name in _REFUSED:
            if any(group.get(name) for group in optimizer.param_groups) and type(optimizer) is not SGD:
                raise ValueError(f"{type(optimizer).__name__} with {name}=True is not served. Use attach and a loop")
        self.optimizer, self.dtype = optimizer, dtype
        self.of_adam = type(optimizer) is not SGD
        self._groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._rates = (_CRates * len(optimizer.param_groups))()
        self.address = ctypes.addressof(self._rates)
        self._settings: list[tuple[Any, ...]] = []  # as they were told last
        self._told: list[tuple[Tensor, Any]] = []  # parameters and what C knows of them
        self._kept: dict[int, tuple[Tensor, ...]] = {}  # what C knows of their state
        self._new: list[tuple[Tensor, dict[str, Tensor]]] = []  # state that the optimizer does not have yet

    def add(self, parameter: Tensor, c: Any) -> None:
        """A parameter and its structure."""
        c.group = self._groups.get(id(parameter), -1)
        self._told.append((parameter, c))

    def moves(self, parameter: Tensor) -> bool:
        """Whether steps of the optimizer move a parameter."""
        return parameter.requires_grad and id(parameter) in self._groups

    def holds(self) -> bool:
        """Whether there are as many groups as there were."""
        return len(self.optimizer.param_groups) == len(self._rates)

    def reads(self, moving: bool) -> bool:
        """Read what the optimizer says now and, while weights are moving, where its state is. False: not in a way that
        is served."""
        groups = self.optimizer.param_groups
        settings = [(_of_adam if self.of_adam else _of_sgd)(group) for group in groups]
        if any(group["maximize"] for group in groups) or (
            self.of_adam and any(group[name] for group in groups for name in _REFUSED)
        ):
            return False
        if settings != self._settings:
            for c, values in zip(self._rates, settings, strict=True):
                self._fill(c, values)
            told = any(isinstance(value, Tensor) for values in settings for value in values)
            self._settings = [] if told else settings  # a tensor may change as it stands
        self._new = []
        if not moving:
            return True
        return all(self._reads(p, c) for p, c in self._told if self.of_adam or groups[c.group]["momentum"])

    def _fill(self, c: Any, values: tuple[Any, ...]) -> None:
        if self.of_adam:
            lr, decay, betas, eps, decoupled = values
            c.kind, c.lr, c.decay = _ADAMW if decoupled else _ADAM, float(lr), float(decay)
            c.momentum, c.beta2, c.eps = float(betas[0]), float(betas[1]), float(eps)
        else:
            c.kind = _SGD
            c.lr, c.decay, c.momentum, c.dampening, c.nesterov = map(float, values)

    def _reads(self, parameter: Tensor, c: Any) -> bool:
        """Tell C where the state of a parameter is; what the optimizer does not have yet is made."""
        state = self.optimizer.state.get(parameter) or {}
        if self.of_adam:
            members: Any = (state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step"))
            if state and any(member is None for member in members):
                return False
        else:
            members = (state.get("momentum_buffer"),)
        c.fresh = members[0] is None
        if c.fresh:
            new = self._empty(parameter)
            self._new.append((parameter, new))
            members = tuple(new.values())
        kept = self._kept.get(id(parameter))
        if kept is None or any(map(is_not, kept, members)) or c.average != members[0].data_ptr():
            if not all(m.is_cpu and m.is_contiguous() and m.dtype is self.dtype for m in members[:2]):
                return False
            self._kept[id(parameter)] = members
        c.average = members[0].data_ptr()
        if self.of_adam:
            count = members[2]
            c.square, c.count, c.wide_count = members[1].data_ptr(), count.data_ptr(), count.dtype is torch.float64
            return count.is_cpu and count.dtype in (torch.float32, torch.float64)
        return True

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, requires_grad=False)
        if not self.of_adam:
            return {"momentum_buffer": zeros}
        wide = torch.get_default_dtype() is torch.float64 and not self.optimizer.param_groups[0]["fused"]
        step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
        return {"exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros), "step": step}

    def written(self) -> None:
        """Give the optimizer the state that compiled steps began."""
        for parameter, new in self._new:
            order = ("step", "exp_avg", "exp_avg_sq") if self.of_adam else new
            self.optimizer.state[parameter].update({name: new[name] for name in order})
        self._new = []
