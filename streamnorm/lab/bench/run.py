"""``streamnorm bench``: a process for each way to keep memory, then the record."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import uuid
from datetime import date
from pathlib import Path
from typing import Any

import torch

from streamnorm.lab.bench.case import WrongError
from streamnorm.lab.bench.device import CPU, check_device
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.machine import facts, name
from streamnorm.lab.bench.record import sentences, write_record
from streamnorm.lab.bench.registry import Asked, chosen
from streamnorm.lab.bench.settings import Bench
from streamnorm.lab.bench.worker import INTERRUPTED, RED
from streamnorm.lab.runs.lock import held
from streamnorm.lab.runs.underway import differences

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""With these glibc keeps large blocks in the process. Without, it hands them back at every release, and a new output
costs thousands of page faults, which weigh as much as the layers themselves and vary from run to run."""
QUICK_ROUNDS = 3


def bench(command: Bench) -> tuple[Path, list[str]]:
    """Time what is asked and write the record.

    Returns:
        The path of the record, and a line for each target that it can be judged by.

    Raises:
        ValueError: for wishes that cannot be met, and for a record that is there already.
        WrongError: if a layer does not compute what it should; nothing is timed then.
    """
    check_device(command.device)
    groups, left_out = chosen(command.groups, Asked(command.quick, command.compile, command.device))
    if command.device != CPU and command.allocator != "both":
        raise ValueError(f"--allocator is of the CPU; leave it out with --device {command.device}")
    threads = torch.get_num_threads() if command.threads is None else command.threads
    for what, value in (("rounds", command.rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{what} is a whole number >= 1, got {value}")
    asked = {
        "rounds": min(command.rounds, QUICK_ROUNDS) if command.quick else command.rounds,
        "threads": threads,
        "quick": command.quick,
        "compile": command.compile,
        "device": command.device,
    }
    for line in left_out:
        print(line, file=sys.stderr)
    with held(command.out, "a benchmark"):
        journal = Journal(_path(command))
        _begin(journal, asked, command.resume)
        wishes = {**asked, "groups": groups, "journal": str(journal.path), "command": uuid.uuid4().hex}
        both = ("tuned", "default") if command.device == CPU else ("tuned",)  # torch keeps the memory of a device
        for allocator in both if command.allocator == "both" else (command.allocator,):
            _work({**wishes, "allocator": allocator}, threads)
        return write_record(journal), sentences(journal)


def _path(command: Bench) -> Path:
    """Of the journal: today's, or the latest one that is to be gone on with."""
    machine = name(command.device)
    there = sorted(command.out.glob(f"????-??-??-{machine}.jsonl")) if command.resume else []
    return there[-1] if there else command.out / f"{date.today().isoformat()}-{machine}.jsonl"


def _begin(journal: Journal, asked: dict[str, Any], resume: bool) -> None:
    if not journal.path.is_file():
        journal.start(asked, {**facts(asked["device"]), "command": shlex.join(["streamnorm", *sys.argv[1:]])})
        return
    if not resume:
        raise ValueError(f"{journal.path} is there already; --resume goes on with it, or give another --out")
    before, there = journal.head()
    now = {**facts(asked["device"]), "command": there.get("command")}
    if differing := differences({"device": CPU, **before, **there}, {**asked, **now}):
        raise ValueError(f"{journal.path} was measured otherwise: {differing}; give the same, or another --out")


def _work(wishes: dict[str, Any], threads: int) -> None:
    """Start the process that times."""
    kept = {variable: value for variable, value in os.environ.items() if variable not in TUNED}
    environment = {**kept, "OMP_NUM_THREADS": str(threads), **(TUNED if wishes["allocator"] == "tuned" else {})}
    process = subprocess.run([sys.executable, "-m", "streamnorm.lab.bench.worker", json.dumps(wishes)], env=environment)
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode == RED:
        raise WrongError("the layers named above do not compute what they should; nothing was timed")
    if process.returncode:
        raise ValueError(f"the timing process ended with status {process.returncode}; --resume goes on from there")
