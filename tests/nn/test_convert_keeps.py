"""Converting layers of torch's: what is kept of them, options, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchs import BATCH, SAMPLE, trained

import streamnorm as sn
from streamnorm.nn.arranged import Arranged

# What is kept


def test_parameters_hooks_mode_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), trained(nn.BatchNorm2d(6), (4, 6, 3, 3)), nn.LayerNorm(4), nn.ReLU())
    model[1].weight.requires_grad_(False)
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, called = [*model.parameters()], []
    handle = model[1].register_forward_hook(lambda *_: called.append("forward"))
    model[1].register_forward_pre_hook(lambda *_, **__: called.append("before"), with_kwargs=True)
    model[1].register_full_backward_hook(lambda *_: called.append("backward"))
    model[2].register_forward_hook(lambda module, args, y: called.append(type(module).__name__))
    assert sn.convert(model) is model
    after = [*model.parameters()]
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert (model.training, model[1].training, model[2].training) == (True, False, True)
    assert not model[1].weight.requires_grad
    model(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert called == ["before", "forward", "Arranged", "backward"]
    assert model[1].bias.grad is not None
    assert model[1].weight.grad is None
    optimizer.step()
    handle.remove()
    called.clear()
    model(torch.randn(2, 3, 6, 6))
    assert "forward" not in called


def test_shared_and_nested_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.parts = nn.ModuleDict({"a": nn.ModuleList([self.norm, nn.BatchNorm1d(4)]), "b": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"][0](self.norm(x)))

    model = sn.convert(Net())
    assert model.norm is model.parts["a"][0]
    assert isinstance(model.parts["a"][1], sn.StreamingNorm)
    assert model.parts["a"][1] is not model.norm
    model(torch.randn(8, 4)).sum().backward()
    assert int(model.norm.H1.seen) == 2
    chosen = sn.convert(Net(), where=lambda name, module: name == "parts.a.1")
    assert isinstance(chosen.norm, nn.BatchNorm1d)
    assert isinstance(chosen.parts["a"][1], sn.StreamingNorm)
    with pytest.raises(ValueError, match=r"'norm' .* stands in 2 places, 'norm', 'parts.a.0', and where"):
        sn.convert(Net(), where=lambda name, module: name == "norm")


def test_copies_and_pickles_of_a_converted_model() -> None:
    model = sn.convert(nn.Sequential(trained(nn.BatchNorm1d(4), (8, 4)), nn.GroupNorm(2, 4))).eval()
    sn.freeze(model[0])
    x = torch.randn(3, 4)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again[0](x), model[0](x))
        assert type(sn.to_torch(again[0])) is nn.BatchNorm1d


@pytest.mark.parametrize("make", [*(make for make, _ in BATCH.values()), *(make for make, _ in SAMPLE.values())])
def test_on_the_meta_device(make: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta", dtype=torch.float64), make(device="meta", dtype=torch.float64))
    ours = sn.convert(model)[1]
    tensors = [*ours.parameters(), *(b for b in ours.buffers() if b.is_floating_point())]
    assert all(t.is_meta and t.dtype == torch.float64 for t in tensors)


def test_dtypes_and_places_of_statistics() -> None:
    half = sn.convert(trained(nn.BatchNorm1d(4), (8, 4)).bfloat16())
    assert half.weight.dtype == torch.bfloat16
    assert half.H1.estimate.dtype == torch.float32
    theirs = trained(nn.BatchNorm1d(4), (8, 4))
    with torch.device("meta"):
        ours = sn.convert(theirs)
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))


def test_an_untrained_network_begins_with_an_empty_memory() -> None:
    ours = sn.convert(nn.BatchNorm1d(4))
    assert not ours.H1.known
    assert torch.allclose(ours(torch.randn(16, 4)).mean(0), torch.zeros(4), atol=0.1)


def test_it_streams_after_it_was_converted() -> None:
    model = sn.convert(nn.Sequential(nn.Linear(4, 6), trained(nn.BatchNorm1d(6), (8, 6)), nn.Linear(6, 1)), memory=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sn.attach(model, optimizer)
    for x in torch.randn(5, 1, 4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(model[1].H1.held) == 20
    assert all(p.isfinite().all() for p in model.parameters())


# Options


def test_options_are_those_of_the_layer_unless_they_are_given() -> None:
    theirs = nn.BatchNorm1d(4, eps=0.01, momentum=0.2)
    new = partial(sn.convert, theirs)
    assert repr(new(sn.BatchNorm)) == "BatchNorm(4, rate=0.2, eps=0.01)"
    assert repr(new(sn.BatchNorm, rate=0.5, eps=0.1)) == "BatchNorm(4, rate=0.5, eps=0.1)"
    assert repr(new(partial(sn.BatchNorm, eps=0.3))) == "BatchNorm(4, rate=0.2, eps=0.3)"
    assert repr(new(lambda c, **options: sn.StreamingNorm(c, **options), memory=9)) == "StreamingNorm(4, memory=9)"
    assert repr(new(alpha=(0.5, 0.5))) == "StreamingNorm(4, eps=0.01, alpha=(0.5, 0.5))"
    assert repr(sn.convert(nn.GroupNorm(2, 4), sn.SampleNorm, ref=sn.SP5)) == "SampleNorm(4, ref=SP5)"
    assert isinstance(sn.convert(nn.RMSNorm(4)).norm.definition.op, sn.Scale)
    for name in ("affine", "device", "dtype"):
        with pytest.raises(TypeError, match=f"{name} is that of each layer"):
            new(**{name: None})


def test_running_statistics_that_a_sample_normalization_drops_are_told() -> None:
    model = nn.Sequential(trained(nn.BatchNorm1d(4), (8, 4)), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="running statistics have no place .*; train anew: '0'$"):
        sn.convert(model, sn.SampleNorm, ref=sn.NormRef(2, "all", "one"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.convert(nn.BatchNorm1d(4), sn.SampleNorm)


# Refusals


class Own(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def replaced() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.forward = lambda x: x
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "own forward": (lambda: Own(4), sn.StreamingNorm, {}, "it has a forward of its own"),
    "replaced forward": (replaced, sn.StreamingNorm, {}, "it has a forward of its own"),
    "lazy": (lambda: nn.LazyBatchNorm1d(), sn.StreamingNorm, {}, "it is lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.LayerNorm((2, 2))), sn.SampleNorm, {}, "parametriz"),
    "no statistics": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        sn.BatchNorm,
        {},
        "convert it to Streaming",
    ),
    "cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), sn.BatchNorm, {}, "give rate=0.1"),
    "still": (lambda: nn.BatchNorm1d(4, momentum=0.0), sn.BatchNorm, {}, "give rate=0.1"),
    "another p": (lambda: trained(nn.BatchNorm1d(4), (8, 4)), sn.StreamingNorm, {"p": 1}, "reset_running_stats"),
    "another R": (lambda: trained(nn.BatchNorm1d(4), (8, 4)), sn.StreamingNorm, {"ref": sn.BA6}, "reference is BA6"),
    "samples": (lambda: trained(nn.BatchNorm1d(4), (8, 4)), sn.StreamingNorm, {"ref": sn.SP1}, "reference is SP1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_its_meaning_is_refused_before_anything_changes(name: str) -> None:
    make, to, options, why = REFUSED[name]
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.1), nn.Sequential(make()))
    before = [*model.modules()]
    with pytest.raises(ValueError, match=rf"'1.0' \(\w+\) cannot be converted: .*{why}.*name != '1.0'"):
        sn.convert(model, to, **options)
    assert before == [*model.modules()]
    assert isinstance(sn.convert(model, where=lambda name, module: name != "1.0")[0], sn.StreamingNorm)
    assert model[1][0] is before[-1] or name == "parametrized"


def test_a_layer_without_running_statistics_is_streamed() -> None:
    for theirs in (nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4, momentum=None)):
        assert not sn.convert(theirs).H1.known
    assert repr(sn.convert(nn.BatchNorm1d(4, momentum=None), sn.BatchNorm, rate=0.1)) == "BatchNorm(4)"


def test_nothing_to_convert_and_nothing_that_is_no_norm() -> None:
    with pytest.raises(ValueError, match="Linear has no normalization layer of torch: no BatchNorm"):
        sn.convert(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="that where"):
        sn.convert(nn.BatchNorm1d(3), where=lambda name, module: False)
    with pytest.raises(TypeError, match="to makes a Norm of 3 features for '0', as StreamingNorm does, got Identity"):
        sn.convert(nn.Sequential(nn.BatchNorm1d(3)), lambda c: nn.Identity())
    with pytest.raises(ValueError, match="memory") as error:
        sn.convert(nn.Sequential(nn.BatchNorm1d(3)), memory=-1)
    assert "made a layer for '0'; nothing has changed" in "".join(error.value.__notes__)


def test_inputs_of_another_arrangement_are_refused() -> None:
    last, places = sn.convert(nn.LayerNorm((2, 3)), sn.SampleNorm), sn.convert(nn.InstanceNorm1d(6), sn.SampleNorm)
    for x in (torch.ones(2, 3, 2), torch.ones(3)):
        with pytest.raises(ValueError, match=r"features come last here: expected \(\*, 2, 3\), got"):
            last(x)
    for shape in ((6,), (2, 6, 3, 3)):
        with pytest.raises(ValueError, match=r"with 1 place axes, got"):
            places(torch.ones(shape))
    with pytest.raises(TypeError, match="has to be a tensor"):
        last([1.0])
    for options in ({}, {"last": (4,), "dims": 1}, {"last": (3,)}, {"last": (2.0, 2)}, {"dims": 4}, {"dims": 0}):
        with pytest.raises(ValueError, match=r"last|dims|place"):
            Arranged(sn.SampleNorm(4), **options)
    with pytest.raises(TypeError, match="norm is a Norm"):
        Arranged(nn.LayerNorm(4), last=(4,))


def test_a_relu_in_place_behind_an_arranged_layer() -> None:
    for to in (sn.SampleNorm, sn.StreamingNorm):
        for theirs, x in ((nn.LayerNorm(4), torch.randn(3, 5, 4)), (nn.InstanceNorm1d(4), torch.randn(4, 5))):
            model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), sn.convert(theirs, to), nn.ReLU(inplace=True))
            model(x).sum().backward()
            assert model[0].weight.grad is not None


def test_an_empty_batch() -> None:
    layer = sn.convert(nn.LayerNorm(4), sn.SampleNorm)
    assert layer(torch.ones(0, 3, 4)).shape == (0, 3, 4)
    assert layer(torch.ones(3, 0, 4)).shape == (3, 0, 4)
