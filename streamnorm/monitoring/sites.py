"""Sites of a monitor: the watched modules, and the distribution of the values seen there.

It samples the same few thousand positions of a tensor each time, and uses no random numbers. Imports the cells and what
stands below them.

Legend: ``c`` features, also called units; ``rows`` are all samples and places of a tensor.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from streamnorm.nn.norm import Norm, norms
from streamnorm.nn.recurrent.cells import Cell
from streamnorm.nn.timespecific import TimeSpecificNorm

Choice = str | nn.Module | type[nn.Module] | Callable[[str, nn.Module], bool]
"""Which modules to watch: by a pattern of names, one module, by class, or by a function."""

PERCENTILES = (15, 50, 85)
"""Those of Ioffe's talk."""
SATURATED = math.log(0.95 / 0.05)
"""Beyond it on either side, a sigmoid is above 0.95 or below 0.05."""
ENOUGH = 16
"""The fewest values of a unit for calling it dead or saturated."""
ROWS = 64
"""Values of a unit that are sampled from a tensor of many units."""
CALLS = 16
"""The most calls of a module kept in a record; of more, every second, every fourth and so on."""
NONLINEARITIES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Softsign),
)
NORMALIZATIONS = (Norm, TimeSpecificNorm, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SEALED = (Norm, TimeSpecificNorm, Cell)
"""A hook inside these would turn off their compiled kernels, which round differently."""


class Site:
    """A watched module, and what was seen of it since the last record."""

    def __init__(self, name: str, module: nn.Module, values: int, axis: int) -> None:
        self.name, self.module, self.values, self.axis = name, module, values, axis
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen: list[Tensor] = []
        self.calls, self._stride = 0, 1

    def listen(self, model: nn.Module) -> RemovableHandle:
        """Register a hook on the module, until the handle is removed."""
        probe = Probe(self, model)
        if isinstance(self.module, NONLINEARITIES):
            return self.module.register_forward_pre_hook(probe, with_kwargs=True)
        return self.module.register_forward_hook(probe, with_kwargs=True)

    @torch.no_grad()
    def take(self, value: Any) -> None:
        """Sample the values of a call of the module."""
        x = next(_tensors(value), None)
        if x is None or not x.is_floating_point() or x.layout != torch.strided:
            kind = type(value).__name__ if x is None else f"a tensor of {x.dtype}, {x.layout}"
            raise TypeError(
                f"{self.name!r} ({type(self.module).__name__}) cannot be watched: its values are no dense floating "
                f"tensor but {kind}; choose other modules by watch="
            )
        if not x.numel():
            return
        if self.calls % self._stride == 0:
            x = x.detach().reshape(1, -1) if x.ndim < 2 else x.detach()
            if not -x.ndim <= self.axis < x.ndim:
                raise ValueError(f"axis={self.axis} is no axis of what {self.name!r} brings, {tuple(x.shape)}")
            self.seen.append(x[_positions(tuple(x.shape), self.axis % x.ndim, self.values, x.device)])
            if len(self.seen) > CALLS:
                self.seen, self._stride = self.seen[::2], 2 * self._stride
        self.calls += 1

    def distribution(self) -> dict[str, Any]:
        """The statistics recorded for all calls together."""
        rows = [part.cpu().double() for part in self.seen]
        width = min(part.shape[1] for part in rows)
        each = torch.cat([part[:, :width] for part in rows])  # if the number of features varies, only common units
        each = each[_spread(max(1, self.values // width), len(each))]
        values = each[each.isfinite()]
        tested = len(each) >= ENOUGH
        return {
            **dict(zip((f"p{p}" for p in PERCENTILES), percentiles(values) or [None] * 3, strict=True)),
            "mean": finite(values.mean()),
            "std": finite(values.std(correction=0)) if len(values) else None,
            "dead": finite((each <= 0).all(0).double().mean()) if tested else None,
            "saturated": finite((each.abs() > SATURATED).all(0).double().mean()) if tested else None,
            "finite": digits(len(values) / each.numel()),
            "calls": self.calls,
        }


class Probe:
    """The hook. In a copy or a pickle of the model it is a no-op."""

    def __init__(self, site: Site | None = None, model: nn.Module | None = None) -> None:
        self.site, self.model = site, model

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if self.site is None or self.model is None or not self.model.training:
            return
        if torch._C._current_graph_task_id() != -1:  # a recomputation by activation checkpointing
            return
        self.site.take(output or (args, kwargs))

    def __reduce__(self) -> tuple[type[Probe], tuple[()]]:
        return Probe, ()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order; also those of a packed sequence."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


@lru_cache(maxsize=256)
def _positions(shape: tuple[int, ...], axis: int, values: int, device: torch.device) -> tuple[Tensor, ...]:
    """The index of at most so many values, ``(rows, units)``: the same units in every row, places and samples mixed."""
    others = [size for d, size in enumerate(shape) if d != axis]
    c, total = shape[axis], math.prod(others)
    rows = _spread(min(values, max(ROWS, values // c)), total)
    at = [place.unsqueeze(1) for place in torch.unravel_index(rows, others)]
    at.insert(axis, _spread(values // len(rows), c).unsqueeze(0))
    return tuple(index.to(device) for index in at)


def _spread(count: int, total: int) -> Tensor:
    """Up to ``count`` of ``total`` positions, in order: all, or spaced by the golden ratio, which has no period in
    common with the side of a map."""
    if count >= total:
        return torch.arange(total, device="cpu")
    turns = torch.arange(count, dtype=torch.float64, device="cpu") * (math.sqrt(5) / 2 - 0.5)
    return (turns.frac() * total).long().unique()


def percentiles(values: Tensor) -> list[float] | None:
    """``PERCENTILES`` of the finite values, linear between the two nearest values; None if there are none."""
    return percentiles_of_rows(values.reshape(1, -1))[0]


def percentiles_of_rows(rows: Tensor) -> list[list[float] | None]:
    """``percentiles`` of each row."""
    rows = rows.detach().cpu().double()
    ordered = rows.sort(dim=1).values  # NaN comes last
    if not ordered.numel() or not bool(ordered[:, [0, -1]].isfinite().all()):
        finite_ones = [row[row.isfinite()].reshape(1, -1) for row in rows]
        return [percentiles_of_rows(row)[0] if row.numel() else None for row in finite_ones]
    last = ordered.shape[1] - 1
    at = [divmod(p * last, 100) for p in PERCENTILES]
    near = ordered[:, [i for low, _ in at for i in (low, min(low + 1, last))]].tolist()
    return [
        [
            digits(low * (1 - part / 100) + high * (part / 100))
            for low, high, (_, part) in zip(row[::2], row[1::2], at, strict=True)
        ]
        for row in near
    ]


def digits(value: float) -> float:
    """Rounded to six digits, which keeps the file small."""
    return float(f"{value:.6g}")


def finite(value: Tensor) -> float | None:
    """The value for JSON; None if it is not finite."""
    found = value.item()
    return digits(found) if math.isfinite(found) else None


# --- which modules ---


def chosen_modules(model: nn.Module, watch: Choice | Iterable[Choice] | None) -> list[tuple[str, nn.Module]]:
    """The modules to watch with their names.

    Raises:
        ValueError: for a choice that matches none.
    """
    known = dict(_candidates(model))
    if watch is None:
        for kinds in (NONLINEARITIES, NORMALIZATIONS):
            if any(isinstance(module, kinds) for module in known.values()):
                return [(name, module) for name, module in known.items() if isinstance(module, kinds)]
        if any(norm.H1 is not None for norm in norms(model)):
            return []  # norms inside cells: their memories are recorded
        raise ValueError(
            f"{type(model).__name__} has no nonlinearities and no normalization layers as modules, which are "
            f"watched by default; choose by watch= from {_shown(known)}"
        )
    one = isinstance(watch, str) or callable(watch) or not isinstance(watch, Iterable)
    choices: list[Any] = [watch] if one else list(watch)  # type: ignore[arg-type]
    wanted: set[str] = set()
    for choice in choices:
        if fits := [name for name, module in known.items() if _fits(choice, name, module)]:
            wanted.update(fits)
            continue
        near = difflib.get_close_matches(choice, known, 1, 0.4) if isinstance(choice, str) else []
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"watch={choice!r} fits no module; {hint}there are {_shown(known)}")
    return [(name, module) for name, module in known.items() if name in wanted]


def _candidates(
    module: nn.Module, prefix: str = "", known: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module except the model itself, containers, and modules inside ``SEALED``."""
    known = {module} if known is None else known
    if isinstance(module, SEALED):
        return
    for name, child in module.named_children():
        if child in known:
            continue
        known.add(child)
        if type(child) not in CONTAINERS:
            yield prefix + name, child
        yield from _candidates(child, f"{prefix}{name}.", known)


def _fits(choice: Choice, name: str, module: nn.Module) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    if isinstance(choice, nn.Module):
        return module is choice
    if isinstance(choice, type):
        return isinstance(module, choice)
    if callable(choice):
        return bool(choice(name, module))
    raise TypeError(f"watch= takes patterns, modules, classes and functions (name, module) -> bool, got {choice!r}")


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (" ..." if names[8:] else "") if names else "none"
