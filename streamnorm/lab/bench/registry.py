"""The registry: every group of cases by name. A new operation is a line here and a function that yields its cases."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from streamnorm.lab.bench import compiled, layers, networks, resnet, sequences
from streamnorm.lab.bench.case import Case
from streamnorm.lab.bench.device import CPU


@dataclass(frozen=True)
class Asked:
    """What cases are made for.

    Attributes:
        quick: tiny inputs only.
        compiled: with compiled peers.
        device: where they are.
    """

    quick: bool = False
    compiled: bool = False
    device: str = CPU


@dataclass(frozen=True)
class Group:
    """Cases that make a table and a picture.

    Attributes:
        title: of both.
        cases: yields them.
        anywhere: whether they are for other devices than a CPU too.
        compiles: whether they take minutes to compile, so that they are left out unless they are asked for.
    """

    title: str
    cases: Callable[[Asked], Iterator[Case]]
    anywhere: bool = True
    compiles: bool = False


GROUPS = {
    "contiguous": Group(
        "Feature maps in float32",
        lambda a: layers.maps("contiguous", "contiguous", a.quick, a.compiled, a.device),
    ),
    "channels_last": Group(
        "Feature maps in float32, channels last",
        lambda a: layers.maps("channels_last", "channels_last", a.quick, a.compiled, a.device),
    ),
    "bfloat16": Group("Feature maps in bfloat16", lambda a: layers.narrow(a.quick, a.device)),
    "features": Group("Features without a map", lambda a: layers.features(a.quick, a.device)),
    "single": Group("One sample", lambda a: layers.single(a.quick, a.device)),
    "online": Group("Training on one sample at a time", lambda a: networks.online(a.quick), anywhere=False),
    "cycle": Group("Cycles of mini-batches of one sample", lambda a: networks.cycle(a.quick), anywhere=False),
    "monitor": Group("Training with a monitor", lambda a: networks.watched(a.quick), anywhere=False),
    "convnet": Group("A convolutional network", lambda a: networks.convnet(a.quick, a.device)),
    "recurrent": Group("Recurrent layers", lambda a: sequences.recurrent(a.quick, a.device)),
    "over_time": Group("Recurrent layers, growth", lambda a: sequences.over_time(a.quick, a.device)),
    "growth": Group("Growth", lambda a: layers.growth(a.quick, a.device)),
    "compiled": Group("Compiled networks", lambda a: compiled.networks(a.quick, a.device), compiles=True),
    "resnet": Group("A training step of a ResNet-18", lambda a: resnet.steps(a.quick, a.device), compiles=True),
}


def check_names(names: Iterable[str]) -> None:
    """Raises:
    ValueError: for a group that is none.
    """
    for name in names:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown group {name!r}; {hint}the groups are {', '.join(GROUPS)}")


def chosen(names: Sequence[str], asked: Asked) -> tuple[list[str], list[str]]:
    """The groups to time, of those named or, if none is, of all; and a line for each reason to leave some out.

    Raises:
        ValueError: for a group that is none, and if none is left.
    """
    check_names(names)
    wanted = list(names) or [name for name, group in GROUPS.items() if asked.compiled or not group.compiles]
    slow = [name for name in GROUPS if name not in wanted] if not names else []
    still = [name for name in wanted if asked.device != CPU and not GROUPS[name].anywhere]
    lines = [f"left out, of the CPU alone: {', '.join(still)}"] if still else []
    if still == wanted:
        raise ValueError(f"nothing is left to time on {asked.device}; {lines[0]}")
    lines += [f"left out, takes minutes to compile: {', '.join(slow)} (--compile, or --groups)"] if slow else []
    return [name for name in wanted if name not in still], lines


def cases(names: Sequence[str] = (), asked: Asked | None = None) -> list[Case]:
    """The cases of the groups that ``chosen`` finds."""
    asked = asked or Asked()
    found = [case for name in chosen(names, asked)[0] for case in GROUPS[name].cases(asked)]
    keys = [str(case) for case in found]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{twice[0]!r} names more than one case")
    return found
