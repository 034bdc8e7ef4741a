"""Our layers become torch's: converted and back is the same, and what torch has none of is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import draw
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import streamnorm as sn
from streamnorm.nn.arranged import Arranged

ONE = partial(sn.NormRef, place="all", samples="one")
THERE_AND_BACK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "batch 1d": (lambda: nn.BatchNorm1d(6), (7, 6), sn.BatchNorm),
    "batch 2d": (lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=0.2), (3, 6, 4, 2), sn.BatchNorm),
    "batch 3d": (lambda: nn.BatchNorm3d(6, affine=False), (3, 6, 4, 2, 2), sn.BatchNorm),
    "streaming": (lambda: nn.BatchNorm2d(6, momentum=None), (3, 6, 4, 2), sn.StreamingNorm),
    "sync": (lambda: nn.SyncBatchNorm(6), (3, 6, 4, 2), sn.StreamingNorm),
    "layer": (lambda: nn.LayerNorm((2, 3), bias=False), (5, 2, 3), sn.SampleNorm),
    "rms": (lambda: nn.RMSNorm(6), (5, 2, 6), sn.SampleNorm),
    "groups": (lambda: nn.GroupNorm(2, 6), (5, 6, 3), sn.SampleNorm),
    "groups of one": (lambda: nn.GroupNorm(6, 6), (5, 6, 3), sn.SampleNorm),
    "instance": (lambda: nn.InstanceNorm1d(6), (6, 3), sn.SampleNorm),
    "tracked": (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 6, 3, 2), sn.StreamingNorm),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_converted_and_back_is_the_same(name: str, dtype: torch.dtype) -> None:
    make, shape, to = THERE_AND_BACK[name]
    theirs = make().to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            nn.init.uniform_(p, 0.5, 2)
    for step in range(3):
        theirs((2 * draw(shape, step) + 1).to(dtype))
    theirs.own_tag = "kept"
    model = nn.Sequential(copy.deepcopy(theirs)).eval()
    called = []
    handle = model[0].register_forward_hook(lambda *_: called.append(1))
    parameters = [*model.parameters()]
    back = sn.to_torch(sn.convert(model, to))[0]
    assert type(back) is type(theirs)
    assert repr(back) == repr(theirs)
    assert back.own_tag == "kept"
    assert [*map(id, back.parameters())] == [*map(id, parameters)]
    assert not back.training
    old, new = theirs.state_dict(), back.state_dict()
    assert [*old] == [*new]
    for key, value in old.items():
        assert value.dtype == new[key].dtype
        # sigma is kept, so that the variance is rounded twice
        assert torch.allclose(value.double(), new[key].double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-9), key
    x = draw(shape, 9).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(back(x), theirs.eval()(x), rtol=tolerance, atol=2 * tolerance)
    assert torch.allclose(back.train()(x), theirs.train()(x), rtol=tolerance, atol=2 * tolerance)
    assert called
    handle.remove()
    assert not back._forward_hooks


def trained(layer: nn.Module, *shape: int) -> nn.Module:
    layer(2 * draw(shape, 0).float() + 1)
    return layer


@pytest.mark.parametrize(
    ("ours", "shape", "dims", "kind"),
    [
        (sn.StreamingNorm(6), (4, 6), 1, nn.BatchNorm1d),
        (sn.BatchNorm(6, rate=0.3, affine=False), (4, 6, 3, 2), 2, nn.BatchNorm2d),
        (sn.StreamingNorm(6, alpha=(0.7, 0.3)), (4, 6, 3, 2, 2), 3, nn.BatchNorm3d),
        (sn.SampleNorm(6), (4, 6, 3), None, nn.GroupNorm),
        (sn.SampleNorm(6), (4, 6), None, nn.GroupNorm),
        (sn.SampleNorm(6, sn.SP1), (4, 6, 3), None, nn.GroupNorm),
        (sn.SampleNorm(6, ONE(3), affine=False), (4, 6, 3, 2), None, nn.GroupNorm),
        (Arranged(sn.SampleNorm(6), last=(6,)), (4, 3, 6), None, nn.LayerNorm),
        (Arranged(sn.SampleNorm(6, sn.SP1), dims=2), (6, 3, 2), None, nn.InstanceNorm2d),
        (
            Arranged(sn.Norm(6, sn.SP2, sn.Lp(2, "zero"), sn.Sample(), op=sn.Scale()), last=(3, 2)),
            (4, 3, 2),
            None,
            nn.RMSNorm,
        ),
    ],
)
def test_layers_that_do_not_come_from_torch(ours: Any, shape: tuple[int, ...], dims: Any, kind: Any) -> None:
    model = nn.Sequential(trained(copy.deepcopy(ours), *shape)).eval()
    x = draw(shape, 9).float()
    before = model(x)
    assert sn.to_torch(model, dims=dims) is model
    assert type(model[0]) is kind
    assert torch.allclose(model(x), before, atol=1e-6)
    if isinstance(ours, sn.BatchNorm):
        assert model[0].momentum == 0.3


def test_the_number_of_place_axes_may_depend_on_the_layer() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 4, 3), sn.StreamingNorm(4), nn.Flatten(), nn.Linear(4, 3), sn.BatchNorm(3))

    model = net()
    model(torch.randn(8, 2, 3, 3))
    with pytest.raises(
        ValueError, match=r"'1' \(StreamingNorm\) does not come from torch, .* got dims=None, give 1, 2 or 3"
    ):
        sn.to_torch(model)
    assert isinstance(model[1], sn.StreamingNorm)
    sn.to_torch(model, dims=lambda name, module: 2 if name == "1" else 1)
    assert (type(model[1]), type(model[4])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    model.eval()(torch.randn(8, 2, 3, 3))
    some = sn.to_torch(net(), dims=2, where=lambda name, module: name == "1")
    assert (type(some[1]), type(some[4])) == (nn.BatchNorm2d, sn.BatchNorm)
    with pytest.raises(ValueError, match=r"Sequential has no layer of streamnorm$"):
        sn.to_torch(model)


def test_a_layer_that_became_another_is_what_it_is_now() -> None:
    theirs = sn.to_torch(sn.convert(nn.Sequential(nn.BatchNorm2d(6)), sn.SampleNorm, ref=ONE(3)))
    assert type(theirs[0]) is nn.GroupNorm
    assert theirs[0].num_groups == 3
    moved = sn.to_torch(sn.convert(trained(nn.BatchNorm1d(6), 4, 6)).double())
    assert moved.running_mean.dtype == torch.float64
    plain = sn.to_torch(sn.convert(trained(nn.BatchNorm1d(6, affine=False), 4, 6)).double())
    assert plain.running_mean.dtype == torch.float64

    class Sub(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(6, eps=0.1)

    assert type(sn.to_torch(sn.convert(Sub()))) is Sub
    streamed = sn.convert(nn.BatchNorm2d(6, track_running_stats=False))
    assert sn.to_torch(streamed).track_running_stats
    synced = sn.convert(nn.SyncBatchNorm(6, track_running_stats=False))
    with pytest.raises(ValueError, match="got dims=None"):
        sn.to_torch(synced)


def test_norms_in_a_recurrent_layer() -> None:
    gru = sn.NormGRU(3, 5)
    gru(torch.randn(4, 6, 3))
    x = torch.randn(4, 6, 3)
    before = gru.eval()(x)[0]
    assert torch.allclose(sn.to_torch(gru, dims=1)(x)[0], before, atol=1e-6)
    assert sum(isinstance(module, nn.BatchNorm1d) for module in gru.modules()) == 6


def test_what_was_not_trained_begins_as_torchs() -> None:
    state = sn.to_torch(sn.StreamingNorm(3), dims=1).state_dict()
    assert all(torch.equal(value, nn.BatchNorm1d(3).state_dict()[key]) for key, value in state.items())
    shared = sn.to_torch(nn.ModuleList(2 * [sn.BatchNorm(3)]), dims=1)
    assert shared[0] is shared[1]


REFUSED = {
    "p": (sn.StreamingNorm(4, p=1), "p = 2, and it by that of Lp"),
    "about 0": (sn.StreamingNorm(4, center="zero"), "divides by another sigma"),
    "BA4": (sn.BatchNorm(4, sn.BA4), "its reference is BA4"),
    "BA2": (sn.StreamingNorm(4, sn.BA2), "its reference is BA2"),
    "SP5": (sn.SampleNorm(4, sn.SP5), "torch has none with the reference SP5"),
    "sample about 0": (sn.SampleNorm(4, center="zero"), "torch has none with Lp"),
    "root mean square": (sn.Norm(4, sn.SP2, sn.Lp(2, "zero"), sn.Sample(), op=sn.Scale()), "nn.RMSNorm takes features"),
    "online": (sn.OnlineNorm(4), "it has a forward of its own"),
    "renorm": (sn.BatchRenorm(4), "it remembers by BatchRenormalization"),
    "instances streamed": (sn.StreamingNorm(4, sn.SP1), "running statistics of SP1 for features"),
    "streamed last": (sn.convert(nn.LayerNorm(4)), "running statistics of BA1 for features that stand last"),
    "timed": (sn.TimeSpecific(sn.BatchNorm)(4), "it keeps statistics for every time step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_has_none_of_is_refused_before_anything_changes(name: str) -> None:
    layer, why = REFUSED[name]
    model = nn.Sequential(sn.BatchNorm(4), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"'1.0' \(\w+\), .* has no counterpart in torch: .*{why}"):
        sn.to_torch(model, dims=1)
    assert isinstance(model[0], sn.BatchNorm)
    assert isinstance(sn.to_torch(model, dims=1, where=lambda name, module: name == "0")[0], nn.BatchNorm1d)


# What the guide says of tools that know torch's layers alone


def test_tools_of_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), sn.StreamingNorm(4), nn.ReLU())
    data = [torch.randn(8, 3, 5, 5) for _ in range(3)]
    model(data[0])
    norms = nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm
    assert not any(isinstance(module, norms) for module in model.modules())
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.optim.swa_utils.update_bn(data, model)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is sn.StreamingNorm
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
    sn.recalibrate(model, data)
    assert not torch.equal(model[1].H1.estimate, kept["1.H1.running_long_short_estimate"][2])
    plain = {"affine.weight", "affine.bias"}
    assert {name.removeprefix("1.") for name, _ in model.named_parameters() if name.startswith("1.")} == plain
    x = torch.randn(2, 3, 5, 5)
    before = model.eval()(x)
    theirs = sn.to_torch(model, dims=2)
    fused = fuse_conv_bn_eval(theirs[0], theirs[1])
    assert torch.allclose(fused(x).relu(), before, atol=1e-6)
