"""``make fuzz``: random histories of layers and of recurrent networks against the oracle, for a given time.

    python tests/fuzz.py --seconds 600               both kinds, on all cores
    python tests/fuzz.py --kind layers --seed 1234   one history again, with everything that led to a difference

Each difference is printed with the command that reproduces it; the status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

KINDS = ("layers", "recurrent")
TOGETHER = {"layers": 50, "recurrent": 20}
"""Histories that a process is given at a time."""


def one(kind: str, seed: int) -> str | None:
    """A history: what differed, or None."""
    from histories import DifferenceError, History, follow
    from recurrent_histories import RecurrentHistory

    try:
        follow(History if kind == "layers" else RecurrentHistory, seed)
    except DifferenceError as difference:
        return str(difference)
    return None


def some(kind: str, seeds: range) -> list[tuple[int, str]]:
    """Those of ``seeds`` that differ."""
    import torch

    torch.set_num_threads(1)
    return [(seed, what) for seed in seeds if (what := one(kind, seed)) is not None]


def tasks(kinds: list[str], first: int) -> Iterator[tuple[str, range]]:
    """Without end, the kinds in turn."""
    next_seed = dict.fromkeys(kinds, first)
    while True:
        for kind in kinds:
            begin = next_seed[kind]
            next_seed[kind] += TOGETHER[kind]
            yield kind, range(begin, next_seed[kind])


def main() -> int:
    parser = argparse.ArgumentParser(description="Random histories against the oracle.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="layers or recurrent; both by default")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to go on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one history alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    kinds: list[str] = asked.kind or list(KINDS)
    if asked.seed is not None:
        found = [(kind, what) for kind in kinds if (what := one(kind, asked.seed)) is not None]
        for kind, what in found:
            print(f"{kind}: {what}")
        return int(bool(found))
    done, differ, begun = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0), time.monotonic()
    with ProcessPoolExecutor(asked.processes) as pool:
        more, running = tasks(kinds, asked.first), []
        while running or time.monotonic() - begun < asked.seconds:
            while len(running) < 2 * asked.processes and time.monotonic() - begun < asked.seconds:
                kind, seeds = next(more)
                running.append((kind, seeds, pool.submit(some, kind, seeds)))
            kind, seeds, result = running.pop(0)
            for seed, what in result.result():
                differ[kind] += 1
                command = ["python", "tests/fuzz.py", "--kind", kind, "--seed", str(seed)]
                print(f"\n{what}\nagain: {shlex.join(command)}")
            done[kind] += len(seeds)
            words = ", ".join(f"{done[kind]:,} {kind} ({differ[kind]} differ)" for kind in kinds)
            print(f"\r{time.monotonic() - begun:6.0f} s: {words}", end="", flush=True)
    print()
    return int(any(differ.values()))


if __name__ == "__main__":
    sys.exit(main())
