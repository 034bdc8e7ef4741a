"""A run that a study looks at while it trains, with the weights of its statistics. Imports the trainer."""

from __future__ import annotations

import time
from typing import Any

from streamnorm.lab.runs.classifier.data import Data
from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.run import Run


class TracedTrainer(Trainer):
    """A run under way with a ``trace``: a line at updates ``first``, ``first + every`` and so on, before the weights
    move, and one at the end. A study says in ``look`` what it looks at."""

    KEPT = (*Trainer.KEPT, "trace")
    SHAPES = {**Trainer.SHAPES, "trace": [{str: object}, ...]}  # noqa: RUF012

    def __init__(self, run: Run, data: Data, every: int, first: int = 0) -> None:
        super().__init__(run, data)
        self.every, self.first = every, first
        self.trace: list[dict[str, Any]] = []
        self.optimizer.register_step_pre_hook(lambda *_: self._look_between())

    def look(self) -> None:
        """Add a line to ``trace``, or say in ``failed`` why there can be none."""
        raise NotImplementedError

    def step(self) -> None:
        super().step()
        if self.done == self.updates and not self.failed:  # the last update of all is left undone
            self.look()

    def _look_between(self) -> None:
        start = time.perf_counter()
        if (self.done - self.first) % self.every == 0:
            self.look()
        self.sums["seconds"] -= time.perf_counter() - start  # it is no part of training

    def record(self) -> dict[str, Any]:
        return {**super().record(), "trace": self.trace}
