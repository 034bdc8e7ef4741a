"""A monitor of training: the distribution of pre-activations, and the memories of normalization layers.

After the talk of Ioffe (2015), which follows the 15th, 50th and 85th percentile of a sigmoid's input over training. It
is read-only: it changes no weights, no state, no random numbers. Imports the sites and what stands below them.

Legend: a site is a watched module; a record covers what was seen between two weight updates.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from streamnorm.files import append, named, write
from streamnorm.monitoring.sites import (
    PERCENTILES,
    ROWS,
    Choice,
    Site,
    chosen_modules,
    finite,
    percentiles,
    percentiles_of_rows,
)
from streamnorm.nn.norm import Norm
from streamnorm.nn.updates import has_happened
from streamnorm.reading import read_lines
from streamnorm.stream import Memory

Record = dict[str, Any]


class Writer(Protocol):
    """TensorBoard's ``SummaryWriter``, or anything with this method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def monitor(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    path: str | Path | None = None,
    *,
    watch: Choice | Iterable[Choice] | None = None,
    every: int = 100,
    values: int = 4096,
    axis: int = 1,
    writer: Writer | None = None,
    start: int | None = None,
) -> Monitor:
    """Record the distribution of pre-activations and the memory of every normalization layer over training.

    A step is a weight update, as on the axis of a learning curve, for any number of mini-batches, time steps and calls;
    one that a gradient scaler skips does not count. A record is made before update 0, ``every``, 2 ``every``, ...; of
    all forward passes in training mode since the previous update. Modules have hooks only while a record is made.
    Copies of the model are not watched.

    For a nonlinearity the input is recorded, for any other module the first output tensor: percentiles 15, 50 and 85
    (Ioffe 2015), ``mean`` and ``std`` over all finite values, and the share of finite values; ``dead``, the share of
    units that are <= 0 at every value (where a ReLU is 0), and ``saturated``, of those beyond +-2.94 at every value (a
    sigmoid is below 0.05 or above 0.95), both None if fewer than 16 values of a unit were sampled.

    For a ``Norm`` that has a memory, the members of H1 and H2 are recorded: for tables the percentiles of mu and sigma
    over the features, for counters the number (``skipped``: arrivals left out because they were not finite). For
    ``torch.nn`` batch normalization, the running statistics.

    Args:
        model: in any mode; only passes in training mode are recorded.
        optimizer: counts the steps; None: call ``step()`` once per weight update.
        path: of a file that gets a JSON line per record; None: the records are kept in memory.
        watch: a pattern of names such as ``"layers.*.act"``, a module, a class of modules, a function ``(name, module)
            -> bool``, or several of these; None: all modules that are nonlinearities, or in a model without any the
            normalization layers; ``()``: none. Modules inside a normalization layer or cell of ours cannot be watched,
            as a hook there turns off the compiled kernels, which round differently; if all norms of a model are in
            cells, their memories are recorded.
        every: updates from one record to the next.
        values: the most values sampled from a tensor; their positions depend only on the shape.
        axis: of the features; -1 for sequences ``(n, T, c)``.
        writer: also gets every figure, by ``add_scalar``.
        start: number of weight updates before a resumed run; later records in the file are removed.

    Raises:
        ValueError: for a pattern that matches nothing, a model with nothing to watch, a file of another kind.
        FileExistsError: for a file with records, without ``start``.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with monitor(model, optimizer, every=10) as watching:
    ...     for x in torch.randn(25, 32, 4):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    >>> [record["step"] for record in watching.records]
    [0, 10, 20]
    >>> seen = watching.records[-1]
    >>> list(seen["preactivations"]), list(seen["norms"]["1"])
    (['2'], ['batches', 'running'])
    """
    return Monitor(model, optimizer, path, watch, every, values, axis, writer, start)


class Monitor:
    """Returned by ``monitor``; ``close()`` it, or use it in a ``with``.

    Attributes:
        watched: the names of the watched modules.
        steps: weight updates so far.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> with monitor(model) as watching:
    ...     y = model(torch.randn(2, 4))
    ...     watching.step()
    >>> watching.watched, watching.steps
    (('1',), 1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        path: str | Path | None,
        watch: Choice | Iterable[Choice] | None,
        every: int,
        values: int,
        axis: int,
        writer: Writer | None,
        start: int | None,
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer | None):
            raise TypeError(
                f"monitor(model, optimizer) takes a module and an optimizer or None, got {type(model).__name__} and "
                f"{type(optimizer).__name__}"
            )
        for name, value, least in (("every", every, 1), ("values", values, ROWS), ("start", start or 0, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number >= {least}, got {value!r}")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer has add_scalar(tag, value, step), as a SummaryWriter, got {type(writer).__name__}")
        chosen = chosen_modules(model, watch)
        self.model, self.every, self.steps = model, every, start or 0
        if not chosen and not self._remembered():
            raise ValueError(
                f"watch=() leaves the normalization layers, and {type(model).__name__} has none that remember"
            )
        self.path = None if path is None else _opened(Path(path), start)
        self._writer = writer
        self._sites = [Site(name, module, values, axis) for name, module in chosen]
        self._records: list[Record] = []
        self._norms: Record | None = None
        self._has_stepped = self._has_spoken = self._closed = False
        self._handles: list[RemovableHandle] = []
        self._counts_itself = optimizer is not None
        self._counting: list[RemovableHandle] = []
        if optimizer is not None:
            self._counting = [
                optimizer.register_step_pre_hook(self._before_update),
                optimizer.register_step_post_hook(self._after_update),
            ]
        self._listen()

    @property
    def watched(self) -> tuple[str, ...]:
        return tuple(site.name for site in self._sites)

    @property
    def records(self) -> list[Record]:
        """All records so far."""
        return list(self._records) if self.path is None else read(self.path)

    def step(self) -> None:
        """Count a weight update if ``monitor`` was given no optimizer: call it once for each, preferably before
        ``optimizer.step()``."""
        if self._counts_itself:
            raise RuntimeError("the optimizer counts the steps; call step() where monitor() was given none")
        self._close_step()

    def _before_update(self, *_: Any) -> None:
        if self._is_listening:
            self._norms = self._remembered()  # a streaming layer's short is emptied by the update

    def _after_update(self, optimizer: Optimizer, *_: Any) -> None:
        if bool(has_happened(optimizer)):
            self._close_step()

    @property
    def _is_listening(self) -> bool:
        return not self._closed and self.steps % self.every == 0

    def _close_step(self) -> None:
        listening = self._is_listening
        try:
            if listening:
                self._record()
        finally:  # the weights were updated, even if recording failed
            if listening:
                self._hang_up()
            self.steps += 1
            self._has_stepped = True
            self._listen()

    def _listen(self) -> None:
        if self._is_listening:
            self._handles = [site.listen(self.model) for site in self._sites]

    def _hang_up(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for site in self._sites:
            site.clear()

    def _record(self) -> None:
        norms = self._remembered() if self._norms is None else self._norms
        self._norms = None
        seen = {site.name: site.distribution() for site in self._sites if site.calls}
        kinds = {name: type(self.model.get_submodule(name)).__name__ for name in (*seen, *norms)}
        record = {"step": self.steps, "modules": kinds, "preactivations": seen, "norms": norms}
        if self.path is None:
            self._records.append(record)
        else:
            # One write per line: if the process is killed, at most the last line is cut off.
            append(self.path, json.dumps(record, allow_nan=False).encode())
        if self._writer is not None:
            for tag, value in _scalars(record):
                self._writer.add_scalar(tag, value, self.steps)
        if silent := [site.name for site in self._sites if not site.calls]:
            if not self._has_spoken:
                shown = ", ".join(map(repr, silent[:5])) + (" ..." if silent[5:] else "")
                warnings.warn(
                    f"watched, and not called in training mode before update {self.steps}: {shown}", stacklevel=4
                )
            self._has_spoken = True

    @torch.no_grad()
    def _remembered(self) -> Record:
        """The memories of the normalization layers, by name."""
        found: Record = {}
        tables: list[Table] = []
        for name, module in self.model.named_modules():
            if isinstance(module, Norm):
                memories = {which: getattr(module, which) for which in ("H1", "H2")}
                held = {which: _members(memory, tables) for which, memory in memories.items() if memory is not None}
                found |= {name: held} if held else {}
            elif isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
                batches = module.num_batches_tracked
                sigma = (module.running_var + module.eps).sqrt()
                running = {"mu": percentiles(module.running_mean), "sigma": percentiles(sigma)}
                found[name] = {"batches": None if batches is None else int(batches), "running": running}
        _fill(tables)
        return found

    def draw(self, path: str | Path) -> Path:
        """Write a plot of all records as a PNG: percentiles over the steps for each watched module, sigma over the
        steps for each normalization layer.

        Raises:
            ImportError: without matplotlib.
            ValueError: if there is no record yet.
        """
        from streamnorm.monitoring.curves import picture

        path = Path(path)
        write(path, picture(self.records))
        return path

    def close(self) -> None:
        """Remove all hooks. The records stay."""
        if not self._has_stepped and any(site.calls for site in self._sites):
            warnings.warn(
                "the monitor saw training and no weight update, so it has recorded nothing: give it the optimizer, or "
                "call its step() once per update",
                stacklevel=2,
            )
        self._hang_up()
        for handle in self._counting:
            handle.remove()
        self._counting, self._closed = [], True

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


Table = tuple[Record, str, Tensor]
"""A table ``(2, ...)`` of a memory, its name, and the record that it goes into."""


def _members(memory: Memory, tables: list[Table]) -> Record:
    """The counters of H, and None for its tables, which are added to ``tables`` to be filled in."""
    found: Record = {}
    for name, value in memory.members().items():
        if value.ndim:
            tables.append((found, name, value))
            found[name] = None
        else:
            found[name] = int(value) if not value.is_floating_point() else finite(value)
    return found


def _fill(tables: list[Table]) -> None:
    """Fill in the percentiles of every table, tables of the same size at once; empty tables are removed."""
    alike: dict[int, list[Table]] = {}
    for table in tables:
        alike.setdefault(table[2][0].numel(), []).append(table)
    for group in alike.values():
        rows = torch.stack([value.flatten(1).cpu().double() for _, _, value in group])
        of_rows = percentiles_of_rows(rows.flatten(0, 1))
        for (record, name, _), filled, mu, sigma in zip(
            group, rows.flatten(1).any(1).tolist(), of_rows[::2], of_rows[1::2], strict=True
        ):
            record[name] = {"mu": mu, "sigma": sigma}
            if not filled:
                del record[name]


# --- the file ---

OPENING = b'{"step": '
"""The start of every line."""


TABLE = {name: ([], [float] * len(PERCENTILES)) for name in ("mu", "sigma")}
OURS = {str: {str: (float, None, TABLE)}}
TORCHS = {"batches": (int, None), "running": TABLE}
SHAPE = {
    "step": range(2**62),
    "preactivations": {str: {f"p{p}": (float, None) for p in PERCENTILES}},
    "norms": {str: (OURS, TORCHS)},
}
"""The structure of a record."""


def read(path: str | Path) -> list[Record]:
    """The records of a file; a last line that was cut off is left out.

    Raises:
        ValueError: for a file that was not written by a monitor.
    """
    return [record for record, _ in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[Record, int]]:
    """Every record of a file, and where its line ends."""
    return read_lines(path, SHAPE, "is it no file of a monitor? Give another path, or delete it")


def _opened(path: Path, start: int | None) -> Path:
    """The file, ready for the record of step ``start``; later ones are cut off, as they will be made again."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file, for instance {path / 'monitor.jsonl'}")
    kept = 0
    if path.exists() and path.stat().st_size:
        lines = list(_lines(path))
        with path.open("rb") as file:
            if not lines and file.read(len(OPENING)) != OPENING:
                raise ValueError(f"{path} is no file of a monitor; give another path, or delete it")
        if start is None and lines:
            raise FileExistsError(
                f"{path} holds records up to step {lines[-1][0]['step']}; to go on there say how many weight updates "
                "the model has behind it, start=..., or give another path"
            )
        kept = max((end for record, end in lines if record["step"] < (start or 0)), default=0)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size > kept:  # a device has size 0
            os.truncate(path, kept)
    return path


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every figure of a record with its tag, such as ``norms/1/H1/estimate/sigma/p50``."""
    for name, value in record.items():
        if isinstance(value, list):
            value = {f"p{p}": one for p, one in zip(PERCENTILES, value, strict=True)}
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif value is not None and not (name == "step" or isinstance(value, str)):
            yield prefix + name, value
