"""Networks that predict each row of a stream and then learn from it, all on the same rows. Imports the room.

Legend: ``n`` rows, ``d`` inputs, ``k`` outputs: the classes so far, or 1 for a number.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamnorm.lab.learning.features import MOST, Encoder
from streamnorm.lab.learning.network import Drawn, Network
from streamnorm.lab.learning.prequential import Baselines, Curve, Track
from streamnorm.lab.learning.rows import Row
from streamnorm.lab.learning.settings import Settings
from streamnorm.lab.runs.checkpoint import CheckpointError, expect
from streamnorm.lab.runs.underway import load_model, load_part, shape_of
from streamnorm.train.growing import FARTHEST
from streamnorm.train.scaling import Standardizer
from streamnorm.train.stepping import stepper


@dataclass(frozen=True)
class Schema:
    """What the rows of a stream are.

    Attributes:
        target: the column that is predicted.
        columns: those that it is predicted from.
        task: classification or regression.
    """

    target: str
    columns: tuple[str, ...]
    task: str

    @property
    def by_class(self) -> bool:
        """Whether classes are predicted."""
        return self.task == "classification"


def task_of(rows: Sequence[Row]) -> tuple[str, str]:
    """Classification or regression, from the first rows that can be used, and the reason in words.

    >>> from streamnorm.lab.learning.lines import Mark
    >>> task_of([Row(2, {}, 0.5, "0.5", None, Mark())])
    ('regression', 'not all whole')
    """
    targets = [row.target for row in rows if row.wrong is None]
    numbers = [target for target in targets if isinstance(target, float)]
    different = len({row.label for row in rows if row.wrong is None})
    if len(numbers) < len(targets):
        return "classification", "not all numbers"
    if not all(map(float.is_integer, numbers)):
        return "regression", "not all whole"
    if different > 20:
        return "regression", f"{different} different numbers"
    return "classification", f"{different} different {'values' if different > 1 else 'value'}"


class Arm:
    """A normalization, its network and what came of it.

    Attributes:
        name: in ``ARMS``.
        track: the scores of its predictions.
        failed: why it learns no more, or None.
        seconds: that its steps have taken.
    """

    def __init__(self, name: str, inputs: int, settings: Settings, by_class: bool) -> None:
        self.name = name
        self.network = Network(name, inputs, settings.width, settings.depth, Drawn(settings.seed))
        model, rate = self.network.model, settings.rate
        if settings.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        else:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        self.trainer = stepper(model, self.optimizer, F.cross_entropy if by_class else F.mse_loss)
        self.track = Track()
        self.failed: str | None = None
        self.seconds = 0.0

    def grow(self, inputs: int, outputs: int) -> None:
        """Make room for inputs and outputs that the network lacks."""
        self.network.grow_inputs(inputs, self.optimizer)
        self.network.grow_outputs(outputs, self.optimizer)

    def steps(self, x: Tensor, targets: Tensor) -> Tensor:
        """Learn from rows; returns the outputs ``(n, k)``, each from before its row was learned."""
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*samples were skipped", UserWarning)  # an arm that skips says so itself
            _, outputs = self.trainer.steps(x, targets)
        self.seconds += time.perf_counter() - start
        return outputs

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "model": dict(self.network.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "track": self.track.state_dict(),
            "failed": self.failed,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken, once the network has grown as far as it had.

        Raises:
            CheckpointError: for a state of another shape.
        """
        expect(state, {"optimizer": shape_of(self.optimizer), "failed": (str, None), "seconds": float})
        load_model(self.network.model, state["model"])
        load_part(self.optimizer, state["optimizer"])
        self.track.load_state_dict(state["track"])
        self.failed, self.seconds = state["failed"], state["seconds"]


@dataclass(slots=True)
class _Read:
    """A row as it was read: what the inputs are made of; its class or number; classes known before it, or the mean and
    sd of numbers before it; what is to be learned, a class or a standardized number."""

    inputs: tuple[list[float], list[int]]
    target: float
    before: Any
    learned: float


class Learner:
    """Every arm, the baselines, and what they know of the stream.

    Attributes:
        rows: that were learned.
        classes: the number of each class, in the order in which they came.
        arms: by name.
        tracks: the scores of everything that predicts, by name.
    """

    def __init__(self, settings: Settings, schema: Schema, arms: Sequence[str]) -> None:
        self.settings, self.schema = settings, schema
        self.rows = 0
        self.classes: dict[str, int] = {}
        self.encoder = Encoder(schema.columns, settings.words, settings.scale)
        self.targets = Standardizer(1)
        self.arms = {arm: Arm(arm, len(schema.columns), settings, schema.by_class) for arm in arms}
        self.baselines = Baselines(schema.task)
        self.tracks = {name: arm.track for name, arm in self.arms.items()}
        self.tracks |= {name: Track() for name in self.baselines.names}
        self.curve = Curve([*self.tracks])

    @property
    def failed(self) -> str | None:
        """Why no arm learns any more, or None."""
        reasons = [arm.failed for arm in self.arms.values()]
        return reasons[0] if None not in reasons else None

    def refuses(self, row: Row) -> str | None:
        """Why a row cannot be used here, or None."""
        if row.wrong is not None or self.schema.by_class:
            return row.wrong
        if not isinstance(row.target, float):
            return f"the target is {row.label[:40]!r}, no number"
        return None if abs(row.target) <= MOST else f"the target is {row.target:g}, and {MOST:g} is the most"

    def learn(self, rows: Sequence[Row]) -> None:
        """Predict each row, then learn from it; none of them is one that it ``refuses``."""
        together: list[_Read] = []  # until a row makes the networks grow
        for row in rows:
            new_class = self.schema.by_class and row.label not in self.classes
            new_words = not self.encoder.has_words and self.encoder.needs_words(row.cells)
            if (new_class or new_words) and together:
                self._learn(together)
                together = []
            together.append(self._read(row))
        if together:
            self._learn(together)

    def _read(self, row: Row) -> _Read:
        inputs = self.encoder.read(row.cells)
        if self.schema.by_class:
            before = len(self.classes)
            k = self.classes.setdefault(row.label, before)
            return _Read(inputs, k, before, k)
        y, seen = row.target, self.targets
        assert isinstance(y, float)
        before = (seen.mean[0], seen.sd(0)) if seen.count[0] else None
        seen.see([y])
        return _Read(inputs, y, before, min(max(seen.scaled([y])[0], -FARTHEST), FARTHEST))

    def _learn(self, rows: list[_Read]) -> None:
        """Rows of which the first alone may need a larger network."""
        x = self.encoder.inputs([row.inputs for row in rows])
        learned = [row.learned for row in rows]
        targets = torch.tensor(learned, dtype=torch.int64) if self.schema.by_class else torch.tensor(learned)[:, None]
        scores: dict[str, list[Any]] = {}
        for name, arm in self.arms.items():
            if arm.failed is None:
                arm.grow(x.shape[1], max(len(self.classes), 1))
                try:
                    outputs = arm.steps(x, targets)
                except OverflowError:  # its weights are lost, and with them what it said of these rows
                    arm.failed = f"diverged: its outputs were not finite at row {self.rows + 1:,}"
                    scores[name] = []
                    continue
                finite = outputs.isfinite().all(1)
                scores[name] = self._scores(outputs, rows)
                if not finite.all():
                    until = int(finite.int().argmin())
                    scores[name] = scores[name][:until]
                    arm.failed = f"diverged: its outputs were not finite at row {self.rows + until + 1:,}"
        pairs = [self.baselines.scores(row.target) for row in rows]
        for name, of in zip(self.baselines.names, zip(*pairs, strict=True), strict=True):
            scores[name] = list(of)
        self._count(scores, len(rows))

    def _scores(self, outputs: Tensor, rows: list[_Read]) -> list[float | None]:
        if not self.schema.by_class:
            values = outputs[:, 0].tolist()
            return [
                None if row.before is None else abs(row.target - (row.before[0] + row.before[1] * value))
                for row, value in zip(rows, values, strict=True)
            ]
        guesses: list[int] = outputs.argmax(1).tolist()
        known = rows[0].before
        guesses[0] = int(outputs[0, :known].argmax()) if known else -1
        return [float(guess == row.target) for guess, row in zip(guesses, rows, strict=True)]

    def _count(self, scores: dict[str, list[Any]], n: int) -> None:
        for i in range(n):
            self.rows += 1
            for name, of in scores.items():
                if i < len(of) and of[i] is not None:
                    self.tracks[name].add(of[i])
            ended = [name for name in self.arms if name not in scores or i >= len(scores[name])]
            self.curve.note(self.rows, self.tracks, ended)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "rows": self.rows,
            "classes": list(self.classes),
            **{name: getattr(self, name).state_dict() for name in ("encoder", "targets", "baselines", "curve")},
            "arms": {name: arm.state_dict() for name, arm in self.arms.items()},
            "beside": {name: self.tracks[name].state_dict() for name in self.baselines.names},
        }

    def _expect(self, state: dict[str, Any]) -> None:
        """Refuse a state of another shape, as far as what it is made of does not."""
        expect(
            state,
            {
                "rows": range(2**62),
                "classes": [str, ...],
                "encoder": self.encoder.shape,
                "targets": self.targets.shape,
                "baselines": self.baselines.SHAPE,
                "arms": {name: {"model": {str: Tensor}} for name in self.arms},
                "beside": {name: {str: object} for name in self.baselines.names},
            },
        )
        rows, classes, counts = state["rows"], state["classes"], state["baselines"]["_counts"]
        expect(state, {"curve": self.curve.shape_of(rows), "baselines": {"_most": (range(len(counts)), None)}})
        for track in (*(state["arms"][name].get("track") for name in self.arms), *state["beside"].values()):
            expect(track, {"count": range(rows + 1)})
            expect(track, Track.shape_of(track["count"]))
        if len({*classes}) < len(classes) or len(counts) != len(classes):
            raise CheckpointError(f"the checkpoint is damaged: it has {len(classes)} classes and counts {len(counts)}")
        inputs = len(self.schema.columns) + (self.settings.words if state["encoder"]["has_words"] else 0)
        for name in self.arms:
            weights = [*state["arms"][name]["model"].values()] or [torch.empty(0)]
            first, readout = weights[0], weights[-1]
            if first.ndim != 2 or first.shape[1] > inputs or readout.ndim != 1 or len(readout) > max(len(classes), 1):
                raise CheckpointError(f"the checkpoint is damaged: the weights of {name} are of other rows")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken.

        Raises:
            CheckpointError: for a state of another shape.
        """
        self._expect(state)
        self.rows = state["rows"]
        self.classes = {name: k for k, name in enumerate(state["classes"])}
        for name in ("encoder", "targets", "baselines", "curve"):
            getattr(self, name).load_state_dict(state[name])
        for name in self.arms:
            held = state["arms"][name]
            weights = held["model"]
            first, readout = next(iter(weights.values())), weights[[*weights][-1]]
            self.arms[name].grow(first.shape[1], len(readout))
            self.arms[name].load_state_dict(held)
        for name in self.baselines.names:
            self.tracks[name].load_state_dict(state["beside"][name])
