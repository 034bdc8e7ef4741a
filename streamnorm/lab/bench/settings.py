"""What can be asked of a benchmark, as a frozen dataclass. Imports the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """Time the layers beside their peers, once they are shown to be right; write a dated record."""

    groups: tuple[str, ...] = ()
    """Groups of cases: contiguous, channels_last, bfloat16, features, single, online, cycle, monitor, convnet,
    recurrent, over_time, growth, compiled, resnet. Default: all but the last two, which take minutes to compile."""
    rounds: int = 15
    """Rounds; in each, everything that is compared is timed once, in random order."""
    threads: int | None = None
    """Threads of torch and of the kernels. Default: torch's."""
    out: Path = Path("benchmarks/results")
    """Folder of the record."""
    allocator: Literal["tuned", "default", "both"] = "both"
    """Time with memory kept by the process (tuned), as it comes (default), or first one and then the other; of the CPU
    alone."""
    device: str = "cpu"
    """cpu, or a device that torch knows, such as cuda or cuda:1."""
    quick: bool = False
    """Tiny inputs and few rounds: shows that everything works, and says nothing about speed."""
    compile: bool = False
    """Also time torch.compile of torch's batch normalization, and the groups compiled and resnet."""
    resume: bool = False
    """Go on with the latest record of this machine, leaving out what it holds."""
