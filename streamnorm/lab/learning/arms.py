"""The normalizations that a stream can be learned with, by name. Imports the layers.

To add one: its line in ``ARMS``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.rivals import OnlineNorm

ARMS: dict[str, Callable[[int], nn.Module]] = {
    "none": nn.Identity,  # the linear layer has a bias then
    "layer": nn.LayerNorm,
    "rms": lambda c: nn.RMSNorm(c, eps=1e-5),
    "streaming": StreamingNorm,
    "paper": lambda c: StreamingNorm(c, alpha=(0.7, 0.3), beta=(0.7, 0.3, 0.0)),
    "onlinenorm": OnlineNorm,
}
"""Every arm, ``c -> layer`` with its gain and bias."""


def norm_of(arm: str) -> Callable[[int], nn.Module]:
    """The layer of an arm.

    Raises:
        ValueError: for an unknown arm.

    >>> norm_of("streming")
    Traceback (most recent call last):
    ValueError: unknown arm 'streming'; did you mean 'streaming'? the arms are none, layer, rms, streaming, paper, ...
    """
    if arm not in ARMS:
        near = difflib.get_close_matches(arm, ARMS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown arm {arm!r}; {hint}the arms are {', '.join(ARMS)}")
    return ARMS[arm]
