"""A layer's memories against the oracle's."""

from __future__ import annotations

from close import assert_close

from streamnorm.nn.norm import Norm
from streamnorm.oracle import Oracle


def compare_state(name: str, layer: Norm, oracle: Oracle) -> None:
    for which in ("H1", "H2"):
        memory, known = getattr(layer, which), getattr(oracle, which)
        if memory is None:
            continue
        for member, value in memory.state().items():
            if value.ndim:
                assert_close(f"{name} {which}.{member}", value, getattr(known, member).reshape(value.shape), 64)
            elif "Batch" not in name:  # the oracle's counts the folds of a stream
                assert int(value) == getattr(known, member), f"{name} {which}.{member}"
    if layer.H1 is not None:
        assert_close(f"{name} estimate", layer.H1.estimate, oracle.estimate.reshape(layer.H1.estimate.shape), 64)
