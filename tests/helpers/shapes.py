"""The shapes that data has where rooms meet, checked at run time in every test: each function below says in its
signature what it takes and returns, and stands in the place of the real one (``conftest.py``).

Legend: g steps, m samples, G groups of q features, place = x, y, z; ``stat`` the shape of one kept statistic.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

from streamnorm import stream
from streamnorm.ops import functional


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the checked functions in the place of the real ones."""
    checked = jaxtyped(typechecker=beartype)
    normalize, fixed, pack, take = functional.normalize, functional.normalize_fixed, functional.pack, stream.Memory.take

    @checked
    def checked_normalize(
        x: Float[Tensor, "g m G q *place"],
        definition: Any,
        streams: Any,
        gain: Float[Tensor, " c"] | None = None,
        shift: Float[Tensor, " c"] | None = None,
    ) -> tuple[Float[Tensor, "g m G q *place"], Float[Tensor, "g 2 *stat"] | None, Float[Tensor, "g 2 *stat"] | None]:
        return normalize(x, definition, streams, gain, shift)

    @checked
    def checked_fixed(
        x: Float[Tensor, "1 m G q *place"],
        definition: Any,
        estimate: Float[Tensor, "2 *stat"],
        known: Tensor | None = None,
    ) -> Float[Tensor, "1 m G q *place"]:
        return fixed(x, definition, estimate, known)

    @checked
    def checked_pack(
        mu: Float[Tensor, "g k G q *place"], sigma: Float[Tensor, "g k G q *place"], ref: Any
    ) -> Float[Tensor, "g 2 Gq *stat"]:
        return pack(mu, sigma, ref)

    @checked
    def checked_take(
        self: stream.Memory,
        s: Float[Tensor, "g rows *stat"],
        ok: Bool[Tensor, " g"] | None,
        samples: int = 1,
        call: tuple[Float[Tensor, "g rows *stat"], Float[Tensor, "g rows *stat"]] | None = None,
    ) -> Float[Tensor, "g rows *stat"]:
        return take(self, s, ok, samples, call)

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (functional, "normalize", checked_normalize),
        (functional, "normalize_fixed", checked_fixed),
        (functional, "pack", checked_pack),
        (stream.Memory, "take", checked_take),
    ]
    for owner, name, function in places:
        patch.setattr(owner, name, _unless_compiling(getattr(owner, name), function))


def _unless_compiling(real: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` traces what it runs, and is to trace the real function."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (real if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return choose
