"""Statistics per time step for general batch normalization in recurrent nets (paper, section 4.2).

A layer of the unrolled network keeps a storage of its own for every time step; its gain and bias are shared over time.
Imports the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamnorm.nn.norm import Norm

Factory = Callable[[int], nn.Module]
"""What makes a normalization of c features: a class, a ``functools.partial`` of one, a function."""


class TimeSpecificNorm(nn.Module):
    """A batch normalization with an H1 for each time step; what ``TimeSpecific`` makes.

    ``y_t = N(x_t, s_t)``; s_t is the mini-batch's in training, F's running estimate of time step t in testing.

    Args:
        norm: a ``Norm`` that trains with the mini-batch's own statistics, such as ``BatchNorm``.
        reuse_last: what testing does beyond the longest trained sequence: the statistics of the last trained step, or
            an error.

    Shapes: ``x (n, c, *place), t -> y (n, c, *place)``, t = 0, 1, ...

    Raises:
        TypeError: for something else than such a ``Norm``.

    >>> import torch
    >>> from streamnorm import BatchNorm
    >>> layer = TimeSpecificNorm(BatchNorm(3))
    >>> for t in range(5):
    ...     y = layer(torch.randn(8, 3), t)
    >>> layer
    TimeSpecificNorm(BatchNorm(3, affine=False), steps=5)
    """

    def __init__(self, norm: Norm, reuse_last: bool = True) -> None:
        super().__init__()
        if not isinstance(norm, Norm) or norm.H1 is None or norm.H2 is not None or norm.policy.uses_estimate:
            raise TypeError(
                f"statistics per time step are for a batch normalization such as BatchNorm, got {norm!r}; a sample "
                "normalization has none to keep, a streaming one keeps one set for all time steps: use it as it is"
            )
        self.affine, norm.affine = norm.affine, None
        self.times = nn.ModuleList([norm])
        self.reuse_last = reuse_last

    @property
    def trained_steps(self) -> int:
        """How many time steps have statistics."""
        return sum(self._at(t).H1.known for t in range(len(self.times)))  # type: ignore[union-attr]

    def _at(self, t: int) -> Norm:
        norm = self.times[t]
        assert isinstance(norm, Norm)
        return norm

    def forward(self, x: Tensor, t: int = 0) -> Tensor:
        if t < 0:
            raise ValueError(f"t is a time step >= 0, got {t}")
        if not self.training:
            self.expect(t + 1)
            t = min(t, len(self.times) - 1)
            while t and not self._at(t).H1.known:  # type: ignore[union-attr]
                t -= 1
            return self._at(t)._normalize(x, self.affine)
        known = len(self.times)
        norm = self._at(t) if t < known else self._fresh()
        y = norm._normalize(x, self.affine)
        if not x.numel():
            return y
        # Only what did not fail is kept; whoever begins in the middle leaves empty steps behind.
        self.times.extend([*(self._fresh() for _ in range(known, t)), norm] if t >= known else [])
        return y

    def expect(self, length: int) -> None:
        """Raise if a sequence of this length is tested that would need statistics nobody has trained."""
        if self.training or self.reuse_last or length <= len(self.times):
            return
        trained = self.trained_steps
        if trained:
            raise ValueError(
                f"there are statistics for {trained} time steps and the sequence has {length}; train with sequences as "
                "long, or let the last step's stand in: TimeSpecific(norm, reuse_last=True)"
            )

    def _fresh(self) -> Norm:
        norm = deepcopy(self._at(0))
        assert norm.H1 is not None
        norm.H1.clear()
        return norm

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        mine = prefix + "times."
        saved = {int(name[len(mine) :].split(".")[0]) for name in state_dict if name.startswith(mine)}
        if saved:
            del self.times[max(saved) + 1 :]
            self.times.extend(self._fresh() for _ in range(len(self.times), max(saved) + 1))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        reuse = "" if self.reuse_last else ", reuse_last=False"
        return f"TimeSpecificNorm({self.times[0]!r}, steps={len(self.times)}{reuse})"


@dataclass(frozen=True)
class TimeSpecific:
    """Time-specific batch normalization in a recurrent layer: statistics per time step (section 4.2).

    ``y_t = N(x_t, s_t)``; training is that of ``norm``, testing uses the running estimate of time step t. There are as
    many sets as the longest training sequence has steps; the gain and the bias are shared over time. The backward
    direction of a bidirectional layer counts from the end of each sequence: its time step 0 is the last one.

    Args:
        norm: makes the batch normalization of c features: ``BatchNorm``, a ``functools.partial`` of it, a function.
        reuse_last: beyond the longest trained sequence, test with the statistics of the last trained step; otherwise
            raise an error.

    >>> import torch
    >>> from streamnorm import BatchNorm, NormRNN
    >>> net = NormRNN(4, 3, norm=TimeSpecific(BatchNorm))
    >>> output, h_n = net(torch.randn(7, 8, 4))
    >>> net.cells["l0"].norm_ih["h"].trained_steps
    7
    """

    norm: Factory
    reuse_last: bool = True

    def __call__(self, num_features: int) -> TimeSpecificNorm:
        """The layer for c features."""
        made = self.norm(num_features)
        return TimeSpecificNorm(made, self.reuse_last)  # type: ignore[arg-type]
