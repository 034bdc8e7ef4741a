"""Statistics and names of torch's layers as ours: what a checkpoint of theirs becomes here. Imports the stream.

Legend: ``s (2, c)``: row 0 the mean, row 1 sigma; ``tables`` and ``counts`` are the two buffers of a memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from streamnorm.definition.layer import Definition
from streamnorm.definition.operation import Standardize
from streamnorm.definition.stats import Lp
from streamnorm.stream import Exponential, LongShort, Memory, Pooled

STATISTICS = "running_mean", "running_var", "num_batches_tracked"
"""The buffers of torch's batch and instance normalization."""
GAINS = "weight", "bias"


def why_not_running(memory: Memory | None, definition: Definition) -> str | None:
    """Why a layer's memory cannot hold a running mean and variance per feature; None: it can."""
    ref, moment, op = definition.ref, definition.moment, definition.op
    if memory is None:
        return "it keeps no statistics"
    if type(memory.rule) not in (Pooled, LongShort, Exponential):
        return f"{memory.rule!r} cannot start from them"
    if ref.features != "own" or ref.place != "all" or not ref.is_built_in:
        return f"they are those of BA1, one mean and variance per feature, and its reference is {ref!r}"
    if type(moment) is not Lp or moment.p != 2 or moment.center == "zero" or type(op) is not Standardize:
        return f"they are the mean and the variance about it, and it divides by another sigma, {moment!r} with {op!r}"
    return None


def is_initial(mean: Tensor, var: Tensor, batches: Tensor | None) -> bool:
    """Whether running statistics are those that torch's layers begin with. Unknown on the meta device: False."""
    if mean.is_meta or (batches is not None and bool(batches != 0)):
        return False
    return not bool(mean.any()) and bool((var == 1).all())


@torch.no_grad()
def remembered(memory: Memory, mean: Tensor, var: Tensor, batches: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``tables`` and ``counts`` of a memory that is full of these statistics: its estimate, and all it remembers, are
    ``s = (mean, sqrt(var + eps))``. Where they are torch's initial ones: of an empty memory."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    tables = mean.new_zeros(len(memory.tables), 2, *mean.shape, dtype=wide)
    counts = torch.zeros(memory.counts.shape, dtype=torch.int64, device=mean.device)
    if is_initial(mean, var, batches):
        tables[:], counts[:] = (value.to(mean.device) for value in _empty(memory, mean.shape))
        return tables, counts
    for name in ("long", "estimate"):
        tables[memory.place(name), 0] = mean
        tables[memory.place(name), 1] = (var.to(wide) + eps).sqrt()
    if batches is not None:
        counts[memory.place("seen")] = batches
    match memory.rule:
        case Pooled() as rule:
            counts[memory.place("held")] = max(1, int(rule.memory))
        case LongShort():
            counts[memory.place("updates")] = 1
        case _:
            counts[memory.place("count")] = counts[memory.place("seen")].clamp_min(1)
    return tables, counts


def _empty(memory: Memory, shape: torch.Size) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        return memory._nothing((2, *shape))


def translate(
    state_dict: dict[str, Any],
    prefix: str,
    own: Collection[str],
    gains: Collection[str],
    memories: tuple[Memory | None, Memory | None],
    definition: Definition,
) -> str | None:
    """Rename in ``state_dict`` what comes from a layer of torch: ``weight`` to ``affine.weight``, running statistics to
    the buffers of H1, and an empty H2.

    Args:
        own: the layer's own names, which are left alone.
        gains: which of ``GAINS`` the layer has.
        memories, definition: of the layer.

    Returns:
        What has no place here, in words; None: nothing.
    """
    missing: list[str] = []
    for name in GAINS:
        key, there = prefix + name, f"{prefix}affine.{name}"
        if key in state_dict and name not in own and there not in state_dict:
            if name in gains:
                state_dict[there] = state_dict.pop(key)
            else:
                missing.append(f"its {name} has no place (there is none here)")
    mean, var, batches = (state_dict.get(prefix + name) for name in STATISTICS)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or "running_mean" in own:
        return "; ".join(missing) or None
    H1, H2 = memories
    reason = why_not_running(H1, definition)
    if H1 is None or reason is not None:
        again = "" if H1 is None else "; streamnorm.recalibrate(model, data) takes them anew"
        missing.append(f"its running statistics have no place: {reason}{again}")
        return "; ".join(missing)
    for name in STATISTICS:
        state_dict.pop(prefix + name, None)
    eps = definition.moment.eps
    found = [("H1", H1, remembered(H1, mean, var, batches, eps))]
    if H2 is not None:
        found.append(("H2", H2, _empty(H2, mean.shape)))
    for which, memory, buffers in found:
        for name, value in zip(memory._names, buffers, strict=True):
            state_dict.setdefault(f"{prefix}{which}.{name}", value.to(mean.device))
    return "; ".join(missing) or None
