"""Layers of torch's become ours: what is kept, what computes the same, and what is refused."""

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

import streamnorm as sn
from streamnorm.nn.arranged import Arranged

TIGHT = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-6}
"""Of outputs near 1: 1e-6 as promised; in float64 its own rounding; in bfloat16, 8 bits, a few units of the last."""

BATCH: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "fc": (partial(nn.BatchNorm1d, 6), (7, 6)),
    "1d": (partial(nn.BatchNorm1d, 6), (5, 6, 4)),
    "2d": (partial(nn.BatchNorm2d, 6, eps=1e-3), (4, 6, 3, 5)),
    "3d": (partial(nn.BatchNorm3d, 6, momentum=0.3), (3, 6, 2, 3, 2)),
    "sync": (partial(nn.SyncBatchNorm, 6), (4, 6, 3, 5)),
    "plain": (partial(nn.BatchNorm2d, 6, affine=False), (4, 6, 3, 5)),
}
SAMPLE: dict[str, tuple[Callable[..., nn.Module], list[tuple[int, ...]]]] = {
    "layer": (partial(nn.LayerNorm, 6), [(7, 6), (5, 6, 6), (2, 3, 4, 6), (6,), (2, 1, 2, 1, 2, 6)]),
    "layer of two axes": (partial(nn.LayerNorm, (3, 4), eps=1e-2), [(5, 3, 4), (2, 7, 3, 4), (3, 4)]),
    "layer without bias": (partial(nn.LayerNorm, 6, bias=False), [(7, 6), (5, 2, 6)]),
    "plain layer": (partial(nn.LayerNorm, 6, elementwise_affine=False), [(7, 6), (5, 2, 6)]),
    "rms": (partial(nn.RMSNorm, 6), [(7, 6), (5, 6, 6), (6,)]),
    "rms of two axes": (partial(nn.RMSNorm, (2, 3), eps=0.1), [(5, 2, 3), (4, 4, 2, 3)]),
    "plain rms": (partial(nn.RMSNorm, 6, elementwise_affine=False), [(7, 6)]),
    "groups": (partial(nn.GroupNorm, 3, 6), [(4, 6), (4, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)]),
    "one group": (partial(nn.GroupNorm, 1, 6), [(4, 6), (4, 6, 5)]),
    "groups of one": (partial(nn.GroupNorm, 6, 6, affine=False), [(4, 6, 5), (2, 6, 3, 4)]),
    "instance 1d": (partial(nn.InstanceNorm1d, 6), [(4, 6, 5), (6, 6), (6, 5)]),
    "instance 2d": (partial(nn.InstanceNorm2d, 6, affine=True), [(4, 6, 5, 3), (6, 6, 3)]),
    "instance 3d": (partial(nn.InstanceNorm3d, 6), [(2, 6, 2, 5, 3), (6, 2, 5, 3)]),
}


def data(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of any number of axes, in float64."""
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def trained(layer: nn.Module, *shapes: tuple[int, ...]) -> nn.Module:
    """Gains and biases of its own, and some mini-batches."""
    with torch.no_grad():
        for p in layer.parameters():
            nn.init.uniform_(p, 0.5, 2)
    for step, shape in enumerate(4 * shapes):
        layer(data(shape, step).float())
    return layer


def close(a: Tensor, b: Tensor) -> bool:
    tolerance = TIGHT[a.dtype]
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# Outputs


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize(
    "to", [sn.StreamingNorm, sn.BatchNorm, partial(sn.StreamingNorm, alpha=(0.7, 0.3)), lambda c: sn.BatchNorm(c)]
)
def test_a_trained_batch_normalization_evaluates_as_before(name: str, dtype: torch.dtype, to: Any) -> None:
    make, shape = BATCH[name]
    theirs = trained(make(), shape).to(dtype).eval()
    ours = sn.convert(copy.deepcopy(theirs), to)
    assert isinstance(ours, sn.Norm)
    assert not ours.training
    x = data(shape, 9).to(dtype)
    assert close(ours(x), theirs(x))


@pytest.mark.parametrize("name", BATCH)
def test_batch_normalization_trains_as_torchs_on_each_batch(name: str) -> None:
    make, shape = BATCH[name]
    theirs = trained(make(), shape).double()
    ours = sn.convert(copy.deepcopy(theirs), sn.BatchNorm)
    xs = [data(shape, 9).requires_grad_() for _ in range(2)]
    ys = [ours(xs[0]), theirs(xs[1])]
    assert close(*ys)
    for y in ys:
        y.square().sum().backward()
    assert close(xs[0].grad, xs[1].grad)
    assert all(close(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.moment.eps == theirs.eps
    assert ours.policy.rate == theirs.momentum


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SAMPLE)
def test_normalization_of_each_sample_computes_the_same(name: str, training: bool, dtype: torch.dtype) -> None:
    make, shapes = SAMPLE[name]
    theirs = trained(make(), *shapes).to(dtype).train(training)
    if name == "plain rms":
        theirs.eps = 1e-5  # eps=None is that of the input's dtype, which a layer without a weight cannot tell
    ours = sn.convert(copy.deepcopy(theirs), sn.SampleNorm)
    assert ours.training == training
    for step, shape in enumerate(shapes):
        xs = [data(shape, step).to(dtype).requires_grad_() for _ in range(2)]
        ys = [ours(xs[0]), theirs(xs[1])]
        assert close(*ys), shape
        for layer, y in zip((ours, theirs), ys, strict=True):
            layer.zero_grad()
            (y * torch.arange(y.numel()).reshape(y.shape).to(dtype)).sum().backward()
        if dtype == torch.float64:
            assert all(
                torch.allclose(a.grad, b.grad, atol=1e-9)
                for a, b in zip((xs[0], *ours.parameters()), (xs[1], *theirs.parameters()), strict=True)
            )


@pytest.mark.parametrize("training", [True, False])
def test_instance_normalization_with_running_statistics_is_streamed(training: bool) -> None:
    theirs = trained(nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 6, 5, 3)).eval()
    ours = sn.convert(copy.deepcopy(theirs))
    for shape in ((4, 6, 5, 3), (6, 6, 3)):
        assert close(ours(data(shape, 9).float()), theirs(data(shape, 9).float()))
    assert ours.norm.ref == sn.SP1
    assert ours.train()(torch.randn(6, 6, 3)).shape == (6, 6, 3)
    with pytest.raises(ValueError, match=r"tests with running statistics .*; convert it to StreamingNorm"):
        sn.convert(theirs, sn.SampleNorm)


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.LayerNorm((2, 3))])
@pytest.mark.parametrize("to", [sn.StreamingNorm, sn.BatchNorm])
def test_layer_normalization_can_become_one_with_a_memory(layer: nn.Module, to: Any) -> None:
    last = tuple(getattr(layer, "normalized_shape", ()))
    shape = (8, 5, *last) if last else (8, 6, 5)
    ours = sn.convert(copy.deepcopy(layer), to)
    with pytest.raises(RuntimeError, match="before it has seen"):
        copy.deepcopy(ours).eval()(torch.randn(shape))
    x = 3 * torch.randn(shape) + 1
    y = ours(x)
    rows = y.reshape(-1, 6) if last else y.transpose(1, 2).reshape(-1, 6)
    flat = x.reshape(-1, 6) if last else x.transpose(1, 2).reshape(-1, 6)
    if isinstance(layer, nn.RMSNorm):
        # per feature, about 0 and without a shift
        assert torch.allclose((rows / flat).std(0), torch.zeros(6), atol=1e-5)
    elif to is sn.BatchNorm:
        assert torch.allclose(rows.mean(0), torch.zeros(6), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_transformer_computes_the_same_in_training_and_evaluation() -> None:
    """In evaluation torch's encoder takes eps, weight and bias of its norms and calls fused code in their place."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    ours = sn.convert(copy.deepcopy(theirs), sn.SampleNorm)
    x = torch.randn(3, 8, 8)
    mask = torch.tensor([[False] * 8, [False] * 5 + [True] * 3, [False] * 7 + [True]])
    for mode in (True, False):
        for model in (ours, theirs):
            model.train(mode)
        for keys in (None, mask):
            with torch.no_grad():
                ys = [model(x, src_key_padding_mask=keys) for model in (ours, theirs)]
            seen = ~mask if keys is not None else slice(None)
            assert torch.allclose(ys[0][seen], ys[1][seen], atol=2e-6), (mode, keys is None)
    streaming = sn.convert(copy.deepcopy(theirs).train())
    streaming(x)
    y, z = streaming.eval()(x), sn.convert(copy.deepcopy(theirs), sn.SampleNorm)(x)
    assert not torch.allclose(y, z, atol=0.01)  # it is not the fused layer normalization that answers


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


@pytest.mark.parametrize("to", [sn.StreamingNorm, sn.BatchNorm, partial(sn.StreamingNorm, center="batch", ref=sn.BA2)])
def test_a_gain_without_a_bias_learns_as_one_with_a_bias_of_0(to: Any) -> None:
    alone, both = (sn.convert(nn.LayerNorm(6, bias=bias), to) for bias in (False, True))
    assert alone.bias is None
    assert repr(alone.norm.affine) == "Affine(6, bias=False)"
    for step in range(3):
        xs = [data((4, 3, 6), step).float().requires_grad_() for _ in range(2)]
        ys = [layer(x) for layer, x in zip((alone, both), xs, strict=True)]
        assert torch.allclose(*ys, atol=1e-6)
        for layer, y in zip((alone, both), ys, strict=True):
            layer.zero_grad()
            (y * torch.arange(6)).square().sum().backward()
            layer.norm.fold()
        # float32, sums of 12 squares up to 25 * 10
        assert torch.allclose(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-3)
        assert torch.allclose(alone.weight.grad, both.weight.grad, rtol=1e-4, atol=1e-3)
    assert all(torch.allclose(v, both.state_dict()[k], rtol=1e-4, atol=1e-4) for k, v in alone.state_dict().items())
