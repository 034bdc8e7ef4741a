"""``make soak``: long streams, some of whose samples are not finite: flat memory, flat time a step, right statistics.

    python tests/soak.py --online 10000000 --loop 1000000 --learn 1000000

Samples are 1,000 sigmas away from 0, and one in 100,000 is not finite. ``online`` is OnlineTrainer, ``loop`` an
ordinary loop, ``learn`` the learner behind the command. Each part is compared at its start and its end: the median time
a step, the resident memory; and the statistics of the first norm with those of the same rule in float64. The status is
1 if memory grew by more than 5 % or 20 MB, a step by more than 10 %, the mean is off by 1e-3 of a sigma or sigma by
1e-4 of itself.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.stream import Memory, Pooled

FEATURES, CLASSES, OFFSET, RARE, MANY = 16, 3, 1000.0, 100_000, 1000
"""MANY samples are made, timed and compared at a time."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def chunks(samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The stream, always the same."""
    made = torch.Generator().manual_seed(0)
    for start in range(0, samples, MANY):
        x = torch.randn(MANY, FEATURES, generator=made) + OFFSET
        if start % RARE == 0:
            x[MANY // 2, start // RARE % FEATURES] = (math.nan, math.inf, -math.inf)[start // RARE % 3]
        yield x, torch.randint(CLASSES, (MANY,), generator=made)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = [sn.StreamingNorm(n, affine=False) for n in (FEATURES, 32)]
    return nn.Sequential(norms[0], nn.Linear(FEATURES, 32, bias=False), norms[1], nn.ReLU(), nn.Linear(32, CLASSES))


class Reference:
    """The statistics of a norm of the input in float64: samples that are not finite change nothing."""

    def __init__(self) -> None:
        self.memory = Memory(Pooled(), (2, FEATURES)).double()
        self.eps = 1e-5

    def follow(self, x: Tensor) -> None:
        for row in x.double():
            if not row.isfinite().all():
                continue
            mu = self.memory.peek_mean(row.unsqueeze(0), None)[0]
            self.memory.take(torch.stack([row, ((row - mu).square() + self.eps).sqrt()]).unsqueeze(0), None)
            self.memory.fold()


def judged(name: str, samples: int, times: list[float], memory: list[int], off: tuple[float, float] | None) -> bool:
    """Print a line on a part; whether it is as it has to be."""
    part = max(len(times) // 10, 1)
    first, last = statistics.median(times[:part]), statistics.median(times[-part:])
    grown = memory[-1] - memory[0]
    fine = grown < max(0.05 * memory[0], 20 << 20) and last < 1.1 * first
    words = f"{name}: {samples:,} samples, {1e6 * first / MANY:.1f} us a step at first and {1e6 * last / MANY:.1f} at "
    words += f"the end (ratio {last / first:.3f}), {memory[0] >> 20} MB at first and {memory[-1] >> 20} at the end"
    if off is not None:
        fine = fine and off[0] < 1e-3 and off[1] < 1e-4
        words += f", mean off by {off[0]:.1e} sigma, sigma by {off[1]:.1e}"
    print(words + ("" if fine else "  <- not as it has to be"), flush=True)
    return fine


def difference(norm: nn.Module, samples: int) -> tuple[float, float]:
    """How far a norm's statistics are from the reference of the last samples, which all that is remembered lies in."""
    reference, held = Reference(), -(-2_000 // MANY)
    whole = samples // MANY
    for number, (x, _) in enumerate(chunks(samples)):
        if number >= whole - held:
            reference.follow(x)
    want, got = reference.memory.estimate, norm.H1.estimate.double()  # type: ignore[union-attr]
    return (got[0] - want[0]).abs().max().item(), (got[1] / want[1] - 1).abs().max().item()


def timed(samples: int, step: Callable[[Tensor, Tensor], object]) -> tuple[list[float], list[int]]:
    """Seconds of each chunk, and memory after each but the first few, in which caches fill."""
    times, memory = [], []
    for number, (x, y) in enumerate(chunks(samples)):
        start = time.perf_counter()
        step(x, y)
        times.append(time.perf_counter() - start)
        if number >= min(10, samples // MANY // 2):
            memory.append(resident())
    return times[1:] or times, memory


def online(samples: int) -> bool:
    model = network()
    trainer = sn.OnlineTrainer(model, torch.optim.SGD(model.parameters(), lr=0.001))
    times, memory = timed(samples, trainer.steps)
    assert trainer.skipped == -(-samples // RARE), trainer.skipped
    return judged("online", samples, times, memory, difference(model[0], samples))


def loop(samples: int) -> bool:
    from streamnorm.train.stepping import Loop

    model = network()
    follower = Loop(model, torch.optim.SGD(model.parameters(), lr=0.001), nn.functional.cross_entropy)
    times, memory = timed(samples, follower.steps)
    assert follower.skipped == -(-samples // RARE), follower.skipped
    return judged("loop", samples, times, memory, difference(model[0], samples))


def learn(samples: int) -> bool:
    from streamnorm.lab.learning.session import Job, session
    from streamnorm.lab.learning.settings import Settings

    class Rows(io.RawIOBase):
        """The stream as CSV, made as it is read."""

        def __init__(self) -> None:
            self.more, self.held = (
                chunks(samples),
                ",".join([*(f"x{i}" for i in range(FEATURES)), "y"]).encode() + b"\n",
            )

        def readable(self) -> bool:
            return True

        def readinto(self, into: bytearray) -> int:  # type: ignore[override]
            if not self.held and (found := next(self.more, None)) is not None:
                lines = zip(found[0].tolist(), found[1].tolist(), strict=True)
                self.held = "".join(",".join(map(repr, x)) + f",c{y}\n" for x, y in lines).encode()
            taken, self.held = self.held[: len(into)], self.held[len(into) :]
            into[: len(taken)] = taken
            return len(taken)

    times, memory, at = [], [], [time.perf_counter(), 0]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(name="rows", format="csv", target="y", arms=("streaming",), settings=Settings())
        with session(job, Path(folder) / "out", io.BufferedReader(Rows()), lambda _: None) as made:

            def watch() -> None:
                if made.learner.rows - at[1] >= MANY:
                    now = time.perf_counter()
                    times.append((now - at[0]) / (made.learner.rows - at[1]) * MANY)
                    at[:] = now, made.learner.rows
                    memory.append(resident())

            made.run(watch)
    return judged("learn", samples, times[1:], memory[min(10, len(memory) // 2) :], None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Long streams.")
    parser.add_argument("--online", type=int, default=10_000_000)
    parser.add_argument("--loop", type=int, default=1_000_000)
    parser.add_argument("--learn", type=int, default=1_000_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = {online: asked.online, loop: asked.loop, learn: asked.learn}
    failed = [part for part, samples in parts.items() if samples and not part(samples)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
