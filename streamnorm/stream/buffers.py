"""The two buffers that hold statistics: tables that keep their precision, and counters; the placeholder for tables
whose shape is only known from the first input. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

ADVICE = (
    "run one batch through the model in training first, or give the shape when the layer is made: place=(height, "
    "width) for statistics of every place, TimeSpecific(norm, steps=n) for those of every time step"
)
"""What to do about a table that has no shape yet."""


class Unshaped(Tensor):
    """A table without values. Copying or averaging it with one that has values raises: torch's own error would not
    mention layers, and where shapes broadcast it would silently lose the values.

    >>> import torch
    >>> table = torch.zeros(2, 0).as_subclass(Unshaped)
    >>> table.copy_(torch.ones(2, 1))
    Traceback (most recent call last):
    RuntimeError: statistics cannot be copied between a layer that has seen its first input and one that has not: ...
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            for together in _operands([*args, *kwargs.values()]):
                if any(t.ndim and t.numel() for t in together) and any(isinstance(t, cls) for t in together):
                    raise RuntimeError(
                        "statistics cannot be copied between a layer that has seen its first input and one that has "
                        f"not: they take their shape from it; {ADVICE}"
                    )
            made = func(*args, **kwargs)
            kept = type(made) is Tensor and args and isinstance(args[0], Tensor) and made.shape == args[0].shape
            return made.as_subclass(cls) if kept else made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = memo[id(self)] = self.clone()
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # files hold ordinary tensors


def _operands(args: Iterable[Any]) -> Iterable[Sequence[Tensor]]:
    """The tensors that are combined: the arguments of a call, or the entries of its lists that correspond."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and all(isinstance(t, Tensor) for t in a)]
    return zip(*lists, strict=False) if lists else [[a for a in args if isinstance(a, Tensor)]]


class Buffers(nn.Module):
    """``tables``, float32 or wider, and ``counts``, int64, each a buffer under a name of its own.

    Attributes:
        shaped: whether the tables have a shape; they are ``Unshaped`` until then.
        waits: whether the shape comes from the first input; loading an unshaped state makes the tables wait again.
    """

    shaped: bool
    waits: bool

    def __init__(self, names: tuple[str, str], waits: bool) -> None:
        super().__init__()
        self._names = names
        self.waits = waits

    def _hold(self, tables: Tensor, counts: Tensor, shaped: bool) -> None:
        """Register these as the two buffers, in place of any earlier ones."""
        for name, value in zip(self._names, (tables, counts), strict=True):
            self.register_buffer(name, _wide(value))
        self.shaped = shaped
        self._mark()

    @property
    def _at(self) -> Any:
        """The mapping that holds the two buffers by name."""
        return self._buffers

    @property
    def tables(self) -> Tensor:
        """Everything that is shaped like a statistic."""
        return self._buffers[self._names[0]]  # type: ignore[return-value]

    @property
    def counts(self) -> Tensor:
        """All counters."""
        return self._buffers[self._names[1]]  # type: ignore[return-value]

    def _mark(self) -> None:
        """Make tables that have no shape yet ``Unshaped``, so that copying them raises."""
        if not self._buffers:
            return
        tables = self.tables
        if type(tables) in (Tensor, Unshaped) and isinstance(tables, Unshaped) == self.shaped:  # no FakeTensor
            self._buffers[self._names[0]] = tables.as_subclass(Tensor if self.shaped else Unshaped)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .bfloat16() reach every floating buffer; statistics must not lose precision with the weights.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self._buffers.items():
            wide = before[name]
            if after is not None and wide is not None and after.is_floating_point() and after.itemsize < 4:
                self._buffers[name] = wide.to(after.device)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = _wide(value)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"waits": not state.get("shaped", True), **state})
        self._mark()


def _wide(value: Tensor) -> Tensor:
    """``value`` in float32 if it is narrower."""
    return value.float() if value.is_floating_point() and value.itemsize < 4 else value


def expect_replaceable(counts: Tensor) -> None:
    """Raise where buffers must not be replaced by new ones, judging by their ``counts``.

    Raises:
        RuntimeError: under ``torch.compile``, or if other processes share the memory.
    """
    if is_dynamo_compiling():
        raise RuntimeError(
            f"statistics that take their shape from the first input cannot be compiled before it; {ADVICE}"
        )
    if counts.is_cpu and counts.is_shared():
        raise RuntimeError(
            "statistics that take their shape from the first input cannot be shared among processes before it, which "
            f"would each have their own; {ADVICE}"
        )
