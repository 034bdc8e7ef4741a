"""Work on many items in several processes, or one after another in this one. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], processes: int = 1, threads: int | None = None
) -> Iterator[Result]:
    """``work(item)`` for every item, as each is done: in order with one process. ``work`` is a function of a module.

    Args:
        threads: that torch computes with in each of several processes.
    """
    if processes == 1:
        yield from map(work, items)
        return
    # A new process each: one that is forked after torch has started its threads may hang.
    with ProcessPoolExecutor(processes, get_context("spawn"), _limit, (threads,)) as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for one in waiting:
                one.cancel()


def each_once(
    work: Callable[[Item], dict[str, Any]],
    items: Iterable[Item],
    kept: Callable[[Item], dict[str, Any] | None],
    told: Callable[[dict[str, Any]], str],
    processes: int = 1,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """The records of all items by label, in order; ``work``, which keeps what it makes, does those that are not kept.

    Args:
        kept: the record of an item that is done.
        told: what is said of a record beside its label and its seed.
    """
    items = list(items)
    missing = [item for item in items if kept(item) is None]
    for i, record in enumerate(side_by_side(work, missing, processes, threads), 1):
        say(f"{i} of {len(missing)}: {record['label']}, seed {record['seed']}: {told(record)}")
    records: dict[str, list[dict[str, Any]]] = {}
    for record in map(kept, items):
        assert record is not None
        records.setdefault(record["label"], []).append(record)
    return records


def _limit(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
