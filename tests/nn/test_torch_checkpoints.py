"""Checkpoints of torch's batch normalization in our layers, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import draw
from torch import nn

import streamnorm as sn

CLASSES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAKES = {
    "batch": sn.BatchNorm,
    "streaming": sn.StreamingNorm,
    "the paper's": partial(sn.StreamingNorm, alpha=(0.7, 0.3)),
    "any": partial(sn.Norm, ref=sn.BA1, moment=sn.Lp(2, "batch"), policy=sn.Batch(0.2), affine=True),
}


def trained(layer: nn.Module, *shape: int, steps: int = 5) -> nn.Module:
    """A layer of torch's after some mini-batches, with a gain and bias of its own."""
    with torch.no_grad():
        for p in layer.parameters():
            nn.init.uniform_(p, 0.5, 2)
    for step in range(steps):
        layer(3 * draw(shape, step).to(torch.float32) + 1)
    return layer


def net(make: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Sequential(make(4), nn.ReLU()), nn.Linear(4, 2))


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_evaluates_as_torchs_after_loading(name: str, dims: int, dtype: torch.dtype) -> None:
    shape = (6, 4, *(2, 3, 2)[:dims])
    theirs = trained(CLASSES[dims](4), *shape).to(dtype).eval()
    ours = MAKES[name](4).to(dtype)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    x = draw(shape, 9).to(dtype)
    assert torch.allclose(ours.eval()(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert int(ours.H1.seen) == 5


@pytest.mark.parametrize("name", MAKES)
def test_inside_a_model_and_back(name: str) -> None:
    theirs, ours = net(nn.BatchNorm1d), net(MAKES[name])
    trained(theirs, 16, 5)
    state = theirs.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(state)
    assert state.keys() == kept.keys()
    x = draw((8, 5), 9).float()
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)
    back = sn.torch_state_dict(ours)
    assert [*back] == [*kept]
    # sigma is kept, so that the variance is rounded twice: 2 eps of float32
    assert all(torch.allclose(back[key], kept[key], rtol=1e-6, atol=1e-7) for key in kept)
    other = net(nn.BatchNorm1d)
    other.load_state_dict(back)
    assert torch.allclose(other.eval()(x), ours(x), atol=1e-6)


def test_our_own_training_as_a_checkpoint_of_torchs() -> None:
    ours, theirs = net(sn.StreamingNorm), net(nn.BatchNorm1d)
    for step in range(4):
        ours(draw((16, 5), step).float())
    theirs.load_state_dict(sn.torch_state_dict(ours))
    x = draw((8, 5), 9).float()
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)
    assert int(theirs[1][0].num_batches_tracked) == 4


def test_what_is_loaded_counts_as_a_full_memory() -> None:
    theirs = trained(nn.BatchNorm1d(4), 16, 4)
    ours = sn.StreamingNorm(4, memory=50)
    ours(draw((2, 4), 3).float().requires_grad_()).square().sum().backward()
    ours.load_state_dict(theirs.state_dict())
    assert (int(ours.H1.held), int(ours.H1.count), int(ours.H2.held), int(ours.H2.seen)) == (50, 0, 0, 0)
    assert not ours.H2.theta.any()
    before = ours.H1.estimate.clone()
    ours(before[0].expand(1, 4) + before[1])  # one sample, a sigma away: it counts 1 of 51
    assert torch.allclose(ours.H1.estimate[0], before[0] + before[1] / 51, atol=1e-6)
    batch = sn.BatchNorm(4, rate=0.25)
    batch.load_state_dict(theirs.state_dict())
    mean = batch.H1.estimate[0].clone()
    x = draw((16, 4), 7).float()
    batch(x)
    assert torch.allclose(batch.H1.estimate[0], mean.lerp(x.mean(0), 0.25), atol=1e-6)


def test_training_goes_on_otherwise_than_torchs_by_as_much_as_the_guide_says() -> None:
    """Torch averages the unbiased variance, ours averages sigma: at 8 samples they differ by about 10 %."""
    theirs, ours = nn.BatchNorm1d(64, affine=False), sn.BatchNorm(64, affine=False)
    for x in torch.randn(100, 8, 64):
        theirs(x), ours(x)
    ratio = (theirs.running_var.sqrt() / ours.H1.estimate[1]).mean().item()
    # of 8 normal values the mean of sigma, divided by n, is 0.9027, the mean of the unbiased variance 1; the averages
    # of 19 batches, 64 features: 0.19 / sqrt(19 * 64) = 0.006 of noise
    assert ratio == pytest.approx(1 / 0.9027, abs=0.02)


def test_initial_statistics_are_none() -> None:
    for make in (sn.BatchNorm, sn.StreamingNorm):
        ours = make(4)
        ours(draw((8, 4), 0).float())
        ours.load_state_dict(nn.BatchNorm1d(4).state_dict())
        with pytest.warns(UserWarning, match="before it has seen"):
            ours.eval()(torch.ones(2, 4))
        set_by_hand = nn.BatchNorm1d(4)
        set_by_hand.running_mean.fill_(2)
        ours.load_state_dict(set_by_hand.state_dict())
        x = torch.randn(3, 4)
        assert torch.allclose(ours.eval()(x), set_by_hand.eval()(x), atol=1e-6)
        old = {key: value for key, value in set_by_hand.state_dict().items() if key != "num_batches_tracked"}
        ours.load_state_dict(old)
        assert torch.allclose(ours.eval()(x), set_by_hand.eval()(x), atol=1e-6)


def test_narrow_statistics_become_wide() -> None:
    theirs = trained(nn.BatchNorm1d(4), 16, 4).bfloat16().eval()
    ours = sn.BatchNorm(4)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.H1.estimate.dtype == torch.float32
    assert ours.weight.dtype == torch.bfloat16
    x = draw((8, 4), 9).bfloat16()
    # a few units in the last of the 8 bits: torch rounds the result of its float32 arithmetic once, ours as well
    assert torch.allclose(ours.eval()(x).float(), theirs(x).float(), rtol=2**-6, atol=2**-6)


def test_a_layer_on_meta_is_assigned() -> None:
    theirs = trained(nn.BatchNorm1d(4), 16, 4).eval()
    ours = sn.StreamingNorm(4, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = draw((8, 4), 9).float()
    assert torch.allclose(ours.eval()(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (partial(sn.BatchNorm, p=1), r"divides by another sigma, Lp\(p=1"),
        (partial(sn.StreamingNorm, center="zero"), "divides by another sigma"),
        (partial(sn.BatchNorm, ref=sn.BA6), "its reference is BA6"),
        (partial(sn.StreamingNorm, ref=sn.BA2), "its reference is BA2"),
        (sn.SampleNorm, "it keeps no statistics"),
        (sn.OnlineNorm, "cannot start from them"),
    ],
)
def test_statistics_of_another_kind_are_refused_and_nothing_is_guessed(ours: Any, reason: str) -> None:
    layer, theirs = ours(4), trained(nn.BatchNorm1d(4), 16, 4)
    with (
        pytest.warns(UserWarning, match=f"into it .* its running statistics have no place: .*{reason}"),
        pytest.raises(RuntimeError, match="running_mean"),
    ):
        layer.load_state_dict(theirs.state_dict())
    with pytest.warns(UserWarning, match="have no place"):
        layer.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(layer.weight, theirs.weight)
    assert layer.H1 is None or not layer.H1.known


def test_gains_of_any_layer_of_torchs() -> None:
    theirs = trained(nn.LayerNorm(4), 16, 4)
    ours = sn.SampleNorm(4)
    ours.load_state_dict(theirs.state_dict())
    x = draw((8, 4), 9).float()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    with (
        pytest.warns(UserWarning, match="its weight has no place .*; its bias has no place"),
        pytest.raises(RuntimeError, match="Unexpected key"),
    ):
        sn.SampleNorm(4, affine=False).load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for H1\.running"):
        sn.BatchNorm(4).load_state_dict(nn.BatchNorm1d(5).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*affine\.weight"):
        sn.BatchNorm(4).load_state_dict(nn.BatchNorm1d(4, affine=False).state_dict())


def test_a_checkpoint_of_ours_still_loads() -> None:
    ours = sn.StreamingNorm(4)
    ours(draw((8, 4), 0).float())
    other = sn.StreamingNorm(4)
    other.load_state_dict(ours.state_dict())
    assert all(map(torch.equal, other.state_dict().values(), ours.state_dict().values()))


def test_shared_layers_are_written_under_all_names() -> None:
    norm = sn.BatchNorm(4)
    norm(draw((8, 4), 0).float())
    state = sn.torch_state_dict(nn.ModuleDict({"a": norm, "b": nn.ModuleList([norm, nn.Linear(4, 4)])}))
    assert state["a.running_mean"] is state["b.0.running_mean"]
    assert {"b.1.weight", "b.0.num_batches_tracked"} < set(state)
    copied = copy.deepcopy(norm)
    copied.load_state_dict(sn.torch_state_dict(norm))
    assert torch.allclose(copied.H1.estimate, norm.H1.estimate)


def test_what_torch_has_no_names_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm\), .* has no counterpart in torch: .*BA4"):
        sn.torch_state_dict(nn.Sequential(nn.ReLU(), sn.BatchNorm(4, sn.BA4)))
