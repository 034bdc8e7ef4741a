"""Statistics per time step for general batch normalization in recurrent nets (paper, section 4.2).

A layer of the unrolled network keeps separate statistics for every time step; its gain and bias are shared over time.
Imports the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamnorm.checks import expect_whole
from streamnorm.nn.freezable import Freezable
from streamnorm.nn.norm import Norm
from streamnorm.stream import TimedMemory, expect_replaceable
from streamnorm.tracing import is_readable

Factory = Callable[[int], nn.Module]
"""A factory of normalizations of c features: a class, a ``functools.partial`` of one, a function."""


class TimeSpecificNorm(Freezable):
    """A batch normalization with an H1 for each time step, made by ``TimeSpecific``.

    ``y_t = N(x_t, s_t)``; s_t is the mini-batch's in training, F's running estimate of time step t in testing.

    Args:
        norm: a ``Norm`` that trains with the mini-batch's own statistics, such as ``BatchNorm``.
        reuse_last: beyond the longest trained sequence, test with the statistics of the last trained step; otherwise
            raise an error.
        steps: of ``TimeSpecific``.

    Attributes:
        H1: the memories of all time steps, in two buffers.
        times: the normalization of each time step, with its own view of them.

    Shapes: ``x (n, c, *place), t -> y (n, c, *place)``, t = 0, 1, ...

    Raises:
        TypeError: for anything but such a ``Norm``.

    >>> import torch
    >>> from streamnorm import BatchNorm
    >>> layer = TimeSpecificNorm(BatchNorm(3))
    >>> for t in range(5):
    ...     y = layer(torch.randn(8, 3), t)
    >>> layer
    TimeSpecificNorm(BatchNorm(3, affine=False), steps=5)
    """

    def __init__(self, norm: Norm, reuse_last: bool = True, steps: int | None = None) -> None:
        super().__init__()
        if not isinstance(norm, Norm) or norm.H1 is None or norm.H2 is not None or norm.policy.uses_estimate:
            raise TypeError(
                f"statistics per time step are for a batch normalization such as BatchNorm, got {norm!r}; a sample "
                "normalization has none to keep, a streaming one keeps one set for all time steps: use it as it is"
            )
        if steps is not None:
            expect_whole("steps", steps)
        self.affine, norm.affine = norm.affine, None
        self.H1 = TimedMemory(norm.H1, steps)
        self.times = nn.ModuleList([norm])
        self.reuse_last = reuse_last
        norm.H1 = self.H1.at(0)
        self._follow()

    def _follow(self) -> None:
        """Make as many layers as there are memories."""
        del self.times[self.H1.steps :]
        for t in range(len(self.times), self.H1.steps):
            norm = deepcopy(self._at(0), {id(self.H1): self.H1})
            norm.H1 = self.H1.at(t)
            self.times.append(norm)

    @property
    def trained_steps(self) -> int:
        """How many time steps have statistics."""
        return sum(self._is_known(t) for t in range(len(self.times)))

    def _is_known(self, t: int) -> bool:
        H1 = self._at(t).H1
        assert H1 is not None
        return H1.known

    def _at(self, t: int) -> Norm:
        norm = self.times[t]
        assert isinstance(norm, Norm)
        return norm

    def forward(self, x: Tensor, t: int = 0) -> Tensor:
        if t < 0:
            raise ValueError(f"t is a time step >= 0, got {t}")
        self.expect(t + 1)
        known = len(self.times)
        if not self.training and self.H1.shaped and not is_readable(self.H1.counts):
            y = self._at(0).normalize_by(x, self.H1.latest(t))
            return y if self.affine is None else self.affine(y)
        if not self.training:
            t = min(t, known - 1)
            while t and not self._is_known(t):
                t -= 1
        if not self.training or (t < known and self.H1.shaped):
            return self._at(t)._normalize(x, self.affine)
        if isinstance(x, Tensor) and not x.numel():
            return self._at(0)._normalize(x, self.affine)
        # New steps are dropped if the call fails; starting in the middle leaves empty steps before it.
        expect_replaceable(self.H1.counts)
        before = self.H1.save()
        try:
            self.H1.grow(max(t + 1, known))
            self._follow()
            return self._at(t)._normalize(x, self.affine)
        except BaseException:
            self.H1.restore(before)
            self._follow()
            raise

    def expect(self, length: int) -> None:
        """Raise for a sequence of this length if training has no room for its statistics, or if testing would need
        untrained ones."""
        if self.training:
            if self.H1.fixed and length > self.H1.steps:
                raise ValueError(
                    f"there is room for the statistics of {self.H1.steps} time steps and the sequence has {length}; "
                    f"write TimeSpecific(norm, steps={length}), or no steps: then training tells"
                )
            return
        if (
            self.reuse_last
            or not is_readable(self.H1.counts)
            or any(self._is_known(t) for t in range(length - 1, len(self.times)))
        ):
            return
        trained = self.trained_steps
        if trained:
            raise ValueError(
                f"there are statistics for {trained} time steps and the sequence has {length}; train with sequences "
                "as long, or let the last step's stand in: TimeSpecific(norm, reuse_last=True)"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._migrate(state_dict, prefix)
        saved = state_dict.get(f"{prefix}H1.{self.H1._names[0]}")
        if saved is not None:
            self.H1.fit_to(saved)
            self._follow()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _migrate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Stack what an older version has saved, a memory for each time step."""
        mine = prefix + "times."
        steps = sorted({int(name[len(mine) :].split(".")[0]) for name in state_dict if name.startswith(mine)})
        for t in steps:
            self._at(0).H1._migrate(state_dict, f"{mine}{t}.H1.")  # type: ignore[union-attr]
        for name in self.H1._names if steps else ():
            each = [state_dict.pop(f"{mine}{t}.H1.{name}", None) for t in steps]
            if all(isinstance(value, Tensor) for value in each):
                state_dict[f"{prefix}H1.{name}"] = torch.stack(each)

    def __repr__(self) -> str:
        reuse = "" if self.reuse_last else ", reuse_last=False"
        return f"TimeSpecificNorm({self.times[0]!r}, steps={len(self.times)}{reuse})"


@dataclass(frozen=True)
class TimeSpecific:
    """Time-specific batch normalization in a recurrent layer: statistics per time step (section 4.2).

    ``y_t = N(x_t, s_t)``; trains like ``norm``, testing uses the running estimate of time step t. There are as many
    sets as the longest training sequence has steps; the gain and the bias are shared over time. The backward direction
    of a bidirectional layer counts from the end of each sequence: its time step 0 is the last one.

    Args:
        norm: makes the batch normalization of c features: ``BatchNorm``, a ``functools.partial`` of it, a function.
        reuse_last: beyond the longest trained sequence, test with the statistics of the last trained step; otherwise
            raise an error.
        steps: number of sets, the length of the longest training sequence. By default it grows in training, and buffers
            are replaced for each longer sequence. If given, buffers have their shape from the start, which copies made
            before the first input and memory shared between processes need.

    >>> import torch
    >>> from streamnorm import BatchNorm, NormRNN
    >>> net = NormRNN(4, 3, norm=TimeSpecific(BatchNorm))
    >>> output, h_n = net(torch.randn(7, 8, 4))
    >>> net.cells["l0"].norm_ih["h"].trained_steps
    7
    """

    norm: Factory
    reuse_last: bool = True
    steps: int | None = None

    def __call__(self, num_features: int) -> TimeSpecificNorm:
        """The layer for c features."""
        made = self.norm(num_features)
        return TimeSpecificNorm(made, self.reuse_last, self.steps)  # type: ignore[arg-type]
