"""skorch: fit is the plain loop, also after a changed criterion, and a pickled estimator goes on."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from small import RATE, expect_same, folds, loader, network, plain, samples

skorch: Any = pytest.importorskip("skorch")
pytestmark = pytest.mark.filterwarnings("ignore")


def estimator(**options: Any) -> Any:
    return skorch.NeuralNetClassifier(
        network, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=RATE, batch_size=4,
        max_epochs=1, train_split=None, verbose=0, **options,
    )  # fmt: skip


def data() -> tuple[Any, Any]:
    x, y = samples()
    return x.numpy(), y.numpy()


@pytest.mark.parametrize("again", ["fit", "criterion", "pickle"])
def test_its_fit_is_a_loop(again: str) -> None:
    made = estimator().fit(*data())
    if again == "criterion":
        made.set_params(criterion=torch.nn.CrossEntropyLoss)
    if again == "pickle":
        made = pickle.loads(pickle.dumps(made))
    made.partial_fit(*data())
    expect_same(made.module_.state_dict(), plain([*loader(), *loader()]).state_dict())
    assert folds(made.module_) == {8 if again == "pickle" else 16}  # a copy counts anew
    assert made.predict(data()[0]).shape == (32,)
