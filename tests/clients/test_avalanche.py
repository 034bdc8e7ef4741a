"""Avalanche: a strategy over two experiences is the plain loop over both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import RATE, expect_same, folds, loader, network, plain, samples

pytestmark = pytest.mark.filterwarnings("ignore")


def test_its_strategy_is_a_loop() -> None:
    benchmarks: Any = pytest.importorskip("avalanche.benchmarks")
    supervised: Any = pytest.importorskip("avalanche.training.supervised")
    x, y = samples()
    parts = [(x[:16], y[:16]), (x[16:], y[16:])]
    stream = benchmarks.tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    strategy = supervised.Naive(
        model=model, optimizer=optimizer, criterion=torch.nn.CrossEntropyLoss(), train_mb_size=4, evaluator=None
    )
    for experience in stream.train_stream:
        strategy.train(experience, shuffle=False)
        strategy.eval(stream.test_stream)
    expect_same(model.state_dict(), plain(loader()).state_dict())
    assert folds(model) == {8}
