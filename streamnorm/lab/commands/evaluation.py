"""The command that tests whatever was trained. Needs the extra ``cli``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Evaluate:
    """Test a trained network."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made, or its checkpoint file."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    lengths: tuple[int, ...] = ()
    """Of a language model: test it on sequences of so many time steps too, each from a state of 0."""
    loops: tuple[int, ...] = ()
    """Of architecture C or D: test it with so many loops too (k1 and k2, or k), in the place of those it was trained
    with."""


def evaluate_one(command: Evaluate) -> None:
    """Test the network of a checkpoint, and in the other ways that were asked for."""
    from streamnorm.lab.runs.keeping import state_at
    from streamnorm.lab.runs.reopen import KINDS, kind_at, reopen

    state = state_at(command.folder)
    held = kind_at(command.folder, state)
    flags = {"lengths": command.lengths, "loops": command.loops}
    asked = {flag: values for flag, values in flags.items() if values}
    if not asked.keys() <= KINDS[held].others:
        missing = " and no ".join(f"--{flag}" for flag in flags if flag not in KINDS[held].others)
        raise ValueError(f"{command.folder} holds {held}, which has no {missing}; leave that out")
    run = reopen(command.folder, state, command.data_root)
    others = [line for flag, values in asked.items() for line in run.others[flag](values)]
    print(f"{run.label} on {run.setting}, after {state['done']} of {run.updates} updates: {run.test()}")
    print(*others, sep="\n", end="\n" if others else "")
