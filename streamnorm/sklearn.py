"""Estimators for scikit-learn (``pip install 'streamnorm[sklearn]'``): networks with streaming normalization.

Imports scikit-learn, and the network that learns one sample at a time.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from streamnorm.checks import expect_whole
from streamnorm.train.growing import MOST, Learner, MakeModule, MakeOptimizer

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError("streamnorm.sklearn needs scikit-learn; pip install 'streamnorm[sklearn]'") from error


class _Samples(BaseEstimator):
    """What both estimators have in common."""

    n_features_in_: int

    def __init__(
        self,
        module: MakeModule | None = None,
        width: int = 64,
        depth: int = 2,
        optimizer: str | MakeOptimizer = "adam",
        lr: float | None = None,
        epochs: int = 10,
        random_state: Any = None,
    ) -> None:
        self.module = module
        self.width = width
        self.depth = depth
        self.optimizer = optimizer
        self.lr = lr
        self.epochs = epochs
        self.random_state = random_state

    @property
    def network_(self) -> torch.nn.Module:
        """The network."""
        check_is_fitted(self)
        return self._learner.model

    def _begin(self, outputs: int, by_class: bool) -> np.random.RandomState:
        random = check_random_state(self.random_state)
        of_network = self.module, self.width, self.depth, self.optimizer, self.lr
        seed = int(random.randint(2**31 - 1))
        self._learner = Learner(self.n_features_in_, outputs, by_class, *of_network, seed)
        return random

    def _fit(self, x: Tensor, targets: list[Any], random: np.random.RandomState) -> Self:
        expect_whole("epochs", self.epochs)
        for _ in range(self.epochs):
            order = random.permutation(len(x))
            self._learner.learn(x[order], [targets[i] for i in order])
        return self

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._learner.outputs(_tensor(validate_data(self, X, dtype=np.float32, reset=False)))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_learner")


class StreamingClassifier(ClassifierMixin, _Samples):
    """A network with streaming normalization that learns classes, one sample and one weight update at a time.

    ``depth`` times [linear, ``StreamingNorm``, ReLU], then a linear read-out of a logit for each class.

    Args:
        module: makes another network ``(n, d) -> (n, k)`` from d features and k classes, of float32 on the CPU. What
            ``OnlineTrainer`` supports is trained in compiled code.
        width, depth: of the hidden layers, without ``module``.
        optimizer: ``"adam"``, ``"sgd"``, or a function that makes a torch.optim.Optimizer from parameters.
        lr: the learning rate of an optimizer by name; None: 0.001 for adam, 0.01 for sgd.
        epochs: passes of ``fit`` over the samples, each in another order. ``partial_fit`` makes one, in their order.
        random_state: of the initial weights, and of the order in ``fit``.

    Attributes:
        classes_: the labels, sorted.
        network_: the torch.nn.Module.

    Raises:
        ValueError, TypeError: from learning, for arguments or samples that are none.
        OverflowError: from learning, when weights are no longer finite.

    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = StreamingClassifier(random_state=0).partial_fit(X[:1200], y[:1200], classes=range(10))
    >>> model.score(X[1200:], y[1200:]) > 0.85
    True
    """

    classes_: Any

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from samples ``X (n, d)`` with labels ``y (n,)``, from the beginning."""
        x, y = self._checked(X, y, reset=True)
        self.classes_ = unique_labels(y)
        random = self._begin(len(self.classes_), by_class=True)
        return self._fit(x, self._places(y), random)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn from further samples, in their order, once.

        Args:
            classes: all labels that there will be; needed in the first call.
        """
        is_first = not self.__sklearn_is_fitted__()
        if is_first and classes is None:
            raise ValueError("the first call of partial_fit takes classes=, all labels that there will be")
        x, y = self._checked(X, y, reset=is_first)
        given: Any = None if classes is None else unique_labels(classes)
        if not is_first and given is not None and not np.array_equal(given, self.classes_):
            raise ValueError(f"classes were {self.classes_!r} in the first call of partial_fit, and are {given!r} now")
        known: Any = given if is_first else self.classes_
        if len(unknown := np.setdiff1d(y, known)):
            raise ValueError(f"y has labels that are not among classes: {unknown!r}")
        if is_first:
            self.classes_ = known
            self._begin(len(known), by_class=True)
        self._learner.learn(x, self._places(y))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, ``(n, k)``."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable labels ``(n,)``."""
        best = self._outputs(X).argmax(1)
        return self.classes_[best.numpy()]

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Tensor, Any]:
        X, y = validate_data(self, X, y, dtype=np.float32, reset=reset)
        check_classification_targets(y)
        return _tensor(X), column_or_1d(y, warn=True)

    def _places(self, y: Any) -> list[int]:
        return np.searchsorted(self.classes_, y).tolist()


class StreamingRegressor(RegressorMixin, _Samples):
    """A network with streaming normalization that learns a number, one sample and one weight update at a time.

    As ``StreamingClassifier``, with the squared error of the target. That is standardized with the mean and sd of all
    targets so far, and one that is farther than 10 sd away counts as 10 sd away; predictions are in its own unit.

    Args:
        module, width, depth, optimizer, lr, epochs, random_state: as for ``StreamingClassifier``; ``module`` is called
            with k = 1.

    Attributes:
        network_: the torch.nn.Module.

    Raises:
        ValueError, TypeError, OverflowError: as for ``StreamingClassifier``.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> StreamingRegressor(random_state=0).fit(X[:342], y[:342]).score(X[342:], y[342:]) > 0.4
    True
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from samples ``X (n, d)`` with targets ``y (n,)``, from the beginning."""
        x, y = self._checked(X, y, reset=True)
        return self._fit(x, y.tolist(), self._begin(1, by_class=False))

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn from further samples, in their order, once."""
        is_first = not self.__sklearn_is_fitted__()
        x, y = self._checked(X, y, reset=is_first)
        if is_first:
            self._begin(1, by_class=False)
        self._learner.learn(x, y.tolist())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The numbers that are expected, ``(n,)``."""
        return self._outputs(X)[:, 0].numpy()

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Tensor, Any]:
        X, y = validate_data(self, X, y, dtype=np.float32, y_numeric=True, reset=reset)
        y = column_or_1d(y, warn=True).astype(float)
        if not (np.abs(y) <= MOST).all():
            raise ValueError(
                f"y has numbers up to {MOST:.1e}, got {float(y[np.abs(y).argmax()])!r}; learn them in another unit"
            )
        return _tensor(X), y


def _tensor(X: Any) -> Tensor:
    return torch.tensor(X)
