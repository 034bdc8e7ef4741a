"""Where layers are timed: on the CPU, or on a device that torch calls CUDA.

Imports torch alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

CPU = "cpu"


def there() -> list[str]:
    """The names of all devices of this machine that layers can be timed on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [CPU, *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]


def check_device(name: str) -> None:
    """Raises:
    ValueError: for a device that is not there.
    """
    if name not in there():
        raise ValueError(
            f"there is no device {name!r} for torch {torch.__version__} on this machine; --device takes "
            f"{', '.join(there())}"
        )


def waiting(device: str) -> Callable[[], None]:
    """A call that returns when the device has done all that it was given; a CPU has when it returns."""
    return (lambda: None) if device == CPU else partial(torch.cuda.synchronize, device)


def free_memory(device: str) -> int:
    """Bytes that can be had without pushing anything out; 4 GB where the system does not tell."""
    if device != CPU:
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30


def peak(step: Callable[[], object], device: str) -> int:
    """The most bytes that tensors hold at a time during a step, beyond those that they held before.

    On the CPU too it is what torch's allocator was asked for, to the byte and the same in every run. The resident size
    of a process would count what glibc keeps, which depends on its settings and on the threads, and what torch's
    libraries keep for themselves; these differ by more than layers do. Of two steps, since a step may free what the
    one before has left. ``step`` was called before, and gradients were dropped.
    """
    if device != CPU:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
