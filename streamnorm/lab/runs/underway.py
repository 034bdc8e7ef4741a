"""A run under way, whatever its kind: what its checkpoints hold, how it goes on from one, what a record says of it.

Imports the checkpoints.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.lab.runs import checkpoint
from streamnorm.stream.buffers import Buffers

LATE = " (the learning rate falls late, at a time that the epochs decide)"
"""Why epochs cannot be added to a run whose learning rate has a schedule."""


class Named(Protocol):
    """Data of any kind."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


class UnderWay:
    """A run between two of its steps. A trainer of a kind of run adds ``step`` and says what data it is of.

    Attributes:
        PARTS: names of what has a state of its own, beside the model, that a checkpoint holds.
        KEPT: names of what else it holds as it is.
        SHAPES: of what is in KEPT (``streamnorm.reading``).
        LINE: the shape of a line of metrics.
        WHY_EPOCHS: why a run does not go on for more epochs than it was begun with, where there is a reason.
        updates: weight updates to do; ``done`` of them are.
        metrics: a line for each test so far.
        failed: why it cannot go on, in a sentence, or None.
        random: where its random numbers come from.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("optimizer",)
    KEPT: ClassVar[tuple[str, ...]] = ()
    SHAPES: ClassVar[dict[str, Any]] = {}
    LINE: ClassVar[dict[str, Any]] = {}
    WHY_EPOCHS: ClassVar[str] = ""

    def __init__(self, run: Any, data: Named, model: nn.Module, optimizer: Optimizer, updates: int) -> None:
        self.run, self.data, self.model, self.optimizer = run, data, model, optimizer
        self.updates = updates
        self.done = 0
        self.metrics: list[dict[str, Any]] = []
        self.failed: str | None = None
        self.random = torch.default_generator

    def identity(self) -> dict[str, Any]:
        """The data of the run, as far as its checkpoints are of no others."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.failed is not None or self.done == self.updates

    def tested(self, done: int) -> list[int]:
        """After which of the first ``done`` updates there is a line of metrics."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "run": self.run.to_json(),
            "data": self.identity(),
            "model": dict(self.model.state_dict()),
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
            "random": self.random.get_state(),
            "updates": self.updates,
            **{name: getattr(self, name) for name in ("done", "metrics", "failed", *self.KEPT)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state()`` was taken.

        Raises:
            CheckpointError: if it was taken of another run or of other data, or is damaged.
        """
        checkpoint.expect(state, {"run": {str: object}, "data": {str: object}})
        there = {**self.run.defaults(), **state["run"], **state["data"]}  # an older run lacks newer settings
        if differing := differences(there, {**self.run.to_json(), **self.identity()}):
            reason = self.WHY_EPOCHS if there["epochs"] != self.run.epochs else ""
            raise checkpoint.CheckpointError(f"the checkpoint is of another run: {differing}{reason}")
        state = {"warmup": state.get("link"), **state}  # its name in older versions
        if missing := [name for name in (*self.PARTS, *self.KEPT) if name not in state]:
            raise checkpoint.CheckpointError(f"the checkpoint is of another kind of run: it lacks {', '.join(missing)}")
        self._expect(state)
        load_random(self.random, state["random"])
        load_model(self.model, state["model"])
        for name in self.PARTS:
            load_part(getattr(self, name), state[name])
        for name in ("done", "metrics", "failed", *self.KEPT):
            setattr(self, name, state[name])

    def _expect(self, state: dict[str, Any]) -> None:
        """Refuse a state with which it could not go on."""
        shape = {
            "model": {str: Tensor},
            "random": self.random.get_state(),
            "updates": self.updates,
            "done": range(self.updates + 1),
            "metrics": [{"updates": int, **self.LINE}, ...],
            "failed": (str, None),
            **{name: shape_of(getattr(self, name)) for name in self.PARTS},
            **self.SHAPES,
        }
        checkpoint.expect(state, shape)
        if [line["updates"] for line in state["metrics"]] != (tested := self.tested(state["done"])):
            raise checkpoint.CheckpointError(
                f"the checkpoint is damaged: of {state['done']} updates it has not just the {len(tested)} metrics"
            )

    def record(self) -> dict[str, Any]:
        """What a report reads."""
        return {**description(self.run, self.data), "metrics": self.metrics, "failed": self.failed}


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The fields in which two runs differ, in words; empty if in none."""
    pairs = {k: (there.get(k), here.get(k)) for k in {**here, **there}}
    return ", ".join(f"{k} {old!r} there and {new!r} here" for k, (old, new) in pairs.items() if old != new)


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict``, refusing another architecture before anything is changed.

    Raises:
        CheckpointError: with the names, shapes and dtypes that do not fit.
    """
    mine, there = model.state_dict(), {_as_now(name) for name in state}
    missing = sorted(name for name in mine if _as_now(name) not in there)
    unknown = sorted(name for name in state if _as_now(name) not in mine)
    # A memory of streamnorm whose shape training tells takes the one that it has there; its counters say whether it is
    # of each time step.
    waiting = tuple(f"{at}." for at, module in model.named_modules() if isinstance(module, Buffers) and module.waits)

    def fits(name: str, value: Tensor, here: Tensor) -> bool:
        now = _as_now(name)
        if not now.startswith(waiting):
            return value.shape == here.shape
        return here.is_floating_point() or value.ndim + (now != name) == here.ndim

    shapes = [
        f"{name} {tuple(value.shape)} there and {tuple(here.shape)} here"
        for name, value in state.items()
        if (here := mine.get(_as_now(name))) is not None and not fits(name, value, here)
    ]
    dtypes = [
        f"{name} {value.dtype} there and {here.dtype} here"
        for name, value in state.items()
        if (here := mine.get(_as_now(name))) is not None and value.dtype != here.dtype
    ]
    if missing or unknown or shapes or dtypes:
        parts = [
            f"{title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for title, names in (
                ("missing there", missing),
                ("unknown here", unknown),
                ("of another shape", shapes),
                ("of another dtype", dtypes),
            )
            if names
        ]
        raise checkpoint.CheckpointError(f"the checkpoint is of another architecture; {'; '.join(parts)}")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, IndexError) as error:  # of a memory that took its shape from there
        said = " ".join(str(error).split())
        raise checkpoint.CheckpointError(f"the checkpoint is of another architecture; {said}") from error


def load_random(random: torch.Generator, state: Tensor) -> None:
    """``random.set_state``, refusing numbers that no generator has.

    Raises:
        CheckpointError: for those.
    """
    try:
        random.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise checkpoint.CheckpointError("the checkpoint is damaged: random is no state of a generator") from error


def shape_of(part: Any) -> Any:
    """The shape of the state of a part: an optimizer, or a warm-up."""
    if not isinstance(part, Optimizer):
        return {"updates": range(2**62)}
    groups = [{"lr": float} for _ in part.param_groups]
    return {"state": {int: {str: (Tensor, float, None)}}, "param_groups": groups}


def load_part(part: Any, state: dict[str, Any]) -> None:
    """``part.load_state_dict`` of a state of its shape; of the options of an optimizer only the rate is taken, for the
    run says what the others are.

    Raises:
        CheckpointError: if what an optimizer remembers is not of its parameters.
    """
    if not isinstance(part, Optimizer):
        part.load_state_dict(state)
        return
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    held = state["state"]
    first = next(iter(held.values()), {})
    alike = {key: value if isinstance(value, Tensor) and not value.ndim else None for key, value in first.items()}
    if len(held) not in (0, len(parameters)):
        raise checkpoint.CheckpointError(
            f"the checkpoint is damaged: its optimizer remembers {len(held)} of {len(parameters)} parameters"
        )
    for i in range(len(held)):
        own = {key: parameters[i].detach() if value is None else value for key, value in alike.items()}
        checkpoint.expect(held, {i: own})
    groups = zip(part.state_dict()["param_groups"], state["param_groups"], strict=True)
    part.load_state_dict({"state": held, "param_groups": [{**own, "lr": there["lr"]} for own, there in groups]})


def _as_now(name: str) -> str:
    """The name under which a memory of one time step, as older versions kept them, is loaded."""
    return re.sub(r"\btimes\.\d+\.", "", name)


def description(run: Any, data: Named) -> dict[str, Any]:
    """What a run of any kind is, for its record."""
    return {
        "arm": run.arm,
        "label": run.label,
        "seed": run.seed,
        "run": run.to_json(),
        "data": data.name,
        "source": data.source,
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    from importlib.metadata import version

    return {"python": platform.python_version(), "torch": torch.__version__, "streamnorm": version("streamnorm")}


def machine() -> dict[str, str | int]:
    """What a result was computed on."""
    return {"cpu": _processor(), "threads": torch.get_num_threads(), "system": platform.system()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
