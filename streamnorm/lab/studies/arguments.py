"""What every study is started with: its size, its folders, its seeds. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Size = TypeVar("Size")
SEEDS = (0, 1, 2)
SMOKE = "The tier smoke checks that everything works: it trains far too little for its verdicts to mean anything."


@dataclass(frozen=True)
class Arguments:
    """How large a study, where its data lie and where its runs are kept."""

    tier: Literal["smoke", "reduced", "full"] = "reduced"
    """smoke: whether all of it works, with little data that need no files; reduced: what our records were made with;
    full: nearer to the size of the papers."""
    out: Path | None = None
    """Folder of the runs and the record; a stopped study goes on from there. Default: runs/NAME-TIER."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    seeds: tuple[int, ...] | None = None
    """Seeds that every run is trained with. Default: 0 1 2, and 0 to 4 in streams and smallbatch."""
    threads: int | None = None
    """Threads that torch computes with; default: as many as it takes by itself."""
    processes: int = 1
    """Processes that train runs side by side, each with so many threads; streams and smallbatch alone."""

    def __post_init__(self) -> None:
        if self.seeds is not None and not self.seeds:
            raise ValueError("a study needs at least one seed, for instance --seeds 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is a whole number >= 1, got {self.threads}")
        if self.processes < 1:
            raise ValueError(f"processes is a whole number >= 1, got {self.processes}")

    def folder(self, name: str) -> Path:
        """Where the study ``name`` is kept."""
        return self.out or Path("runs") / f"{name}-{self.tier}"

    def seeds_or(self, default: tuple[int, ...] = SEEDS) -> tuple[int, ...]:
        """The seeds that were asked for, or those of the study."""
        return self.seeds or default


def begin(arguments: Arguments, name: str, sizes: Mapping[str, Size], side_by_side: bool = False) -> tuple[Size, Path]:
    """The size that was asked for and the folder to keep the study ``name`` in; torch takes as many threads as it may.
    The smallest size says what it is for.

    Args:
        side_by_side: whether the study can train runs in several processes.

    Raises:
        ValueError: for a tier that the study does not come in, or processes that it does not take.
    """
    import torch

    if arguments.tier not in sizes:
        raise ValueError(f"the study {name} comes in {' and '.join(sizes)}, got --tier {arguments.tier}")
    if arguments.processes > 1 and not side_by_side:
        raise ValueError(f"the study {name} trains one run after another, got --processes {arguments.processes}")
    if arguments.tier == "smoke":
        print(SMOKE)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return sizes[arguments.tier], arguments.folder(name)
