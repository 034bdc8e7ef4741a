"""The registry: every group of cases by name. A new operation is a line here and a function that yields its cases."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence

from streamnorm.lab.bench import layers, networks, sequences
from streamnorm.lab.bench.case import Case

GROUPS: dict[str, tuple[str, Callable[[bool, bool], Iterator[Case]]]] = {
    "contiguous": (
        "Feature maps in float32",
        lambda quick, compiled: layers.maps("contiguous", "contiguous", quick, compiled),
    ),
    "channels_last": (
        "Feature maps in float32, channels last",
        lambda quick, compiled: layers.maps("channels_last", "channels_last", quick, compiled),
    ),
    "bfloat16": ("Feature maps in bfloat16", lambda quick, _: layers.narrow(quick)),
    "features": ("Features without a map", lambda quick, _: layers.features(quick)),
    "single": ("One sample", lambda quick, _: layers.single(quick)),
    "online": ("Training on one sample at a time", lambda quick, _: networks.online(quick)),
    "cycle": ("Cycles of mini-batches of one sample", lambda quick, _: networks.cycle(quick)),
    "monitor": ("Training with a monitor", lambda quick, _: networks.watched(quick)),
    "convnet": ("A convolutional network", lambda quick, _: networks.convnet(quick)),
    "recurrent": ("Recurrent layers", lambda quick, _: sequences.recurrent(quick)),
    "over_time": ("Recurrent layers, growth", lambda quick, _: sequences.over_time(quick)),
    "growth": ("Growth", lambda quick, _: layers.growth(quick)),
}
"""Title and cases of each group. ``cases(quick, compiled)``: tiny inputs only; with compiled peers."""


def check_names(names: Iterable[str]) -> None:
    """Raises:
    ValueError: for a group that is none.
    """
    for name in names:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown group {name!r}; {hint}the groups are {', '.join(GROUPS)}")


def cases(names: Sequence[str] = (), quick: bool = False, compiled: bool = False) -> list[Case]:
    """The cases of these groups, of all if none is named."""
    check_names(names)
    found = [case for name in names or GROUPS for case in GROUPS[name][1](quick, compiled)]
    keys = [str(case) for case in found]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{twice[0]!r} names more than one case")
    return found
