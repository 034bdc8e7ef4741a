"""Recalibration changes the statistics of testing and nothing else, and after an error not even those."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from chains import NORMS, X, assert_same, deep, picture, stored
from close import assert_close
from torch import Tensor, nn

from streamnorm import (
    BA1,
    BA6,
    BatchNorm,
    Lp,
    Norm,
    SampleNorm,
    StreamingNorm,
    recalibrate,
    vectorized,
)
from streamnorm.calibration import gap
from streamnorm.calibration.postproc import state

# --- what is left alone ---


@pytest.mark.parametrize("name", NORMS)
def test_only_statistics_change(name: str) -> None:
    model, x = deep(NORMS[name]), torch.randn(64, 6)
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(x)
    before, random = picture(model), torch.get_rng_state()
    seen = []

    def call(model: nn.Module, batch: Tensor) -> None:
        seen.append((state(model[1]), model[2].training, torch.is_grad_enabled()))
        with torch.enable_grad():  # nobody has to know that there is no graph
            model(batch)

    with vectorized(model, 1 if name.startswith("torch") else 4):
        recalibrate(model, x.split(16), call=call)
    assert set(seen) == {("postproc", False, False)}
    assert state(model[1]) == "train"
    assert state(model.eval()[1]) == "test"
    assert torch.get_rng_state().equal(random)
    now = picture(model.train())
    model[2].eval()
    now = picture(model)
    moved = {key for key, value in before.items() if isinstance(value[0], Tensor) and not now[key][0].equal(value[0])}
    assert moved
    ends = ("estimate", "long", "count", "running_mean", "running_var", "num_batches_tracked")
    assert all(key.endswith(ends) for key in moved), moved
    assert_same({k: v for k, v in now.items() if k not in moved}, {k: v for k, v in before.items() if k not in moved})
    assert not any(buffer.requires_grad for buffer in model.buffers())
    if name.startswith("torch"):
        assert model[1].num_batches_tracked == 4


def test_streaming_training_goes_on_as_if_nothing_had_been() -> None:
    model, x = deep(StreamingNorm), torch.randn(64, 6)
    results = []
    for recalibrated in (False, True):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.01)
        for i, part in enumerate(x.split(8)):
            copied(part).square().mean().backward()
            if i == 3 and recalibrated:
                recalibrate(copied, x.split(8))
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.clone() for p in copied.parameters()])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_the_running_average_of_batch_normalization_goes_on_from_here() -> None:
    layer, x, new = BatchNorm(3, rate=0.25), torch.randn(40, 3), 5 + torch.randn(8, 3)
    layer(new)
    recalibrate(layer, x.split(8))
    at = layer.H1.estimate.clone()
    layer(new)
    own = torch.stack([new.mean(0), (new.var(0, correction=0) + 1e-5).sqrt()])
    assert_close("estimate", layer.H1.estimate, 0.75 * at + 0.25 * own, terms=8)


def test_statistics_are_stored_with_the_parameters() -> None:
    for norm in NORMS.values():
        model, x = deep(norm), torch.randn(64, 6)
        recalibrate(model, x.split(16))
        loaded = deep(norm)
        loaded.load_state_dict(model.state_dict())
        assert loaded.eval()(x).equal(model.eval()(x))


# --- bad input: an error, and the model as it was ---


class Failing(list):
    """A loader that raises half-way, in its second pass if it has been told so."""

    def __init__(self, x: Tensor, passes: int = 0, error: type[BaseException] = RuntimeError) -> None:
        super().__init__(x.split(4))
        self.passes, self.error = passes, error

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(self)):
            if i == 3 and not self.passes:
                raise self.error("the disk is lost")
            yield self[i]
        self.passes -= 1


def poisoned(value: float) -> list[Tensor]:
    parts = [part.clone() for part in torch.randn(32, 6).split(4)]
    parts[5][1, 2] = value
    return parts


BAD: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "nothing": (lambda: [], ValueError, "yield no batches"),
    "an exhausted iterator": (lambda: iter([]), ValueError, "gone through once"),
    "an iterator": (lambda: (part for part in X.split(4)), ValueError, "generator can be gone through once"),
    "a tensor": (lambda: X, TypeError, r"x\.split\(64\)"),
    "no iterable": (lambda: 7, TypeError, "got int"),
    "a loader that raises": (lambda: Failing(X), RuntimeError, "the disk is lost"),
    "a loader that raises in the second pass": (lambda: Failing(X, 1), RuntimeError, "the disk is lost"),
    "an interrupt": (lambda: Failing(X, 0, KeyboardInterrupt), KeyboardInterrupt, "the disk is lost"),
    "nan": (lambda: poisoned(float("nan")), ValueError, r"batch 6 .* not finite, first in layer '1'"),
    "infinity": (lambda: poisoned(float("inf")), ValueError, r"batch 6 .* not finite, first in layer '1'"),
    "strings": (lambda: ["a", "b"], TypeError, "got str; .* call=lambda"),
    "an empty tuple": (lambda: [()], TypeError, "got tuple"),
    "another shape": (lambda: [X, torch.randn(4, 7)], RuntimeError, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("norm", [*NORMS.values(), partial(BatchNorm, ref=BA6)], ids=[*NORMS, "unshaped"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_after_an_error_the_model_is_as_it_was(bad: str, norm: Callable[[int], nn.Module], trained: bool) -> None:
    make, error, message = BAD[bad]
    model = deep(norm)
    if trained:
        model(X)
    model[2].eval()
    before = picture(model)
    with pytest.raises(error, match=message) as raised:
        recalibrate(model, make())
    assert_same(picture(model), before)
    if "disk" in message:
        assert "the model is as it was before" in raised.value.__notes__[0]
    if trained:
        model.eval()(X)


def test_batches_of_no_samples_say_nothing() -> None:
    model = deep(nn.BatchNorm1d)
    recalibrate(model, X.split(4))
    before = torch.stack(stored(model))
    recalibrate(model, [X[:0], *X.split(4)])
    assert torch.stack(stored(model)).equal(before)
    with pytest.raises(ValueError, match="only empty batches, 1 of them"):
        recalibrate(model, [X[:0]])


def test_a_gap_that_fails_leaves_the_model_as_it_was() -> None:
    model = deep(BatchNorm)
    with pytest.raises(RuntimeError, match="has no statistics yet"):
        gap(model, X.split(4))
    model(X)
    before = picture(model)
    with pytest.raises(RuntimeError, match="lost"):
        gap(model, Failing(X))
    assert_same(picture(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "estimator is one of pooled, moving, corrected, got 'exact'"),
        ({"decay": 1.0}, "decay is the weight of the old value, between 0 and 1, got 1.0"),
        ({"passes": 0}, "passes is a number of passes >= 1, or None, got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalibrate(deep(BatchNorm), X.split(4), **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 2), nn.LayerNorm(2), SampleNorm(2)), "no layer that keeps statistics"),
        (nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)), r"0: .*track_running_stats=True"),
        (nn.Sequential(nn.LazyBatchNorm1d()), "run a batch through a lazy layer first"),
    ],
)
def test_models_without_statistics(model: nn.Module, message: str) -> None:
    for function in (recalibrate, gap):
        with pytest.raises(ValueError, match=message):
            function(model, X.split(4))


def test_a_moment_of_ones_own_has_no_pooled_statistics() -> None:
    class Odd(Lp):
        def sigma(self, *args: Any) -> Tensor:
            return 2 * super().sigma(*args)

    layer = BatchNorm(6)
    layer.definition = Norm(6, BA1, Odd(), layer.policy).definition
    with pytest.raises(ValueError, match=r'not of .*Odd.*; .*estimator="corrected"'):
        recalibrate(layer, X.split(4))
    recalibrate(layer, X.split(4), estimator="corrected")


def test_layers_that_are_not_called_keep_their_statistics_and_are_told() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(6), "spare": BatchNorm(6)})
    with pytest.warns(UserWarning, match="not called, and left as they were: 'spare'"):
        recalibrate(model, X.split(4), call=lambda model, x: model["used"](x))
    assert not model["spare"].H1.known
