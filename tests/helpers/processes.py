"""Several processes of a test on one machine, connected by gloo through a file."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = tuple[Any, ...]
"""A function and its arguments after the rank and the number of processes."""


def _each(rank: int, size: int, jobs: dict[str, Job]) -> dict[str, Any]:
    return {name: work(rank, size, *arguments) for name, (work, *arguments) in jobs.items()}


def results_by_job(size: int, jobs: dict[str, Job]) -> dict[str, list[Any]]:
    """What each job returns in each of so many processes, which do them one after the other."""
    by_process = results_of(size, _each, jobs)
    return {name: [found[name] for found in by_process] for name in jobs}


def _one(rank: int, size: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(work(rank, size, *arguments), f"{folder}/{rank}.pt")
    except BaseException as error:
        Path(f"{folder}/{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()


def results_of(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, size, *arguments)`` returns in each of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")  # a process that has imported torch once, and forks
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "streamnorm"])
        started = [
            context.Process(target=_one, args=(rank, size, folder, work, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(90)
        said = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        if said or any(process.exitcode for process in started):
            for process in started:
                process.kill()
            raise AssertionError("\n".join(said) or f"exit codes {[process.exitcode for process in started]}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
