"""Estimators for scikit-learn: its own checks, and samples learned as river's rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from streamnorm import river
from streamnorm.sklearn import StreamingClassifier, StreamingRegressor


@parametrize_with_checks([StreamingClassifier(), StreamingRegressor()])
def test_it_passes_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("by_class", [True, False])
def test_parts_are_learned_as_rows_are(by_class: bool) -> None:
    draw = np.random.RandomState(0)
    X = draw.randn(60, 3).astype("float32")
    y = (X.sum(1) > 0).astype(int) if by_class else X.sum(1)
    model = (StreamingClassifier if by_class else StreamingRegressor)(width=8, random_state=0)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    other = (river.StreamingClassifier if by_class else river.StreamingRegressor)(width=8, seed=seed)
    if by_class:
        other._room(range(3), 2)
        other.classes.update({0: 0, 1: 1})
    for part in (slice(0, 1), slice(1, 20), slice(20, 60)):
        model.partial_fit(X[part], y[part], **({"classes": [0, 1]} if by_class else {}))
        for x, target in zip(X[part].tolist(), y[part].tolist(), strict=True):
            other.learn_one(dict(enumerate(x)), target)
    for x in X[:10]:
        row = dict(enumerate(x.tolist()))
        if by_class:
            said = [*other.predict_proba_one(row).values()]
            np.testing.assert_allclose(model.predict_proba(x[None])[0], said, atol=1e-5)
        else:
            np.testing.assert_allclose(model.predict(x[None]), other.predict_one(row), rtol=1e-4, atol=1e-5)


def test_classes_are_those_of_the_first_part() -> None:
    X, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="first call of partial_fit takes classes="):
        StreamingClassifier().partial_fit(X, y)
    model = StreamingClassifier().partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"not among classes: array\(\[2\]\)"):
        model.partial_fit(X, y + 1)
    with pytest.raises(ValueError, match="and are"):
        model.partial_fit(X, y, classes=[0, 1, 2])


def test_numbers_that_float32_cannot_hold_are_refused() -> None:
    X = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"up to 3.4e\+38, got -1e\+39; learn them in another unit"):
        StreamingRegressor().fit(X, [1.0, 2.0, -1e39, 3.0])
    assert StreamingRegressor(epochs=1).fit(X, [1.0, 2.0, -1e38, 3.0])._learner.skipped == 0
