"""Replicas of a layer in several processes: which of them share its statistics, found by itself under
``fully_shard``, and the one collective at a weight update. Imports the stream.

A collective is called by all processes of a group in the same order, so what is sent must not depend on what a process
has seen: every layer that an optimizer updates takes part, with a weight of 0 where it was not called.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.ops.across import why_not
from streamnorm.stream import Memory
from streamnorm.stream.merging import expect_mergeable, receive, sent, settle

Sync = Literal["update", "batch"] | None
AXES = 8
"""Axes of a table that processes can agree on."""
UNKNOWN = -(2**62)
APART = (
    "{size} processes did not come together to merge statistics at a weight update: each has to make every step that "
    "another makes. Decide by the gradients, which are the same in all, and not by the loss, whether a step is left "
    "out; where one runs out of data, name the statistics: with Join([model, streamnorm.synchronize(model)])"
)
COPY = (
    "the copy of a model that several processes train together keeps statistics of its own; if all of them train it "
    "together, wrap it in DistributedDataParallel, or call streamnorm.synchronize(copy) in each, otherwise "
    "streamnorm.synchronize(copy, None)"
)


@dataclass(frozen=True, eq=False)
class Replicas:
    """The processes that share the statistics of a layer.

    A copy of the wrapper shares them as well. A copy of the model in it, and a pickled one, is on its own, as other
    processes may have none: they would be waited for. Without a wrapper, copies share them with the same processes, and
    pickled ones do if these are all.

    Args:
        sync: when they merge: ``"update"``, once a weight update; ``"batch"``, in every batch; None: never.
        group: the process group; None: all.
        wrapper: the ``DistributedDataParallel`` that the layer is in.
        is_copy: whether it is on its own because it is a copy.
    """

    sync: Sync
    group: Any = None
    wrapper: ref[nn.Module] | None = None
    is_copy: bool = False

    def __post_init__(self) -> None:
        if self.sync is not None and self.sync not in get_args(get_args(Sync)[0]):
            raise ValueError(f'sync is "update", "batch" or None, got {self.sync!r}')

    @property
    def size(self) -> int:
        """How many processes; 1 where ``torch.distributed`` is not initialized."""
        return dist.get_world_size(self.group) if has_processes() else 1

    @property
    def merges(self) -> bool:
        """Whether there are several processes that merge once a weight update."""
        return self.sync == "update" and self.size > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        if self.wrapper is None or self.sync is None:
            return self
        copied = memo.get(id(self.wrapper()))
        # torch gives the copy of a wrapper the group of all processes
        return Replicas(None, is_copy=True) if copied is None else Replicas(self.sync, None, ref(copied))

    def __reduce__(self) -> Any:
        if self.is_copy or (self.wrapper is not None and self.sync is not None):
            return Replicas, (None, None, None, True)
        is_of_all = self.group is None or (has_processes() and self.size == dist.get_world_size())
        return (Replicas, (self.sync,)) if is_of_all else (type(None), ())


def expect_shareable(layer: Any, replicas: Replicas) -> None:
    """Raise for a layer whose statistics several processes cannot share in this way.

    Raises:
        NotImplementedError, ValueError: as ``expect_mergeable``.
    """
    if replicas.sync == "batch" and layer.H1 is not None and (reason := why_not(layer.definition)) is not None:
        raise ValueError(
            f"{layer!r} cannot take the batches of several processes together: {reason}; merge statistics once a "
            'weight update: streamnorm.synchronize(model, "update")'
        )
    for memory in memories(layer) if replicas.sync == "update" else ():
        expect_mergeable(memory)


def has_processes() -> bool:
    """Whether ``torch.distributed`` is initialized."""
    return dist.is_available() and dist.is_initialized()


def replicas_of(layer: Any) -> Replicas | None:
    """The replicas of a layer; None: no others were named or found."""
    return _found(layer, next(layer.parameters(), None))


def _found(layer: Any, parameter: Tensor | None) -> Replicas | None:
    """The replicas of a layer, if need be those over which ``fully_shard`` has split the parameter."""
    if layer.replicas is None and (group := _sharing(layer, parameter)) is not None:
        layer.replicas = Replicas("update", group)
    return layer.replicas


def _sharing(layer: nn.Module, parameter: Tensor | None) -> Any:
    """The process group over which ``fully_shard`` has split a parameter; None: it has not."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    if mesh.ndim > 1:
        raise ValueError(
            f"{layer!r} is sharded over a mesh of {mesh.ndim} axes, and which of them split the batch is not known; "
            'name their process group: streamnorm.synchronize(model, "update", group=mesh["dp"].get_group())'
        )
    return mesh.get_group()


def beside(layer: Any, optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters whose optimizer updates a layer that has none itself, where this must not depend on what a process has
    seen: those of its ``DistributedDataParallel``. Under ``fully_shard``, where the graph has other parameters than the
    optimizer, the first that was split."""
    if not has_processes():
        return []
    wrapper = None if layer.replicas is None or layer.replicas.wrapper is None else layer.replicas.wrapper()
    if wrapper is not None:
        return list(wrapper.parameters())
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if first is None or not hasattr(first, "device_mesh"):
        return []
    _found(layer, first)
    return [first]


def memories(layer: Any) -> list[Memory]:
    """H1 and H2 of a layer, those that there are."""
    return [memory for memory in (layer.H1, layer.H2) if memory is not None]


def merge(layers: Iterable[Any], happened: Tensor | bool = True) -> list[tuple[Any, Tensor | bool]]:
    """Merge what the processes have seen of these layers since the latest weight update: one collective for all.

    Returns:
        Each layer, and whether the weight update happened: in any of the processes that share it.

    Raises:
        NotImplementedError, ValueError: for memories that cannot be merged; none has changed then.
        RuntimeError: if the others do something else meanwhile.
    """
    layers = list(layers)
    agreed: dict[int, Tensor | bool] = {}
    sharing: dict[tuple[Any, torch.device], list[Any]] = {}
    for layer in layers if happened is not False and has_processes() else ():
        replicas = replicas_of(layer)
        if replicas is not None and replicas.is_copy and layer.follows.unfolded and dist.get_world_size() > 1:
            warnings.warn(COPY, stacklevel=2)
        if replicas is None or not replicas.merges or not memories(layer):
            continue
        _expect_all_present(replicas)
        for memory in memories(layer):
            expect_mergeable(memory)
        sharing.setdefault((replicas.group, memories(layer)[0].tables.device), []).append(layer)
    for (group, _), members in sharing.items():
        found = {id(memory): memory for layer in members for memory in memories(layer)}
        agreed |= dict.fromkeys(map(id, members), _merge(list(found.values()), group, happened))
    return [(layer, agreed.get(id(layer), happened)) for layer in layers]


def _merge(found: Sequence[Memory], group: Any, happened: Tensor | bool) -> Tensor | bool:
    _agree_on_shapes([memory for memory in found if memory.waits], group)
    rows = [sent(memory) for memory in found]
    steps = happened.double().reshape(1) if isinstance(happened, Tensor) else rows[0].new_ones(1)
    total = torch.cat([*rows, steps])
    _all_reduce(total, dist.ReduceOp.SUM, group)
    happened = total[-1] > 0 if isinstance(happened, Tensor) else happened
    for memory, part in zip(found, total[:-1].split([len(row) for row in rows]), strict=True):
        if memory.shaped:
            receive(memory, part, happened)
    return happened


def _all_reduce(value: Tensor, op: Any, group: Any) -> None:
    try:
        dist.all_reduce(value, op, group=group)
    except RuntimeError as error:
        raise RuntimeError(APART.format(size=dist.get_world_size(group))) from error


def settled(layer: Any, happened: Tensor | bool = True) -> None:
    """A weight update has changed the state of a layer; the processes begin to collect for the next one."""
    for memory in memories(layer) if happened is not False else ():
        settle(memory, happened)


def _agree_on_shapes(found: Sequence[Memory], group: Any) -> None:
    """Give memories whose shape comes from the first input that of the processes that had one."""
    found = [memory for memory in found if not memory.agreed]
    if not found:
        return
    rows = []
    for memory in found:
        shape = list(memory.tables.shape[1:]) if memory.shaped else []
        size = [len(shape), *shape, *[0] * (AXES - len(shape))] if shape else [UNKNOWN] * (AXES + 1)
        rows.append([size, [-n for n in size] if shape else size])
    most = torch.tensor(rows, device=found[0].tables.device)
    _all_reduce(most, dist.ReduceOp.MAX, group)
    for memory, (largest, smallest) in zip(found, most.tolist(), strict=True):
        if largest[0] == UNKNOWN:
            continue
        if largest != [-n for n in smallest]:
            raise ValueError(
                "processes keep statistics of different shapes for one layer, up to "
                f"{tuple(largest[1 : 1 + largest[0]])}; give all maps of one size, or use a reference over all places "
                "(BA1, BA2, SP1, SP2)"
            )
        if not memory.shaped:
            memory._resize(largest[1 : 1 + largest[0]])
        memory.agreed = True


joining: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""For each wrapper what takes the part of processes without data in merging."""


def _expect_all_present(replicas: Replicas) -> None:
    """Raise inside a ``Join`` that does not know of the statistics: processes without data would be waited for."""
    wrapper: Any = None if replicas.wrapper is None else replicas.wrapper()
    if wrapper is None or not wrapper._join_config.enable:
        return
    handle = joining.get(wrapper)
    if handle is None or not handle._join_config.enable:
        raise RuntimeError(
            "a process that has run out of data does not merge statistics by itself; name them to the context: "
            "with Join([model, streamnorm.synchronize(model)])"
        )
