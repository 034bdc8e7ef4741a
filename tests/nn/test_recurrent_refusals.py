"""What recurrent layers refuse: input, states and settings, shown and without a change of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequences import same_state, state_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import streamnorm as sn


def packed(sizes: list[int], rows: int, width: int = 4) -> PackedSequence:
    return PackedSequence(torch.randn(rows, width), torch.tensor(sizes, dtype=torch.int64), None, None)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no steps": (torch.randn(0, 5, 4), None, ValueError, r"5 sequences of no time steps in \(0, 5, 4\)"),
    "input size": (torch.randn(6, 5, 3), None, ValueError, r"input_size 4, got \(6, 5, 3\)"),
    "rank": (torch.randn(4), None, ValueError, r"\(T, n, input_size\) or \(T, input_size\).*got \(4,\)"),
    "no tensor": ([1.0], None, TypeError, "or a PackedSequence, got list"),
    "complex": (torch.randn(6, 5, 4) + 0j, None, ValueError, "the input has to be real, got torch.complex64; give"),
    "whole": (torch.ones(6, 5, 4).long(), None, ValueError, r"a floating dtype, got torch.int64; write x.float\(\)"),
    "dtype": (torch.randn(6, 5, 4).double(), None, ValueError, "the input is torch.float64 on cpu"),
    "state": (torch.randn(6, 5, 4), torch.randn(1, 4, 3), ValueError, r"\(num_layers, n, hidden_size\) = \(1, 5, 3\)"),
    "state of one": (torch.randn(6, 4), torch.randn(1, 1, 3), ValueError, r"\(num_layers, hidden_size\) = \(1, 3\)"),
    "state dtype": (torch.randn(6, 5, 4), torch.randn(1, 5, 3).double(), ValueError, "the state h_0 is torch.float64"),
    "state pair": (torch.randn(6, 5, 4), (torch.randn(1, 5, 3),) * 2, TypeError, "a tensor h_0 or None, got tuple"),
    "packed rows": (packed([3, 2], 6), None, ValueError, r"6 rows with batch_sizes \(3, 2\), 5 in all"),
    "packed order": (packed([2, 3], 5), None, ValueError, "must never increase"),
    "packed empty": (packed([2, 0], 2), None, ValueError, "be at least 1"),
    "packed width": (packed([3, 2], 5, 3), None, ValueError, r"\(rows, input_size\) = \(5, 4\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bad_input_is_shown_and_changes_nothing(case: str, mode: str) -> None:
    x, hx, kind, message = BAD[case]
    net = sn.NormGRU(4, 3)
    net(torch.randn(6, 5, 4))
    net.train(mode == "train")
    before = state_of(net)
    with pytest.raises(kind, match=message):
        net(x, hx)
    assert same_state(net, before)


def test_a_step_with_too_few_sequences_for_a_norm_is_refused_before_the_first_step() -> None:
    net = sn.NormRNN(4, 3, norm=sn.BatchNorm)
    x = pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    before = state_of(net)
    with pytest.raises(sn.DegenerateReferenceError):
        net(x)
    assert same_state(net, before)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: sn.NormRNN(0, 3), ValueError, "input_size is a whole number >= 1, got 0"),
        (lambda: sn.NormRNN(4, 2.5), ValueError, "hidden_size is a whole number >= 1, got 2.5"),
        (lambda: sn.NormRNN(4, 3, 0), ValueError, "num_layers is a whole number >= 1, got 0"),
        (lambda: sn.NormRNN(4, 3, 2, dropout=1.5), ValueError, "dropout is a probability"),
        (lambda: sn.NormGRU(4, 3, nonlinearity="selu"), ValueError, "nonlinearity is .* got 'selu'"),
        (lambda: sn.NormGRU(4, 3, backward_stats="last"), ValueError, "backward_stats is .* got 'last'"),
        (lambda: sn.NormGRU(4, 3, norm=sn.StreamingNorm(3)), TypeError, "by what makes one of c features"),
        (lambda: sn.NormGRU(4, 3, norm=lambda c: None), TypeError, "by what makes one of c features"),
        (lambda: sn.NormGRU(4, 3, bias=False), TypeError, "NormGRU has no bias: a norm brings its own"),
        (lambda: sn.NormRNN(4, 3, proj_size=2), TypeError, "NormRNN has no proj_size: .* torch.nn.Linear"),
        (lambda: sn.NormLSTM(4, 3, bias=True), TypeError, "NormLSTM has no bias: a norm brings its own"),
        (lambda: sn.NormLSTM(4, 3, layers=2), TypeError, "NormLSTM has no layers: .* num_layers, "),
    ],
)
def test_wrong_settings_are_shown(make: Callable[[], nn.Module], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("hx", [torch.randn(5, 3), (torch.randn(5, 3),), (torch.randn(5, 3), None)])
def test_an_lstm_wants_a_pair(hx: Any) -> None:
    with pytest.raises(TypeError, match=r"a tuple \(h, c\) of tensors"):
        sn.NormLSTMCell(4, 3)(torch.randn(5, 4), hx)
    with pytest.raises(TypeError, match=r"a tuple \(h_0, c_0\) of tensors"):
        sn.NormLSTM(4, 3)(torch.randn(6, 5, 4), hx)


@pytest.mark.parametrize(("theirs", "ours"), [(nn.RNN, sn.NormRNN), (nn.LSTM, sn.NormLSTM), (nn.GRU, sn.NormGRU)])
def test_the_state_of_a_layer_of_torch_is_recognized_and_what_is_said_of_it_holds(theirs: Any, ours: Any) -> None:
    other, net = theirs(4, 3), ours(4, 3, norm=None)
    said = "computes something else" if ours is sn.NormGRU else "Without a norm it computes the same"
    with pytest.warns(UserWarning, match=rf"weight_ih_l0 is cells.l0.weight_ih here, and so on. .*{said}"):
        keys = net.load_state_dict(other.state_dict(), strict=False)
    assert set(keys.unexpected_keys) == set(other.state_dict())
    with pytest.warns(UserWarning, match="layer of torch"), pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(other.state_dict())
    net.load_state_dict({f"cells.l0.{name.removesuffix('_l0')}": value for name, value in other.state_dict().items()})
    x = torch.randn(6, 5, 4)
    # Both add up 7 products in float32 at each of 6 steps; what another gate does is a thousand times as much.
    assert torch.allclose(net(x)[0], other(x)[0], atol=1e-5) == (ours is not sn.NormGRU)


def test_a_subclass_takes_what_it_says() -> None:
    class Encoder(sn.NormRNN):
        def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
            super().__init__(input_size, hidden_size, **options)

    class Tagger(sn.NormLSTM):
        def __init__(self, input_size: int, hidden_size: int, num_layers: int, classes: int) -> None:
            super().__init__(input_size, hidden_size, num_layers)
            self.read = nn.Linear(hidden_size, classes)

    assert Encoder(4, 3, bidirectional=True).bidirectional
    assert Tagger(4, 3, 1, 10).read.out_features == 10
    with pytest.raises(TypeError, match="Tagger has no bias: a norm brings its own"):
        Tagger(4, 3, 1, 10, bias=True)  # type: ignore[call-arg]
