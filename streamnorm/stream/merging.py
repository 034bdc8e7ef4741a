"""What several processes make of their memories at a weight update: the members that arrivals change become those of
all arrivals. Imports the memory.

All processes begin an update at one state. Each sends the sums of what it has seen since; of the total all make the
same state again::

    table     <- sum_r w_r table_r / sum_r w_r          w_r: what process r has seen, by the rule's ``weighs_by``
    counter   <- before + sum_r (counter_r - before)

The numbers travel in float64: counters are exact up to 2^53, and products with a weight do not overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamnorm.stream.memory import Memory
from streamnorm.stream.rule import Remembering

ALONE = "to leave each process with its own statistics: streamnorm.synchronize(model, None)"
"""What to do about memories that cannot be merged."""


def expect_mergeable(memory: Memory) -> None:
    """Raise for a memory that several processes cannot merge.

    Raises:
        NotImplementedError: for a rule that does not say what it ``collects``.
        ValueError: for statistics per time step whose number grows in training.
    """
    rule = memory.rule
    if rule.collects is None:
        raise NotImplementedError(
            f"{type(rule).__name__} does not say how several processes merge it: define its collects and weighs_by, "
            f"or, {ALONE}"
        )
    timed = getattr(getattr(memory, "_row", None), "of", None)
    if timed is not None and not timed.fixed:
        raise ValueError(
            "statistics per time step whose number grows with the sequences cannot be merged by several processes; "
            f"write TimeSpecific(norm, steps=n), or, {ALONE}"
        )


def _collected(memory: Memory) -> tuple[list[int], list[str]]:
    """The indices of the counters and the names of the tables that a process sends; the weight is the first counter."""
    rule = memory.rule
    assert rule.collects is not None
    counters = dict.fromkeys((rule.weighs_by, *(n for n in rule.collects if n in memory._places), "seen", "skipped"))
    tables = [name for name in rule.collects if name in memory._rows]
    if type(rule).settled is Remembering.settled:
        tables.append("estimate")
    return [memory.place(name) for name in counters], tables


def sent(memory: Memory) -> Tensor:
    """What this process has seen since the latest merge: weight, counters and weighted tables in one row."""
    places, tables = _collected(memory)
    since = (memory.counts - memory.before())[places].double()
    return torch.cat([since, *(since[0] * memory._member(name).double().flatten() for name in tables)])


@torch.no_grad()
def receive(memory: Memory, total: Tensor, happened: Tensor | bool) -> None:
    """Take the ``total`` of what all processes have ``sent``, if the weight update ``happened``: true, or a tensor."""
    places, tables = _collected(memory)
    rule, state = memory.rule, memory.state()
    since, *parts = total.split([len(places), *[memory.estimate.numel()] * len(tables)])
    seen = since[0] > 0
    takes = seen if happened is True else seen & happened
    means = {
        name: (part / since[0].clamp_min(1)).reshape(memory.estimate.shape).to(memory.estimate.dtype)
        for name, part in zip(tables, parts, strict=True)
    }
    counts = memory.counts.clone()
    counts[places] = memory.before()[places] + since.long()
    at = {name: counts[place] for name, place in memory._places.items()}
    new = rule.collected({name: means.get(name, at.get(name, value)) for name, value in state.items()})
    latest = means["estimate"] if "estimate" in means else rule.settled(new)
    assert latest is not None
    estimate = rule.for_testing(new, latest)
    fits = takes & estimate.isfinite().all()
    memory.estimate.copy_(torch.where(fits, estimate, memory.estimate))
    for name, value in state.items():
        if value.ndim:
            value.copy_(torch.where(takes, new[name], value))
    memory.counts.copy_(torch.where(happened, counts, memory.counts) if isinstance(happened, Tensor) else counts)


@torch.no_grad()
def settle(memory: Memory, happened: Tensor | bool) -> None:
    """Begin to collect for the next weight update."""
    counts = memory.counts.clone()
    memory.merged = torch.where(happened, counts, memory.before()) if isinstance(happened, Tensor) else counts
