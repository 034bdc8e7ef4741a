"""Recalibration: the statistics that testing meets, of all data, however these are batched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import CASES, Case, draw
from chains import NORMS, assert_same, deep, failing, picture, stored
from close import assert_close
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from streamnorm import (
    BatchNorm,
    Norm,
    NormGRU,
    NormRNN,
    Sample,
    StreamingNorm,
    TimeSpecific,
    recalibrate,
)
from streamnorm.calibration import gap
from streamnorm.lab.runs.classifier.models import Convolutional

SAMPLES = 131
"""Not a multiple of any batch size below: the last batch is ragged."""
SIZES = [1, 2, 3, 8, 64]


def oracle(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance that each norm of a chain meets in testing: all data at once, layer after layer."""
    found, h = [], x.double()
    for module in copy.deepcopy(model).double():
        if not isinstance(module, (Norm, nn.modules.batchnorm._BatchNorm)):
            h = module(h)
            continue
        mean, var = h.mean(0), h.var(0, correction=0)
        found.append((mean, var))
        used = var if isinstance(module, Norm) else var * len(h) / (len(h) - 1)
        h = (h - mean) / (used + 1e-5).sqrt() * module.weight + module.bias
    return found


# --- exact, whatever the batches ---


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_those_of_all_data(name: str, size: int) -> None:
    model, x = deep(NORMS[name]), 3 + 2 * torch.randn(SAMPLES, 6)
    wanted = oracle(model, x)
    assert recalibrate(model, x.split(size)) == 3, "the k-th layer of a chain is exact after k passes"
    for (mean, var), (found_mean, found_sigma) in zip(wanted, stored(model), strict=True):
        if name.startswith("torch"):
            var = var * SAMPLES / (SAMPLES - 1)
        sigma = (var + 1e-5).sqrt()
        # Float32 rounds the data on the way to a layer and the statistics that are stored: a few eps (1.2e-7) of their
        # size, which is some sigmas.
        assert ((found_mean - mean).abs() / sigma).max() < 1e-6 * max(1, (mean.abs() / sigma).max())
        assert (found_sigma / sigma - 1).abs().max() < 1e-6 * max(1, (mean.abs() / sigma).max())


@pytest.mark.parametrize("size", SIZES)
def test_float64_leaves_rounding_alone(size: int) -> None:
    model, x = deep(nn.BatchNorm1d).double(), 1e4 + torch.randn(SAMPLES, 6, dtype=torch.float64)
    wanted = oracle(model, x)
    recalibrate(model, x.split(size))
    for layer, (mean, var) in zip(model[1::3], wanted, strict=False):
        # Errors enter in sigmas, of which the mean of the data is 1e4, and once more for each layer below.
        assert_close("mean", layer.running_mean, mean, terms=SAMPLES * 100)
        assert_close("variance", layer.running_var, var * SAMPLES / (SAMPLES - 1), terms=SAMPLES * 100)


def test_the_usual_tool_depends_on_the_batches() -> None:
    x = 3 + 2 * torch.randn(SAMPLES, 6)
    model = deep(nn.BatchNorm1d)
    ours, usual = [], []
    for size in (8, 64):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        recalibrate(one, x.split(size))
        update_bn(x.split(size), other)
        ours.append(torch.stack(stored(one)))
        usual.append(torch.stack(stored(other)))
    assert (ours[0] - ours[1]).abs().max() < 1e-5
    # The mean of the means of 2 batches of 64 and one of 3 gives each sample of the last 21 times the weight of others.
    assert (usual[0] - usual[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="more than 1 value"):
        update_bn(x.split(1), copy.deepcopy(model))


def test_the_usual_tool_leaves_a_broken_model_behind() -> None:
    """What an exception costs elsewhere, and why ours is tested so much below."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    recalibrate(model, torch.randn(20, 3).split(4))
    before = picture(model.eval())
    with pytest.raises(RuntimeError, match="lost"):
        update_bn(failing(torch.randn(8, 3)), model)
    assert model[0].momentum is None
    assert model.training
    model[0].momentum, _ = 0.1, model.eval()
    with pytest.raises(AssertionError):
        assert_same(picture(model), before)


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c.policy, Sample)], ids=str)
def test_every_reference_and_moment(case: Case) -> None:
    """One layer, all data against mini-batches: S of everything, or (inside a sample) the mean of the samples' s."""
    _, *rest = case.input(0).shape
    x = draw((13, *rest), seed=0)
    layer = case.layer()
    recalibrate(layer, x.split(3))
    ref, moment, view = layer.ref, layer.moment, layer.ref.view(x)
    mu = moment.mean(view, ref)
    center = mu.mean(1, keepdim=True) if moment.center == "estimate" else mu
    sigma = moment.sigma(view, ref, center, center)
    assert layer.H1 is not None
    wanted = torch.stack([s.mean(1).flatten() for s in (mu, sigma)])
    assert_close("s", layer.H1.estimate.flatten(1), wanted, terms=x.numel())
    y = layer.eval()(x)
    assert_close("y", y, moment_of(layer, view, wanted).reshape(x.shape), terms=x.numel())
    estimate = layer.H1.estimate.clone()
    recalibrate(layer, x.split(5))
    assert_close("in other batches", layer.H1.estimate, estimate, terms=x.numel())


def moment_of(layer: Norm, view: Tensor, s: Tensor) -> Tensor:
    mean, sigma = (row.reshape(1, 1, *(layer.moment.mean(view, layer.ref)[:, :1].shape[2:])) for row in s)
    return (view - mean) / sigma


@pytest.mark.parametrize("ours", [True, False])
def test_maps_of_several_sizes_count_by_their_activations(ours: bool) -> None:
    layer = BatchNorm(2) if ours else nn.BatchNorm2d(2)
    maps = [torch.randn(3, 2, 4, 5), 5 + torch.randn(1, 2, 7, 7)]
    recalibrate(layer, maps)
    every = torch.cat([m.transpose(0, 1).flatten(1) for m in maps], 1).double()
    mean, sigma = stored(layer)[0]
    assert_close("mean", mean, every.mean(1), dtype=torch.float32, terms=8)
    assert_close("sigma", sigma**2, every.var(1, correction=int(not ours)) + 1e-5, dtype=torch.float32, terms=8)


@pytest.mark.parametrize(
    ("layer", "place"), [(nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (4, 5)), (nn.BatchNorm3d, (2, 3, 2))]
)
def test_batch_normalization_of_every_rank(layer: type[nn.Module], place: tuple[int, ...]) -> None:
    norm, x = layer(3), 2 + torch.randn(9, 3, *place)
    recalibrate(norm, [x[:1], x[1:]])
    norm.eval()
    flat = x.double().transpose(0, 1).flatten(1)
    assert_close("mean", norm.running_mean, flat.mean(1), dtype=torch.float32, terms=4)
    assert_close("variance", norm.running_var, flat.var(1), dtype=torch.float32, terms=4)


# --- layers that are called several times, and over time ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_deep_residual_networks_need_fewer_passes_than_layers() -> None:
    model, x = nn.Sequential(*[Residual() for _ in range(20)]), torch.randn(200, 6)
    assert recalibrate(model, x.split(50)) < 20
    assert gap(model, [x]).largest < 1e-4


SEQUENCES, IMAGES = (5, 12, 3), (12, 2, 8, 8)
RECURRENT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "loops": (lambda: Convolutional(2, 3, BatchNorm, 4, loops=(2, 3)), IMAGES),
    "loops of torch's": (lambda: Convolutional(2, 3, nn.BatchNorm2d, 4, loops=(2, 3)), IMAGES),
    "RNN": (lambda: NormRNN(3, 4, norm=BatchNorm), SEQUENCES),
    "GRU": (lambda: NormGRU(3, 4, norm=partial(StreamingNorm, p=1)), SEQUENCES),
    "time-specific": (lambda: NormRNN(3, 4, norm=TimeSpecific(BatchNorm)), SEQUENCES),
    "RNN of torch's": (lambda: NormRNN(3, 4, norm=nn.BatchNorm1d), SEQUENCES),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_statistics_that_act_on_themselves_agree_with_what_testing_meets(name: str) -> None:
    make, shape = RECURRENT[name]
    model, x, axis = make(), torch.randn(shape), int(shape == SEQUENCES)
    model(x)  # time-specific statistics learn here how many time steps there are
    found = []
    for size in (3, 5):
        assert recalibrate(model, x.split(size, axis)) > 1
        assert gap(model, [x]).largest < 1e-4, "ten times where passes end"
        found.append(stored(model))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-3 * one.abs().max()


def test_statistics_that_go_on_moving_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamnorm.calibration.course.PATIENCE", 0)
    net, x = NormRNN(3, 4, norm=BatchNorm), torch.randn(SEQUENCES)
    with pytest.warns(UserWarning, match=r"after 2 passes, .* still move, by .* give passes=4"):
        recalibrate(net, x.split(4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recalibrate(net, x.split(4, 1), passes=3) == 3, "who says how many has been told"


class Swinging(nn.Module):
    """Its layer, called twice, finds a mean of ``mean(x) - 1.5 stored + 2.5``: a full step leads further off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.norm(x - 1.5 * self.norm.running_mean + 2.5)
        return y


def test_statistics_that_swing_are_damped() -> None:
    model, x = Swinging().double(), torch.randn(50, 1, dtype=torch.float64)
    recalibrate(model, x.split(25))
    # Passes end at a move of 1e-5 sigmas, and half a step brings the mean four times as near.
    assert model.norm.running_mean.item() == pytest.approx((x.mean().item() + 2.5) / 2.5, abs=1e-5)


def test_time_steps_keep_statistics_of_their_own() -> None:
    net, x = NormRNN(3, 4, norm=TimeSpecific(partial(BatchNorm, affine=False))), torch.randn(5, 40, 3)
    x = x * torch.arange(1, 6).reshape(5, 1, 1) + torch.arange(5).reshape(5, 1, 1)
    net(x)
    recalibrate(net, x.split(7, 1))
    cell = net.cells["l0"]
    projected = (x @ cell.weight_ih.T).detach().double()
    for t, norm in enumerate(cell.norm_ih["h"].times):
        assert_close(f"t = {t}", norm.H1.estimate[0], projected[t].mean(0), dtype=torch.float32, terms=4)
    longer = torch.cat([x, x[-1:]])
    recalibrate(net, [longer])  # the last statistics serve all later steps, so they are those of both
    assert len(cell.norm_ih["h"].times) == 5
