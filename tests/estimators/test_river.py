"""Estimators for river: its own checks, rows that are a loop, networks that grow and go on saying what they said."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from river import checks
from torch import nn

from streamnorm import OnlineTrainer, StreamingNorm
from streamnorm.river import StreamingClassifier, StreamingRegressor
from streamnorm.train.growing import grow, perceptron

Made = StreamingClassifier | StreamingRegressor
BOTH = pytest.mark.parametrize("kind", [StreamingClassifier, StreamingRegressor])
CHECKS = [
    pytest.param(kind, check, id=f"{kind.__name__}-{check.__name__}-{i}")
    for kind in (StreamingClassifier, StreamingRegressor)
    for i, check in enumerate(checks.yield_checks(kind()))
]


def rows(n: int, names: str = "abcd", seed: int = 0) -> list[dict[str, float]]:
    made = random.Random(seed)
    return [{name: made.gauss(1, 2) for name in names} for _ in range(n)]


def target(kind: type, x: dict[str, float]) -> Any:
    return sum(x.values()) if kind is StreamingRegressor else ("low", "high")[sum(x.values()) > 4]


def learned(kind: type, n: int = 40, **options: Any) -> Any:
    model = kind(width=8, seed=0, **options)
    for x in rows(n):
        model.learn_one(x, target(kind, x))
    return model


def said(model: Made, x: dict[str, float]) -> Any:
    return model.predict_proba_one(x) if isinstance(model, StreamingClassifier) else model.predict_one(x)


@pytest.mark.parametrize(("kind", "check"), CHECKS)
def test_it_passes_the_checks_of_river(kind: type, check: Any) -> None:
    check(kind())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_a_loop(optimizer: str) -> None:
    model = StreamingClassifier(width=8, seed=0, optimizer=optimizer, lr=0.01)
    torch.manual_seed(0)
    network = perceptron(4, 1, 8)
    optimize = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](network.parameters(), lr=0.01)
    for i, x in enumerate(rows(60)):
        y = "low" if i == 0 else target(StreamingClassifier, x)  # one class teaches nothing but statistics
        if i == 1:  # the second class
            grow(network[-1], "weight", torch.zeros(1, 8), 0, optimize)
            grow(network[-1], "bias", torch.zeros(1), 0, optimize)
            model._room([], 2)
            model.classes["high"] = 1
        model.learn_one(x, y)
        loss = F.cross_entropy(network(torch.tensor([[*x.values()]])), torch.tensor([["low", "high"].index(y)]))
        optimize.zero_grad()
        loss.backward()
        optimize.step()
    assert model.network is not None
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-3, atol=1e-4)


@BOTH
def test_features_that_come_later_leave_what_it_says(kind: type) -> None:
    model = learned(kind)
    x = rows(1, seed=5)[0]
    before, steps = said(model, x), [*_steps(model)]
    model._room(["new", "newer"], model._learner.k)
    assert said(model, x) == said(model, {**x, "new": 7.0, "newer": -3.0}) == before
    assert [*_steps(model)] == steps, "the optimizer forgot"
    for more in rows(20, seed=6):
        model.learn_one({**more, "new": more["a"]}, target(kind, more))
    assert said(model, {**x, "new": 2.0}) != said(model, x)


def _steps(model: Any) -> Any:
    return (float(state["step"]) for state in model._learner.optimizer.state.values())


def test_classes_that_come_later_leave_the_others() -> None:
    model = learned(StreamingClassifier)
    x = rows(1, seed=5)[0]
    before = model.predict_proba_one(x)
    model.learn_one({name: float("nan") for name in x}, "no row")
    assert [*model.classes] == [*before]
    model._room([], 3)
    model.classes["third"] = 2
    after = model.predict_proba_one(x)
    assert after["low"] / after["high"] == pytest.approx(before["low"] / before["high"], rel=1e-12)
    for more in rows(60, seed=6):
        model.learn_one({name: value + 50 for name, value in more.items()}, "third")
    assert model.predict_one({name: value + 50 for name, value in x.items()}) == "third"


def test_the_order_in_which_classes_come_does_not_matter() -> None:
    pair = StreamingClassifier(width=8, seed=0), StreamingClassifier(width=8, seed=0)
    for model, first in zip(pair, ("p", "q"), strict=True):
        model._room("abcd", 2)
        model.classes.update({first: 0, "pq".replace(first, ""): 1})
        for x in rows(50):
            model.learn_one(x, "p" if x["a"] > 1 else "q")
    for x in rows(20, seed=3):
        one, other = (model.predict_proba_one(x) for model in pair)
        assert one == pytest.approx(other, abs=1e-4)  # float32 sums over 2 classes in another order, 50 updates


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_number_is_learned_in_any_unit(scale: float) -> None:
    plain, scaled = StreamingRegressor(width=8, seed=0), StreamingRegressor(width=8, seed=0)
    for x in rows(60):
        y = target(StreamingRegressor, x)
        plain.learn_one(x, y)
        scaled.learn_one(x, scale * (y - 3))
    for x in rows(10, seed=2):
        assert scaled.predict_one(x) / scale + 3 == pytest.approx(plain.predict_one(x), abs=1e-3)


@BOTH
def test_predicting_changes_nothing(kind: type) -> None:
    model = learned(kind)
    before = pickle.dumps(model)
    for x in (*rows(30, seed=4), {}, {"a": None}, {"a": float("nan")}, {"other": 3.0}):
        said(model, x)
    assert pickle.dumps(model) == before


@BOTH
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e60, pytest.param(10**400, id="10**400")])
def test_a_row_that_is_not_finite_changes_nothing(kind: type, wrong: float) -> None:
    model = learned(kind)
    before, x = pickle.dumps(model), rows(1)[0]
    state = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.learn_one({**x, "a": wrong}, target(kind, x))
    model.learn_one({**x, "unknown": wrong}, target(kind, x))
    if kind is StreamingRegressor:
        model.learn_one(x, wrong)
    assert model.skipped == 2 + (kind is StreamingRegressor)
    assert "unknown" not in model.features
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    again = pickle.loads(before)
    for one in (model, again):
        one.learn_one(x, target(kind, x))
    if kind is StreamingClassifier:
        assert said(model, x) == said(again, x)
    assert said(model, {**x, "a": wrong}) in ({}, None)


def test_a_row_before_the_first_finite_one_leaves_it_empty() -> None:
    model = StreamingClassifier()
    model.learn_one({}, 1)
    model.learn_one({"a": float("nan")}, 1)
    model.learn_one({"a": 1.0}, float("nan"))
    model.learn_one({"a": 1e39}, 1)
    model.learn_one({"a": 1.0}, pd.NA)
    assert model.skipped == 5
    assert model.network is None
    assert not model.classes
    assert model.predict_one({"a": 1.0}) is None
    assert model.predict_proba_one({"a": 1.0}) == {}
    assert StreamingRegressor().predict_one({"a": 1.0}) == 0.0


@BOTH
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_equally(kind: type, again: Any) -> None:
    model = learned(kind)
    copied = again(model)
    for x in rows(20, seed=7):
        assert said(copied, x) == said(model, x)
        for one in (model, copied):
            one.learn_one({**x, "new": x["b"]}, target(kind, x))
    assert said(learned(kind), rows(1)[0]) != said(model, rows(1)[0])


def test_what_is_missing_is_0() -> None:
    model, other = learned(StreamingClassifier), learned(StreamingClassifier)
    for x in rows(20, seed=8):
        model.learn_one({name: value for name, value in x.items() if name != "b"}, target(StreamingClassifier, x))
        other.learn_one({**x, "b": 0.0}, target(StreamingClassifier, x))
        assert said(model, {**x, "b": None}) == said(other, {**x, "b": 0})


def test_what_is_no_number_label_or_row_is_refused() -> None:
    model = learned(StreamingClassifier)
    before = pickle.dumps(model)
    for x in ({"a": "red", "b": 1.0, "c": 1.0, "d": 1.0}, {"color": "red"}):
        with pytest.raises(TypeError, match="is a number, got 'red'; encode"):
            model.learn_one(x, "low")
    for label, error in ((None, "got None"), ([1], r"got \[1\]"), (torch.tensor(1), "use its item")):
        with pytest.raises((TypeError, ValueError), match=error):
            model.learn_one(rows(1)[0], label)
    for x in ([1.0], None, pd.Series(rows(1)[0])):
        with pytest.raises(TypeError, match="a row is a dict of features, got"):
            model.learn_one(x, "low")
        with pytest.raises(TypeError, match="a row is a dict of features, got"):
            model.predict_one(x)
    with pytest.raises(TypeError, match="y is a number, got None"):
        StreamingRegressor().learn_one(rows(1)[0], None)
    assert pickle.dumps(model) == before


@BOTH
def test_many_rows_are_one_after_the_other(kind: type) -> None:
    one, many = kind(width=8, seed=0), kind(width=8, seed=0)
    made = rows(30)
    made[3]["a"] = made[17]["c"] = float("nan")
    targets = [float(i) if kind is StreamingRegressor else "xyz"[i // 12] for i in range(30)]
    for start in (0, 10, 20):
        part = slice(start, start + 10)
        for x, y in zip(made[part], targets[part], strict=True):
            one.learn_one(x, y)
        many.learn_many(pd.DataFrame(made[part]), pd.Series(targets[part]))
    assert one.skipped == many.skipped == 2
    table = pd.DataFrame(rows(5, seed=1))
    if kind is StreamingClassifier:
        said = many.predict_proba_many(table)
        rest = pd.DataFrame([one.predict_proba_one(x) for x in rows(5, seed=1)])
        pd.testing.assert_frame_equal(said, rest, rtol=0, atol=1e-4)
    else:
        rest = pd.Series([one.predict_one(x) for x in rows(5, seed=1)])
        pd.testing.assert_series_equal(many.predict_many(table), rest, rtol=1e-4)


@BOTH
def test_tables_that_rows_would_not_be_are_refused_before_anything_changes(kind: type) -> None:
    model = learned(kind)
    table, y = pd.DataFrame(rows(4)), pd.Series([1.0, 2.0, 1.0, 2.0])
    before = pickle.dumps(model)
    for X, targets, error in (
        (table.assign(a=pd.date_range("2026", periods=4)), y, "feature 'a' is a number, got Timestamp"),
        (table.assign(a=["red"] * 4), y, "feature 'a' is a number, got 'red'"),
        (table, y[:3], "each row has a y, got 4 rows and 3 of y"),
        (table.to_numpy(), y, "pandas.DataFrame with a column for each feature, got ndarray"),
        (table, [1.0, 2.0, 1.0, None], "got None"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            model.learn_many(X, targets)
    assert pickle.dumps(model) == before


@BOTH
def test_many_rows_that_are_not_finite_have_no_prediction(kind: type) -> None:
    model = learned(kind)
    table = pd.DataFrame(rows(4)).assign(a=[1.0, float("nan"), 1e39, 2.0])
    said = model.predict_many(table)
    assert said.isna().tolist() == [False, True, True, False]
    one = model.predict_one({**rows(1)[0], "a": 1.0})
    assert said.iloc[0] == (one if kind is StreamingClassifier else pytest.approx(one, rel=1e-5))
    assert len(model.predict_many(table[:0])) == 0


def tanh(d: int, k: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 8), StreamingNorm(8), nn.Tanh(), nn.Linear(8, k))


def of_raw_rows(d: int, k: int) -> nn.Module:
    return nn.Sequential(StreamingNorm(d, affine=False), nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, k))


def test_a_network_of_ones_own_grows_too() -> None:
    model = StreamingClassifier(tanh, seed=0, optimizer=torch.optim.RMSprop)
    for i, x in enumerate(rows(80)):
        model.learn_one({**x, **({"late": 1.0} if i > 40 else {})}, target(StreamingClassifier, x))
    model.learn_one({"a": float("nan")}, "low")
    assert model.skipped == 1
    assert sum(model.predict_one(x) == target(StreamingClassifier, x) for x in rows(50, seed=9)) > 35
    assert model.network[0].in_features == 5


def test_a_network_that_cannot_grow_says_so_before_anything_changes() -> None:
    model = learned(StreamingClassifier, module=of_raw_rows)
    before, x = pickle.dumps(model), rows(1)[0]
    with pytest.raises(ValueError, match=r"begins with '0.H1'.*cannot grow beyond 4 inputs"):
        model.learn_one({**x, "new": 1.0}, "third")
    assert pickle.dumps(model) == before
    model.learn_one(x, "third")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"width": 0}, "width is a whole number"),
        ({"optimizer": "sdg"}, "optimizer is one of"),
        ({"lr": -1.0}, "lr is a finite number"),
        ({"optimizer": torch.optim.Adam, "lr": 0.1}, "lr is for an optimizer by name"),
        ({"module": lambda d, k: None}, "module makes a torch.nn.Module"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: str) -> None:
    model = StreamingClassifier(**options)
    with pytest.raises((ValueError, TypeError), match=error):
        model.learn_one({"a": 1.0}, 1)
    assert not model.features


def test_the_compiled_step_is_used() -> None:
    model = learned(StreamingClassifier)
    assert isinstance(model._learner._stepper, OnlineTrainer)


@pytest.mark.parametrize(("ours", "theirs"), [("river", "river"), ("sklearn", "scikit-learn")])
def test_without_the_other_library_it_says_what_to_install(ours: str, theirs: str) -> None:
    code = f"import sys; sys.modules['{ours}'] = None; import streamnorm.{ours}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"needs {theirs}; pip install 'streamnorm[{ours}]'" in done.stderr
