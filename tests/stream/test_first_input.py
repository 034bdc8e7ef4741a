"""Statistics whose shape the first input tells: before it a layer can be copied, saved and loaded; what would copy them
one for one says what to do, and with the shape given beforehand works."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sequences import flat, state_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import streamnorm as sn
from streamnorm.definition.ref import REFS
from streamnorm.nn.timespecific import TimeSpecificNorm
from streamnorm.stream.buffers import Unshaped

MAP, ONE = torch.randn(6, 4, 3, 5), torch.randn(6, 4)
SEQUENCES = torch.randn(5, 6, 4)
TIMED = partial(sn.TimeSpecific, sn.BatchNorm)
PLACES = {name: ref.with_window(3) for name, ref in REFS.items() if ref.place != "all"}


def net_of(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Flatten(), nn.Linear(60, 2))


def recurrent(net: Any, norm: sn.TimeSpecific) -> nn.Module:
    return net(4, 3, 2, bidirectional=True, norm=norm)


Make = Callable[..., nn.Module]
LAYERS: dict[str, tuple[Make, Tensor, dict[str, Any]]] = {
    **{
        f"{name} streams": (partial(sn.StreamingNorm, 4, ref, p=p), MAP, {"place": (3, 5)})
        for p, (name, ref) in zip((2, 3, 1, 2, 2, 1, 2), PLACES.items(), strict=True)
    },
    **{
        f"{name} batch": (partial(sn.BatchNorm, 4, ref), MAP, {"place": (3, 5)})
        for name, ref in PLACES.items()
        if ref.samples == "batch"
    },
    "BA5 of one value": (partial(sn.BatchNorm, 4, sn.BA5), ONE, {"place": ()}),
    "groups": (partial(sn.BatchNorm, 4, sn.NormRef(2, "here", "batch")), MAP, {"place": (3, 5)}),
    "paper's rule": (partial(sn.StreamingNorm, 4, sn.BA6, alpha=(0.6, 0.4)), MAP, {"place": (3, 5)}),
    "online": (partial(sn.OnlineNorm, 4, sn.BA5), MAP, {"place": (3, 5)}),
    "renorm": (partial(sn.BatchRenorm, 4, sn.BA6), MAP, {"place": (3, 5)}),
    "net": (lambda **given: net_of(sn.BatchNorm(4, sn.BA6, **given)), MAP, {"place": (3, 5)}),
    "time-specific RNN": (lambda **given: recurrent(sn.NormRNN, TIMED(**given)), SEQUENCES, {"steps": 5}),
    "time-specific LSTM": (lambda **given: recurrent(sn.NormLSTM, TIMED(**given)), SEQUENCES, {"steps": 5}),
}
every = pytest.mark.parametrize("name", LAYERS)


def made(name: str, known: bool = False) -> tuple[nn.Module, Tensor]:
    make, x, given = LAYERS[name]
    torch.manual_seed(0)
    return make(**given if known else {}), x


def train(layer: nn.Module, x: Tensor, updates: int = 2) -> None:
    layer.train()
    for k in range(updates):
        torch.manual_seed(k)
        y = flat(layer(x * (k + 1)))[0]
        y.backward(torch.randn(y.shape))
        for module in layer.modules():
            if isinstance(module, sn.Norm):
                module.fold()


def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    return flat(layer.eval()(x))[0].detach()


def saved(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "saved": lambda layer: saved(layer, weights_only=False),
    "copied twice": lambda layer: saved(copy.deepcopy(layer), weights_only=False),
    "half and back": lambda layer: copy.deepcopy(layer).half().float(),
    "in double": lambda layer: copy.deepcopy(layer).double().float(),
}


@every
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_from_before_the_first_input_trains_as_the_layer(name: str, how: str) -> None:
    layer, x = made(name)
    other = COPIES[how](layer)
    if how != "half and back":
        other.load_state_dict(saved(layer.state_dict(), weights_only=True))
    else:
        with torch.no_grad():
            for p, q in zip(other.parameters(), layer.parameters(), strict=True):
                p.copy_(q)
    for one in (layer, other):
        train(one, x)
    known = other.state_dict()
    assert known.keys() == layer.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert value.dtype == known[key].dtype
        assert type(value) is Tensor
        assert torch.equal(value, known[key]), key
    assert torch.equal(evaluated(layer, x), evaluated(other, x))


@every
def test_a_fresh_layer_takes_a_trained_state_and_a_trained_one_a_fresh_state(name: str) -> None:
    (layer, x), (other, _) = made(name), made(name)
    fresh = copy.deepcopy(layer.state_dict())
    train(layer, x)
    other.load_state_dict(saved(layer.state_dict(), weights_only=True))
    assert torch.equal(evaluated(layer, x), evaluated(other, x))
    other.load_state_dict(saved(fresh, weights_only=True))  # where it began
    with pytest.warns(UserWarning, match="before it has seen any training data"):
        evaluated(other, x)
    train(other, x)
    assert torch.equal(evaluated(layer, x), evaluated(other, x))


def by_buffers(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.buffers(), of.buffers(), strict=False):
        a.copy_(b)


def by_names(to: nn.Module, of: nn.Module) -> None:
    mine = to.state_dict()
    for key, value in of.state_dict().items():
        if key in mine:
            mine[key].copy_(value)


def by_lists(to: nn.Module, of: nn.Module) -> None:
    pairs = [(a, b) for a, b in zip(to.buffers(), of.buffers(), strict=False) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1.0)


def by_sums(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.buffers(), of.buffers(), strict=False):
        a.copy_(0.5 * a + 0.5 * b if a.is_floating_point() else b)


def by_data(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.buffers(), of.buffers(), strict=False):
        a.data.mul_(0).add_(b.data)


WAYS = [by_buffers, by_names, by_lists, by_sums, by_data]


@every
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_copying_one_for_one_across_the_first_input_says_what_to_do(way: Any, back: bool, name: str) -> None:
    layer, x = made(name)
    other = copy.deepcopy(layer)
    train(layer, x)
    before = state_of(layer)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"cannot be copied between .* run one batch .* place=.* steps="),
    ):
        way(*(layer, other) if back else (other, layer))
    for key, value in layer.state_dict().items():
        if not back:
            assert torch.equal(value, before[key])


@every
@pytest.mark.parametrize("when", ["before", "after", "given"])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.0)], ids=["mean", "last"])
def test_an_averaged_model(average: Any, when: str, name: str) -> None:
    layer, x = made(name, known=when == "given")
    if when == "after":
        train(layer, x)
    averaged = AveragedModel(layer, multi_avg_fn=average, use_buffers=True)
    train(layer, x)
    if when == "before":
        with pytest.raises(RuntimeError, match="run one batch through the model in training first"):
            averaged.update_parameters(layer)
        return
    for _ in range(2):
        averaged.update_parameters(layer)
    assert torch.equal(evaluated(averaged, x), evaluated(layer, x))
    assert all(b.numel() for b in averaged.buffers())


@every
def test_with_the_shape_given_buffers_never_change_it(name: str) -> None:
    (layer, x), (other, _) = made(name, known=True), made(name)
    shapes = [(key, buffer.shape) for key, buffer in layer.named_buffers()]
    held = [buffer.data_ptr() for buffer in layer.buffers()]
    assert not any(isinstance(buffer, Unshaped) for buffer in layer.buffers())
    copied = copy.deepcopy(layer)
    train(layer, x), train(other, x)
    assert [(key, buffer.shape) for key, buffer in layer.named_buffers()] == shapes
    assert [buffer.data_ptr() for buffer in layer.buffers()] == held
    assert {key: value.shape for key, value in other.state_dict().items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    torch.testing.assert_close(evaluated(layer, x), evaluated(other, x))  # the first call may be another kernel's
    by_buffers(copied, layer)
    assert torch.equal(evaluated(copied, x), evaluated(layer, x))


@every
def test_shared_memory(name: str) -> None:
    layer, x = made(name)
    layer.share_memory()
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=r"cannot be shared among processes before it.* run one batch"):
        layer(x)
    after = layer.state_dict()
    assert all(value.shape == after[key].shape and torch.equal(value, after[key]) for key, value in before.items())
    for known in (True, False):
        layer, x = made(name, known)
        if not known:
            train(layer, x, 1)
        layer.share_memory()
        train(layer, x)
        assert all(value.is_shared() for value in layer.buffers())


def test_wrong_places_and_steps_are_shown() -> None:
    for place in (7, (0, 3), (1, 2, 3, 4), (2.0, 3), "77"):
        with pytest.raises(ValueError, match="place is the size of a map, up to 3 whole numbers >= 1"):
            sn.BatchNorm(4, sn.BA6, place=place)  # type: ignore[arg-type]
    layer = sn.BatchNorm(4, sn.BA6, place=[3, 5])
    assert repr(layer) == "BatchNorm(4, ref=BA6, place=(3, 5))"
    with pytest.raises(ValueError, match=r"a map of size \(3, 5\), got \(5, 3\)"):
        layer(torch.randn(6, 4, 5, 3))
    with pytest.raises(ValueError, match="steps is a whole number >= 1, got 0"):
        sn.TimeSpecific(sn.BatchNorm, steps=0)(4)
    net = sn.NormGRU(4, 3, norm=sn.TimeSpecific(sn.BatchNorm, steps=5))
    before = state_of(net)
    with pytest.raises(ValueError, match=r"statistics of 5 time steps and the sequence has 7; write .*steps=7"):
        net(torch.randn(7, 6, 4))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(torch.randn(3, 6, 4))
    assert [layer.trained_steps for layer in net.cells["l0"].norms()] == [3] * 6
    assert net.eval()(torch.randn(9, 6, 4))[0].isfinite().all()


def test_a_longer_sequence_is_no_silent_loss_either() -> None:
    net = sn.NormRNN(4, 3, norm=TIMED())
    train(net, SEQUENCES[:3])
    other, names = copy.deepcopy(net), [key for key, _ in net.named_buffers()]
    train(net, SEQUENCES)
    assert [key for key, _ in net.named_buffers()] == names
    for way in WAYS:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"size|shape"):
            way(other, net)
    for which, t in (("norm_ih", 3), ("norm_hh", 2)):
        times = getattr(net.cells["l0"], which)["h"].times
        assert int(times[t].H1.seen) == (2 if t == 3 else 4)


def test_states_of_one_memory_a_step_load() -> None:
    net = sn.NormRNN(4, 3, norm=TIMED())
    train(net, SEQUENCES)
    old = {}
    for key, value in net.state_dict().items():
        head, H1, name = key.partition("H1.")
        old |= {f"{head}times.{t}.H1.{name}": one for t, one in enumerate(value)} if H1 else {key: value}
    other = sn.NormRNN(4, 3, norm=TIMED())
    other.load_state_dict(old)
    assert torch.equal(evaluated(net, SEQUENCES), evaluated(other, SEQUENCES))


def test_statistics_that_a_norm_comes_with_are_those_of_the_first_step() -> None:
    norm, x = sn.BatchNorm(4), torch.randn(6, 4)
    norm(x)
    want = evaluated(copy.deepcopy(norm), x)
    assert torch.equal(evaluated(TimeSpecificNorm(norm), x), want)


def test_layers_are_made_without_memory_of_their_own() -> None:
    with torch.device("meta"):
        nets = [sn.NormRNN(4, 3, norm=TIMED(**given)) for given in ({}, {"steps": 5})]
    for net in nets:
        net.to_empty(device="cpu")
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        train(net, SEQUENCES)
        assert evaluated(net, SEQUENCES).isfinite().all()


def test_a_functional_call_uses_the_statistics_it_is_given() -> None:
    net, other = (sn.NormRNN(4, 3, norm=TIMED(steps=5)) for _ in range(2))
    train(net, SEQUENCES), train(other, SEQUENCES * 3)
    want = evaluated(other, SEQUENCES)
    got = functional_call(net.eval(), dict(other.state_dict()), (SEQUENCES,))[0]
    assert torch.equal(got, want)
    assert not torch.equal(evaluated(net, SEQUENCES), want)
