"""Estimators for river (``pip install 'streamnorm[river]'``): networks with streaming normalization, a row at a time.

Imports river, and the network that grows.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable, Iterable, Mapping
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamnorm.train.growing import MOST, Learner, MakeModule, MakeOptimizer

try:
    from river import base
except ImportError as error:
    raise ImportError("streamnorm.river needs river; pip install 'streamnorm[river]'") from error

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[Any, Any]


class _Rows:
    """Rows of named features as rows of numbers, for a network that grows with the names."""

    _by_class = False

    def __init__(
        self,
        module: MakeModule | None = None,
        width: int = 64,
        depth: int = 2,
        optimizer: str | MakeOptimizer = "adam",
        lr: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.module, self.width, self.depth = module, width, depth
        self.optimizer, self.lr, self.seed = optimizer, lr, seed
        self.features: dict[Hashable, int] = {}
        self.classes: dict[Hashable, int] = {}
        self._refused = 0
        self._learner: Learner | None = None

    @property
    def network(self) -> nn.Module | None:
        """The network; None before the first row."""
        return None if self._learner is None else self._learner.model

    @property
    def skipped(self) -> int:
        """Number of rows that were not finite, and not learned."""
        return self._refused + (0 if self._learner is None else self._learner.skipped)

    def _ready(self, x: Row, outputs: int) -> Learner | None:
        """The network, with room for the features of a row and so many outputs; None if the row cannot be learned."""
        learner = self._learner
        _expect_row(x)
        if learner is not None and learner.k >= outputs and x.keys() <= self.features.keys():
            return learner
        if not (x or self.features) or not all(abs(_feature(name, value)) <= MOST for name, value in x.items()):
            self._refused += 1
            return None
        return self._room(x, outputs)

    def _room(self, names: Iterable[Hashable], outputs: int) -> Learner:
        """The network, with room for features of these names and so many outputs."""
        new = sorted({*names} - self.features.keys(), key=lambda name: (type(name).__name__, str(name)))
        inputs, learner = len(self.features) + len(new), self._learner
        if learner is None:
            of_network = self.module, self.width, self.depth, self.optimizer, self.lr, self.seed
            self._learner = learner = Learner(inputs, outputs, self._by_class, *of_network)
        else:
            learner.grow(inputs, outputs)
        self.features.update(zip(new, range(len(self.features), inputs), strict=True))
        return learner

    def _read(self, x: Row) -> Tensor:
        """The known features of a row, ``(1, d)``; 0 for those that it lacks."""
        _expect_row(x)
        try:
            numbers = array("f", map(x.get, self.features))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):  # something is missing, or no number, or a large one
            numbers = array("f", [_feature(name, x.get(name)) for name in self.features])
        return torch.frombuffer(numbers, dtype=torch.float32).unsqueeze(0)

    def _table(self, X: pd.DataFrame, names: Iterable[Hashable]) -> Tensor:
        """Those features of many rows, ``(n, d)``; 0 for columns that they lack."""
        return torch.from_numpy(X.reindex(columns=[*names], fill_value=0.0).to_numpy("float64", copy=True)).float()

    def _numbers(self, X: pd.DataFrame, y: Collection[Any] | None = None) -> pd.DataFrame:
        """The same rows with numbers only, read as those of ``learn_one`` are."""
        if not hasattr(X, "columns"):
            raise TypeError(f"many rows are a pandas.DataFrame with a column for each feature, got {type(X).__name__}")
        if y is not None and len(y) != len(X):
            raise ValueError(f"each row has a y, got {len(X)} rows and {len(y)} of y")
        X = X.copy(deep=False)
        for name in [name for name, kind in X.dtypes.items() if kind.kind not in "biuf"]:
            X[name] = [_feature(name, value) for value in X[name]]
        return X

    def _finite(self, X: pd.DataFrame) -> list[bool]:
        """Which rows are finite."""
        return self._table(X, X.columns).isfinite().all(1).tolist()


class StreamingClassifier(_Rows, base.MiniBatchClassifier):
    """A network with streaming normalization that learns classes, one row and one weight update at a time.

    ``depth`` times [linear, ``StreamingNorm``, ReLU], then a linear read-out of a logit for each class. A feature that
    comes later gets an input, a class an output, with weights of 0, so that what the network says of the others stays.
    A feature that is missing, or None, is 0. A row that is not finite is not learned (``OnlineTrainer``).

    Args:
        module: makes another network ``(n, d) -> (n, k)`` from d features and k classes, of float32 on the CPU. To grow
            it has to begin and end with ``nn.Linear``. What ``OnlineTrainer`` supports is trained in compiled code.
        width, depth: of the hidden layers, without ``module``.
        optimizer: ``"adam"``, ``"sgd"``, or a function that makes a torch.optim.Optimizer from parameters.
        lr: the learning rate of an optimizer by name; None: 0.001 for adam, 0.01 for sgd.
        seed: of the initial weights.

    Attributes:
        features, classes: names and labels so far, each with its place.
        network: the torch.nn.Module; None before the first row.
        skipped: number of rows that were not finite.

    Raises:
        TypeError: for a feature that is no number.
        ValueError: without a label, or for arguments that are none, at the first row.
        OverflowError: from learning, when weights are no longer finite.

    >>> from river import datasets, evaluate, metrics
    >>> model = StreamingClassifier(seed=0)
    >>> accuracy = evaluate.progressive_val_score(datasets.Phishing(), model, metrics.Accuracy())
    >>> accuracy.get() > 0.87
    True
    """

    _by_class = True

    @property
    def _multiclass(self) -> bool:
        return True

    def learn_one(self, x: Row, y: Any) -> None:
        """Learn from a row with its label; NaN is no label, and the row is skipped."""
        try:
            k = self.classes.get(y)
        except TypeError:
            raise TypeError(f"a label is a word, a number or another constant, got {y!r}") from None
        if k is None:
            if not _is_label(y):
                self._refused += 1
                return
            k = len(self.classes)
        learner = self._ready(x, k + 1)
        if learner is not None:
            self.classes[y] = k
            learner.learn(self._read(x), [k])

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Learn from rows in their order: the same as ``learn_one`` for each, and faster. A missing number is NaN in a
        column of numbers, and its row is skipped."""
        X, labels = self._numbers(X, y), list(y)
        finite = self._finite(X)
        known = [label in self.classes or _is_label(label) for label in labels]
        usable = [i for i, fine in enumerate(finite) if fine and known[i]]
        self._refused += len(labels) - len(usable)
        X, labels, start = X.iloc[usable], [labels[i] for i in usable], 0
        while start < len(labels):
            self.classes.setdefault(labels[start], len(self.classes))
            end = next((i for i in range(start, len(labels)) if labels[i] not in self.classes), len(labels))
            learner = self._room(X.columns, len(self.classes))
            learner.learn(
                self._table(X.iloc[start:end], self.features), [self.classes[label] for label in labels[start:end]]
            )
            start = end

    def predict_proba_one(self, x: Row, **kwargs: Any) -> dict[Any, float]:
        """The probability of each class so far; empty before the first, and if the row is not finite."""
        return {} if self._learner is None else self._probabilities(self._learner, self._read(x))[0]

    def predict_proba_many(self, X: pd.DataFrame) -> pd.DataFrame:
        """The probabilities of many rows; NaN for those that are not finite."""
        import pandas as pd

        return pd.DataFrame(self._rows(X), index=X.index, columns=[*self.classes])

    def predict_many(self, X: pd.DataFrame) -> pd.Series:
        """The most probable class of many rows; None for those that are not finite."""
        import pandas as pd

        best = [max(p, key=lambda label: p[label]) if p else None for p in self._rows(X)]
        return pd.Series(best, index=X.index, dtype=None if best and None not in best else object)

    def _rows(self, X: pd.DataFrame) -> list[dict[Any, float]]:
        """The probabilities of many rows, each empty if there are none."""
        X, learner = self._numbers(X), self._learner
        return [{}] * len(X) if learner is None else self._probabilities(learner, self._table(X, self.features))

    def _probabilities(self, learner: Learner, x: Tensor) -> list[dict[Any, float]]:
        said = learner.outputs(x).softmax(1)
        return [dict(zip(self.classes, p, strict=True)) if isfinite(sum(p)) else {} for p in said.tolist()]


class StreamingRegressor(_Rows, base.MiniBatchRegressor):
    """A network with streaming normalization that learns a number, one row and one weight update at a time.

    As ``StreamingClassifier``, with the squared error of the target. That is standardized with the mean and sd of all
    targets so far, and one that is farther than 10 sd away counts as 10 sd away; predictions are in its own unit.

    Args:
        module, width, depth, optimizer, lr, seed: as for ``StreamingClassifier``; ``module`` is called with k = 1.

    Attributes:
        features: names so far, each with its place.
        network: the torch.nn.Module; None before the first row.
        skipped: number of rows that were not finite.

    Raises:
        TypeError, ValueError, OverflowError: as for ``StreamingClassifier``.

    >>> from river import datasets, evaluate, metrics
    >>> error = evaluate.progressive_val_score(datasets.TrumpApproval(), StreamingRegressor(seed=0), metrics.MAE())
    >>> error.get() < 1
    True
    """

    def learn_one(self, x: Row, y: float) -> None:
        """Learn from a row with its target."""
        y = _number("y", y)
        if not abs(y) <= MOST:
            self._refused += 1
        elif (learner := self._ready(x, 1)) is not None:
            learner.learn(self._read(x), [y])

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Learn from rows in their order: the same as ``learn_one`` for each, and faster. A missing number is NaN in a
        column of numbers, and its row is skipped."""
        X, targets = self._numbers(X, y), [_number("y", target) for target in y]
        usable = [i for i, fine in enumerate(self._finite(X)) if fine and abs(targets[i]) <= MOST]
        self._refused += len(targets) - len(usable)
        if usable:
            learner = self._room(X.columns, 1)
            learner.learn(self._table(X.iloc[usable], self.features), [targets[i] for i in usable])

    def predict_one(self, x: Row) -> float | None:  # type: ignore[override]
        """The number that is expected: 0 before the first row, and None if the row is not finite."""
        if self._learner is None:
            return 0.0
        said = self._learner.outputs(self._read(x)).item()
        return said if isfinite(said) else None

    def predict_many(self, X: pd.DataFrame) -> pd.Series:
        """The numbers that are expected; NaN for rows that are not finite."""
        import pandas as pd

        if self._learner is None:
            return pd.Series(0.0, index=X.index)
        said = self._learner.outputs(self._table(self._numbers(X), self.features))[:, 0]
        return pd.Series(said.where(said.isfinite(), torch.nan).numpy(), index=X.index)


def _expect_row(x: Any) -> None:
    if not isinstance(x, Mapping):
        raise TypeError(f"a row is a dict of features, got {type(x).__name__}")


def _is_label(y: Any) -> bool:
    """Whether a label that is not known is one; NaN is none."""
    if y is None:
        raise ValueError("a row is learned with its label, got None; leave out rows without one")
    if isinstance(y, Tensor):
        raise TypeError(f"a label is a word, a number or another constant, got {y!r}; use its item()")
    try:
        return bool(y == y)
    except TypeError:  # pandas.NA
        return False


def _feature(name: Hashable, value: Any) -> float:
    how = "; encode words before, for instance with river.preprocessing.OneHotEncoder"
    return 0.0 if value is None else _number(f"feature {name!r}", value, how)


def _number(what: str, value: Any, how: str = "") -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return inf
    except (TypeError, ValueError):
        raise TypeError(f"{what} is a number, got {value!r}{how}") from None
