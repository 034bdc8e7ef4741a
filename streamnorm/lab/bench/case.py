"""What is timed: a case is one operation at one size, with everything that can do it. Imports the standard library.

A case knows neither layers nor images. What a step is, how it is shown to be right and how much memory it has to move
is the matter of its variants, so a recurrent network or a whole training step stands here like a single layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class WrongError(ValueError):
    """A variant of ours that does not compute what it should."""


class Subject(Protocol):
    """Something that can be timed.

    More is used where it is there: ``forward()``, the first half of a step, is timed by itself too; ``rest()`` is
    called before each sample, outside of the time; ``count`` says how many steps one ``step()`` does, if not one.
    """

    def step(self) -> Any:
        """The whole of it: forward, backward, and what makes the next step start as this one did."""


@dataclass(frozen=True)
class Traffic:
    """The bytes that an ideal implementation moves between memory and cores in a step.

    Attributes:
        read, written: of the tensors that the caller sees.
        resident: of all of them together, which decides what cache they fit into.
    """

    read: int
    written: int
    resident: int

    def bytes(self, allocate: bool) -> int:
        """``allocate``: ordinary stores read a cache line before they write it; stores past the cache do not."""
        return self.read + self.written * (2 if allocate else 1)


@dataclass(frozen=True)
class Variant:
    """One way to do it.

    Attributes:
        make: a subject, ready to be timed.
        check: raises ``WrongError`` if the subject computes something else than it should; None for a peer of another
            library.
        within: entered around every use of the subject, for instance to choose a backend.
        traffic: what it would ideally move, if that says anything about its time.
        peak: the most bytes that its tensors hold at a time in a step, where memory is compared.
    """

    make: Callable[[], Subject]
    check: Callable[[], None] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    traffic: Traffic | None = None
    peak: Callable[[], int] | None = None


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        group: what it belongs to; a table and a picture each.
        name: shape, layout and dtype, or whatever else tells it from others of the group.
        reference: the variant that ratios are taken to.
        variants: by name.
        series, size: where a case is a point of a curve, the curve and its place on it.
    """

    group: str
    name: str
    reference: str
    variants: Mapping[str, Variant]
    series: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        if self.reference not in self.variants:
            raise ValueError(f"{self}: the reference {self.reference!r} is none of {list(self.variants)}")
        if bool(self.series) != bool(self.size):
            raise ValueError(f"{self}: a point of a curve has a series and a size, got {self.series!r}, {self.size}")

    def __str__(self) -> str:
        return f"{self.group}, {self.name}"

    def gate(self) -> None:
        """Every variant of ours is right.

        Raises:
            WrongError: naming all that are not.
        """
        red = []
        for name, variant in self.variants.items():
            if variant.check is not None:
                try:
                    variant.check()
                except Exception as error:
                    # What breaks is as wrong as what is off.
                    kind = "" if isinstance(error, WrongError) else f"{type(error).__name__}: "
                    red.append(f"{self}: {name}: {kind}{error}")
        if red:
            raise WrongError("\n".join(red))

    def peaks(self) -> dict[str, int]:
        """The bytes of every variant whose memory is compared."""
        found = {}
        for name, variant in self.variants.items():
            if variant.peak is not None:
                with variant.within():
                    found[name] = variant.peak()
        return found


class Shared(Generic[T]):
    """A value made when it is first asked for, the same for all who hold it, gone when the last has let it go.

    The variants of a case read the same input, and the inputs of all cases would not fit into memory together.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._living: weakref.ref[Any] | None = None

    def __call__(self) -> T:
        value = self._living() if self._living else None
        if value is None:
            value = self._make()
            self._living = weakref.ref(value)
        return value
