"""``make kill``: commands that write are killed at random moments, and go on to the same end as if nobody had.

    python tests/kill.py --kills 200                 every command in turn
    python tests/kill.py --command learn --seed 7    one history again

A history is one command: begun, killed, begun again, until it comes to its end; then its folder is compared with that
of a run that nobody stopped, byte by byte, as the clock that measures seconds stands still. Signals are SIGKILL, and in
every tenth history SIGTERM or Ctrl-C, early, before the first checkpoint. Each difference is printed with the command
that draws the same moments again; the status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TINY = ["--epochs", "2", "--width", "8", "--train-limit", "256", "--test-limit", "40"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--arm", "streaming", "--monitor", "4", *TINY],
    "batch": ["train", "--arm", "batch", "--batches-per-update", "2", "--samples-per-batch", "16", *TINY],
    "compare": ["compare", "--arms", "layer", "streaming", "--seeds", "0", *TINY],
    "language": ["language", "--arch", "gru", "--hidden", "8", "--epochs", "1", "--limit", "4000", "--steps", "20"],
    "autoencoder": ["autoencoder", "--hidden", "4", "--epochs", "1", "--train-limit", "200", "--vocabulary", "50"],
    "learn": ["learn", "drift", "--limit", "600", "--checkpoint-every", "50"],
    "reproduce": ["reproduce", "online", "--tier", "smoke"],
    "recalibrate": ["recalibrate", "RUN", "--limit", "100"],
}
"""By name; RUN is a finished run of ``batch``."""
MOST = 6
"""Kills of a history."""


def load() -> None:
    """Everything that a command imports, so that a child that is forked begins at once."""
    import streamnorm.lab

    for module in pkgutil.walk_packages(streamnorm.lab.__path__, "streamnorm.lab."):
        importlib.import_module(module.name)
    for name in (
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "rich.progress",
        "safetensors.torch",
        "sklearn.datasets",
    ):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def begin(arguments: list[str], log: Path, often: bool) -> int:
    """The process id of a command in a child of its own; ``often``: with a checkpoint after each step."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        from streamnorm.lab.cli import main
        from streamnorm.lab.runs import keeping

        if often:
            keeping.SECONDS_BETWEEN_CHECKPOINTS = 0.0
        time.perf_counter = lambda: 0.0  # type: ignore[assignment]
        status = main(arguments)
    except KeyboardInterrupt:  # before main sees to it
        status = 130
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float | None) -> int | None:
    """The status of a child; None: it still runs after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        assert end is not None
        if time.monotonic() >= end:
            return None
        time.sleep(min(0.002, max(end - time.monotonic(), 0)))


def content(path: Path, folder: Path) -> bytes:
    """The bytes of a file, without where it lies, and the head of a checkpoint in one order: the format has none."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]
    return data.replace(str(folder).encode(), b"OUT")


def differences(whole: Path, here: Path) -> list[str]:
    """The files in which two folders differ."""
    names = {path.relative_to(of) for of in (whole, here) for path in of.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names):
        one, other = whole / name, here / name
        if not one.exists() or not other.exists():
            found.append(f"{name} is only in {'that of the killed' if other.exists() else 'the uninterrupted one'}")
        elif content(one, whole) != content(other, here):
            found.append(f"{name} differs")
    return found


class Harness:
    """Runs that nobody stopped, with the seconds that they took, and histories beside them."""

    def __init__(self, work: Path) -> None:
        self.work, self.whole, self.seconds = work, dict[str, Path](), dict[str, float]()

    def arguments(self, name: str, out: Path) -> list[str]:
        run = str(self.uninterrupted("batch")) if "RUN" in COMMANDS[name] else ""
        return [run if part == "RUN" else part for part in COMMANDS[name]] + ["--out", str(out)]

    def uninterrupted(self, name: str) -> Path:
        if name not in self.whole:
            arguments = self.arguments(name, self.work / f"{name}-whole")
            started = time.monotonic()
            status = wait(begin(arguments, self.work / f"{name}.log", False), None)
            if status:
                raise SystemExit(
                    f"{shlex.join(arguments)} ends with {status}:\n{(self.work / f'{name}.log').read_text()}"
                )
            self.whole[name], self.seconds[name] = self.work / f"{name}-whole", time.monotonic() - started
        return self.whole[name]

    def history(self, name: str, seed: int) -> tuple[int, list[str]]:
        """How often one was killed, and what went wrong."""
        made = random.Random(f"{name} {seed}")
        whole, out = self.uninterrupted(name), self.work / f"{name}-{seed}"
        log, often, early = self.work / f"{name}-{seed}.log", made.random() < 0.5, seed % 10 == 9
        kills, wrong, left = 0, list[str](), self.seconds[name]
        for attempt in range(MOST + 1):
            child, started = begin(self.arguments(name, out), log, often), time.monotonic()
            moment = made.uniform(0, 0.1 * left if early else left) if attempt < MOST else None
            status = wait(child, moment)
            if status is None:
                how = made.choice((signal.SIGTERM, signal.SIGINT)) if early else signal.SIGKILL
                os.kill(child, how)
                status = wait(child, 120)
                if status is None:
                    os.kill(child, signal.SIGKILL), wait(child, None)
                    wrong.append(f"still runs two minutes after {how.name}")
                    break
                kills += 1
                if status not in (-how, 130, 0):
                    wrong.append(f"{how.name} ends it with {status}")
                left = max(left - (time.monotonic() - started) / 2, 0.1 * self.seconds[name])
            if status == 0:
                if attempt == 0:  # it was too fast to be killed: the machine has less to do
                    self.seconds[name] = time.monotonic() - started
                break
            if status > 0 and status != 130:
                wrong.append(f"status {status}: {log.read_text()[-600:]}")
                break
        else:
            wrong.append("it does not come to its end")
        wrong += [] if wrong else differences(whole, out)
        if not wrong:
            shutil.rmtree(out)
        return kills, wrong


def histories(names: list[str], first: int) -> Iterator[tuple[str, int]]:
    seed = first
    while True:
        for name in names:
            yield name, seed
        seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Commands that are killed at random moments.")
    parser.add_argument("--command", choices=COMMANDS, action="append", help="all by default")
    parser.add_argument("--kills", type=int, default=200, help="how many at least")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one history of each command alone")
    parser.add_argument("--work", type=Path, help="a folder for the runs, which is kept; a temporary one by default")
    asked = parser.parse_args()
    names = asked.command or list(COMMANDS)
    load()
    work = asked.work or Path(tempfile.mkdtemp(prefix="streamnorm-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    harness, failed = Harness(work), 0
    done, kills = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for name, seed in histories(names, asked.first if asked.seed is None else asked.seed):
        if asked.seed is not None and done[name]:
            break
        times, wrong = harness.history(name, seed)
        done[name] += 1
        kills[name] += times
        if wrong:
            failed += 1
            again = shlex.join(["python", "tests/kill.py", "--command", name, "--seed", str(seed)])
            print(f"\n{name}: {'; '.join(wrong)}\nagain: {again}; its folder: {work}/{name}-{seed}", flush=True)
        words = ", ".join(f"{name} {kills[name]}" for name in names)
        print(f"{sum(kills.values())} kills in {sum(done.values())} histories ({failed} wrong): {words}", flush=True)
        if asked.seed is None and sum(kills.values()) >= asked.kills:
            break
    if not failed and asked.work is None:
        shutil.rmtree(work)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
