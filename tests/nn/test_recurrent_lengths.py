"""Sequences of several lengths: each is computed as if it were alone, and read from its own end where a layer reads
backwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from close import assert_close
from sequences import NETS, NORMS, STEPS, flat, initial, sequences
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, unpack_sequence

import streamnorm as sn
from streamnorm.ops.backends import using

BACKENDS = ["cpu", "generic"]
MIXED_PATHS = {
    "time-specific input": {"norm": NORMS["time-specific"], "norm_h": NORMS["streaming"]},
    "time-specific hidden": {"norm": NORMS["streaming"], "norm_h": NORMS["time-specific"]},
}
"""One path in compiled passes, the other in the loop."""
EVERY: dict[str, dict[str, Any]] = {**{name: {"norm": norm} for name, norm in NORMS.items()}, **MIXED_PATHS}


def drawn(most: int = 7, least: int = 1) -> tuple[int, ...]:
    """Lengths in any order, one of them the longest."""
    return tuple(torch.randint(least, most + 1, (5,)).tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", EVERY)
@pytest.mark.parametrize("name", NETS)
def test_a_tested_sequence_does_not_depend_on_its_companions(name: str, norm: str, backend: str) -> None:
    for seed, layers in ((0, 1), (1, 2)):
        torch.manual_seed(seed)
        net = NETS[name](4, 3, layers, bidirectional=True, **EVERY[norm]).double()
        with using(backend):
            for _ in range(2):  # statistics that differ from step to step
                steps = torch.arange(1, 7, dtype=torch.float64).reshape(6, 1, 1)
                net(torch.randn(6, 16, 4, dtype=torch.float64) * steps)
            net.eval()
            parts = sequences(lengths=drawn())
            y, final = net(pack_sequence(parts, enforce_sorted=False))
            for i, (part, rows) in enumerate(zip(parts, unpack_sequence(y), strict=True)):
                alone, last = net(part)
                assert_close(f"output {i} of {[*map(len, parts)]}", rows.detach(), alone.detach(), STEPS)
                for a, b in zip(flat(final), flat(last), strict=True):
                    assert_close(f"state {i}", a[:, i].detach(), b.detach(), STEPS)


def backwards(net: Any, packed: PackedSequence, hx: Any) -> tuple[Tensor, Any]:
    """What the backward direction computes, by a net of one direction: each sequence is reversed by itself."""
    forward = type(net)(net.input_size, net.hidden_size, **net.made_with).double()
    forward.cells["l0"] = net.cells["l0_reverse"]
    parts = [part.flip(0) for part in unpack_sequence(packed)]
    y, final = forward(pack_sequence(parts), hx)
    return pad_packed_sequence(pack_sequence([rows.flip(0) for rows in unpack_sequence(y)]))[0], final


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", EVERY)
@pytest.mark.parametrize("name", NETS)
def test_a_backward_direction_trains_on_reversed_sequences(name: str, norm: str, backend: str) -> None:
    """Outputs, every gradient and all state; it holds for every norm, whose mini-batch is a time step."""
    torch.manual_seed(0)
    net = NETS[name](4, 3, bidirectional=True, **EVERY[norm]).double()
    net.made_with = EVERY[norm]
    twin = copy.deepcopy(net)
    with using(backend):
        for lengths in [(6, 6, 5, 3, 2, 2), (4, 4, 4), (7, 7, 3)]:
            found = []
            for each, one in ((net, False), (twin, True)):
                torch.manual_seed(sum(lengths))
                parts = [part.requires_grad_() for part in sequences(lengths=lengths)]
                packed, hx = pack_sequence(parts), initial(net, 2, len(lengths))
                half = tuple(part[1:] for part in flat(hx))
                if one:
                    y, final = backwards(each, packed, half if len(half) > 1 else half[0])
                else:
                    both, final = each(packed, hx)
                    y = pad_packed_sequence(both)[0][..., 3:]
                    final = tuple(part[1:] for part in flat(final))
                torch.manual_seed(1)
                (y * torch.randn(y.shape, dtype=y.dtype)).sum().backward()
                found.append((y, flat(final), parts, each.cells["l0_reverse"]))
            for what, a, b in compared(*found):
                assert_close(f"{lengths}: {what}", a.detach(), b.detach(), STEPS)
            for each in (net, twin):
                for norm_ in each.modules():
                    if isinstance(norm_, sn.Norm):
                        norm_.fold()


def compared(mine: Any, theirs: Any) -> list[tuple[str, Tensor, Tensor]]:
    (y, final, parts, cell), (y2, final2, parts2, cell2) = mine, theirs
    pairs = [("output", y, y2), *(("state", a, b) for a, b in zip(final, final2, strict=True))]
    pairs += [("dx", a.grad, b.grad) for a, b in zip(parts, parts2, strict=True)]
    for (key, a), b in zip(cell.named_parameters(), cell2.parameters(), strict=True):
        pairs.append((key, a.grad, b.grad))
    state = cell2.state_dict()
    assert state.keys() == cell.state_dict().keys()
    return [*pairs, *((key, value.double(), state[key].double()) for key, value in cell.state_dict().items())]


def test_time_steps_of_a_backward_direction_count_from_the_end_of_each_sequence() -> None:
    net = sn.NormRNN(4, 3, bidirectional=True, norm=sn.TimeSpecific(sn.BatchNorm)).double()
    lengths = (6, 6, 5, 3, 2, 2)
    parts = sequences(lengths=lengths)
    net(pack_sequence(parts))
    cell = net.cells["l0_reverse"]
    layer = cell.norm_ih["h"]
    for t in range(6):
        last = torch.stack([part[-1 - t] for part in parts if len(part) > t]) @ cell.weight_ih.T
        if len(last) > 1:
            assert_close(f"mean {t}", layer.times[t].H1.estimate[0], last.detach().mean(0), STEPS)
