"""The state postproc: layers pass their inputs to estimators, while nothing is learned and outputs are ignored.

A layer is in one of three states ("Batch Normalization: The Untold Story"): ``train``; ``postproc``, where statistics
are accumulated; ``test``, where they are fixed. This module implements postproc for our layers and torch's. Imports the
layers and what stands below them.

Legend: a table is ``(2, ...)``, row 0 the mean, row 1 sigma; a site is one set of statistics that testing uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from streamnorm.calibration.estimators import Estimator, Mean, Pooled
from streamnorm.definition.ref import BA1, NormRef
from streamnorm.definition.stats import Lp
from streamnorm.nn.norm import Norm
from streamnorm.nn.timespecific import TimeSpecificNorm

State = Literal["train", "postproc", "test"]


# --- one set of statistics ---


class Site(ABC):
    """One set of statistics that testing uses: where it is stored, and its definition."""

    ref: NormRef
    moment: Lp
    unbiased: bool
    streams: bool

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def view(self, x: Tensor) -> Tensor:
        """The canonical view of an input, after checking it."""

    @abstractmethod
    def stored(self) -> Tensor | None:
        """The table that testing uses, in float64; None before there is one."""

    @abstractmethod
    def store(self, table: Tensor, arrivals: int | None = None) -> None:
        """Make testing use this table, of ``arrivals`` mini-batches; None: temporarily."""

    @abstractmethod
    def snapshot(self) -> Any:
        """A copy of the statistics, for ``put_back``."""

    @abstractmethod
    def put_back(self, snapshot: Any) -> None:
        """Restore a snapshot."""


class NormSite(Site):
    """H1 of a layer of ours."""

    unbiased = False

    def __init__(self, name: str, norm: Norm) -> None:
        super().__init__(name)
        assert norm.H1 is not None
        self.norm, self.memory = norm, norm.H1
        self.ref, self.moment, self.streams = norm.ref, norm.moment, norm.policy.uses_estimate

    def view(self, x: Tensor) -> Tensor:
        return self.norm._view(x, steps=1)

    def stored(self) -> Tensor | None:
        return self.memory.estimate.double() if self.memory.known else None

    def store(self, table: Tensor, arrivals: int | None = None) -> None:
        memory = self.memory
        memory.fit(table[None])
        table = table.to(memory.estimate.dtype)
        memory.estimate = table
        memory.seen.clamp_(min=1)
        if arrivals is not None and not self.streams:
            # Only testing reads this memory: training continues from here as if the data had been its first arrival.
            memory.restart(table)

    def snapshot(self) -> Any:
        return self.memory.snapshot()

    def put_back(self, snapshot: Any) -> None:
        self.memory.put_back(snapshot)


class TorchSite(Site):
    """The running statistics of torch's batch normalization."""

    unbiased, streams = True, False
    ref = BA1
    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, name: str, norm: _BatchNorm) -> None:
        super().__init__(name)
        if norm.running_mean is None or norm.running_var is None or is_lazy(norm.running_mean):
            raise ValueError(
                f"{name}: {norm!r} has no running statistics to recalibrate; make it with track_running_stats=True, "
                "or run a batch through a lazy layer first"
            )
        self.norm, self.moment = norm, Lp(2, "batch", norm.eps)

    def view(self, x: Tensor) -> Tensor:
        self.norm._check_input_dim(x)
        return BA1.view(x)

    def stored(self) -> Tensor | None:
        norm = self.norm
        return torch.stack([norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()])  # type: ignore[union-attr]

    def store(self, table: Tensor, arrivals: int | None = None) -> None:
        norm = self.norm
        norm.running_mean.copy_(table[0])  # type: ignore[union-attr]
        norm.running_var.copy_((table[1] ** 2 - norm.eps).clamp_min(0))  # type: ignore[union-attr]
        if arrivals is not None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(arrivals)

    def snapshot(self) -> Any:
        return {name: buffer.clone() for name in self.NAMES if (buffer := getattr(self.norm, name)) is not None}

    def put_back(self, snapshot: Any) -> None:
        for name, value in snapshot.items():
            getattr(self.norm, name).copy_(value)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module, and its sites: one, or one for each time step."""

    module: nn.Module
    sites: list[Site]

    def at(self, t: int) -> Site:
        """The site that testing uses at time step t; beyond the last one with statistics, that one."""
        t = min(t, len(self.sites) - 1)
        while t and self.sites[t].stored() is None:
            t -= 1
        return self.sites[t]


def layers(model: nn.Module) -> list[Layer]:
    """Every layer of ``model`` that keeps statistics for testing.

    Raises:
        ValueError: if there is none, or if one of torch's keeps no running statistics.
    """
    found: list[Layer] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, TimeSpecificNorm):
            inside |= set(module.times)
            found.append(Layer(module, [NormSite(f"{name}.times.{t}", one) for t, one in enumerate(module.times)]))  # type: ignore[arg-type]
        elif isinstance(module, Norm) and module.H1 is not None:
            found.append(Layer(module, [NormSite(name, module)]))
        elif isinstance(module, _BatchNorm):
            found.append(Layer(module, [TorchSite(name, module)]))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer that keeps statistics for testing: no BatchNorm, StreamingNorm or "
            "batch normalization of torch's; layer and sample normalizations need no recalibration"
        )
    return found


# --- the state postproc ---


class Told:
    """The results of a pass through the data.

    Attributes:
        batches: number of batches.
        sites: the estimator of every site that was called, in the order of their first calls.
        behind: for each site those called before it in the same batch, including itself if it was.
        first: for the sites that a batch calls first, an estimator of these calls alone.
        rounding: relative rounding error of the inputs of each site.
        finite: whether the statistics of each call in the current batch are finite.
    """

    def __init__(self, make: Callable[[Site], Estimator]) -> None:
        self.make = make
        self.batches = 0
        self.sites: dict[Site, Estimator] = {}
        self.behind: dict[Site, set[Site]] = {}
        self.first: dict[Site, Estimator] = {}
        self.rounding: dict[Site, float] = {}
        self.finite: list[tuple[Site, Tensor]] = []
        self._called: set[Site] = set()
        self._was_empty = False

    def begin(self, batch: int) -> None:
        """Begin a batch; ``batch`` counts from 1."""
        self.batches = batch
        self.finite.clear()
        self._called.clear()

    def add(self, site: Site, x: Tensor) -> Tensor | None:
        """Add the input of a site, and return its own s, a table; None for an empty input."""
        if not x.numel():
            self._was_empty = True
            return None
        view = site.view(x).double()
        if site not in self.sites:
            self.sites[site], self.behind[site], self.rounding[site] = self.make(site), set(), 0.0
        if not self._called:
            self.first.setdefault(site, _plain(site)).add(view)
        table = self.sites[site].add(view)
        self.behind[site] |= self._called
        self._called.add(site)
        self.rounding[site] = max(self.rounding[site], torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
        self.finite.append((site, table.isfinite().all()))
        return table

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer's statistics affect its own input at a later call."""
        try:
            TopologicalSorter(self.behind).prepare()
        except CycleError:
            return True
        return False

    def expect_something(self) -> None:
        """Raise a ValueError if there were no data, or none for a layer."""
        if not self.batches:
            raise ValueError(
                "the data yield no batches; an iterator that was used before is empty: give a list or a loader"
            )
        if not self.sites and self._was_empty:
            raise ValueError(
                f"the data yield only empty batches, {self.batches} of them; give some with samples in them"
            )
        if not self.sites:
            raise ValueError(f"{self.batches} batches, and no layer that keeps statistics was called")


def _plain(site: Site) -> Estimator:
    """An estimator that is independent of the order of the data and the batching."""
    kind = Mean if site.ref.samples == "one" else Pooled
    return kind(site.ref, Lp(2, "batch", getattr(site.moment, "eps", 0.0)))


class Gather:
    """The hook of a layer in the state postproc: it records the input before the layer normalizes.

    Args:
        fixed: the sites that normalize with their stored table. Others normalize a mini-batch with its own statistics,
            or, if it holds a single activation, with the stored table.
        told: records the inputs of all layers.
    """

    def __init__(self, layer: Layer, fixed: Container[Site], told: Told) -> None:
        self.layer, self.fixed, self.told = layer, fixed, told

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *rest = (*args, *kwargs.values())
        site = self.layer.at(rest[0] if rest else 0)
        table = self.told.add(site, x)
        if table is None or site in self.fixed:
            return
        if site.ref.size(site.view(x).shape) > 1:
            site.store(table)
        elif site.stored() is None:
            site.store(torch.stack([torch.zeros_like(table[0]), torch.ones_like(table[1])]))


def state(layer: nn.Module) -> State:
    """The state of a layer: training, accumulating statistics inside ``recalibrate`` or ``gap``, or testing.

    >>> state(nn.BatchNorm1d(3))
    'train'
    """
    if any(isinstance(hook, Gather) for hook in layer._forward_pre_hooks.values()):
        return "postproc"
    return "train" if layer.training else "test"


@contextmanager
def _postproc(model: nn.Module, gathers: list[Gather]) -> Iterator[None]:
    """Inside, the layers are in the state postproc and everything else is in eval mode; restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        # Set the flags directly: a user's own train() and eval() may do more, which could not be undone.
        for module, _ in modes:
            module.training = False
        for gather in gathers:
            hooks.append(gather.layer.module.register_forward_pre_hook(gather, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def once_through(
    model: nn.Module,
    data: Iterable[Any],
    found: list[Layer],
    make: Callable[[Site], Estimator],
    fixed: Container[Site],
    call: Callable[[nn.Module, Any], Any],
    show: Callable[[int], None],
) -> Told:
    """One pass through the data, with all layers in the state postproc.

    Args:
        make: makes the estimator of a site.
        fixed: the sites that normalize with their stored table; others normalize a mini-batch with its own statistics.
        call: runs the model on a batch.
        show: called with the number of batches so far.

    Raises:
        ValueError: for no data, and for statistics that are not finite.
    """
    told = Told(make)
    with _postproc(model, [Gather(layer, fixed, told) for layer in found]):
        for number, batch in enumerate(data, 1):
            told.begin(number)
            with torch.no_grad():
                call(model, batch)
            if bad := next((site.name for site, is_finite in told.finite if not is_finite), None):
                raise ValueError(
                    f"batch {number} (counted from 1) has statistics that are not finite, first in layer {bad!r}; "
                    "look at that batch with torch.isfinite, or leave it out"
                )
            show(number)
    told.expect_something()
    return told
