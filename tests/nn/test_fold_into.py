"""Norms with constant statistics become part of the maps before them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from cases import draw
from torch import nn
from torch.nn.utils import parametrizations

import streamnorm as sn

MAPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 4, 6), (9, 4)),
    "linear without bias": (partial(nn.Linear, 4, 6, bias=False), (9, 4)),
    "1d": (partial(nn.Conv1d, 4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 7)),
    "2d": (partial(nn.Conv2d, 4, 6, 3, groups=2, stride=2, bias=False), (5, 4, 7, 6)),
    "3d": (partial(nn.Conv3d, 4, 6, 2, dilation=2), (3, 4, 4, 4, 4)),
    "transposed 1d": (partial(nn.ConvTranspose1d, 4, 6, 3), (5, 4, 7)),
    "transposed 2d": (partial(nn.ConvTranspose2d, 4, 6, 3, groups=2, stride=2, output_padding=1), (5, 4, 4, 5)),
    "transposed 3d": (partial(nn.ConvTranspose3d, 4, 6, 2, bias=False), (3, 4, 3, 2, 2)),
}
NORMS: dict[str, Any] = {
    "streaming": sn.StreamingNorm,
    "batch": partial(sn.BatchNorm, eps=0.1),
    "plain": partial(sn.StreamingNorm, affine=False),
    "all features": partial(sn.StreamingNorm, ref=sn.BA2),
    "groups": partial(sn.StreamingNorm, ref=sn.NormRef(3, "all", "batch")),
    "p = 1 about 0": partial(sn.StreamingNorm, p=1, center="zero"),
    "scale": partial(sn.Norm, ref=sn.BA1, moment=sn.Lp(2, "zero"), policy=sn.Evidence(), affine=True, op=sn.Scale()),
}


def trained(model: nn.Module, *shape: int) -> nn.Module:
    dtype = next(model.parameters()).dtype
    for step in range(2):
        model(2 * draw(shape, step).to(dtype) + 1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, sn.Affine):
                layer.weight.uniform_(0.5, 2)
                layer.bias.uniform_(-1, 1)
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("map_", MAPS)
def test_outputs_are_the_same(map_: str, norm: str) -> None:
    make, shape = MAPS[map_]
    model = trained(nn.Sequential(make(), NORMS[norm](6), nn.ReLU()), *shape)
    x, weight = draw(shape, 9).float(), model[0].weight
    before = model(x)
    assert sn.fold_into(model) is model
    assert type(model[1]) is nn.Identity
    assert model[0].weight is weight
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6 * before.abs().max().clamp_min(1).item())
    assert not any(isinstance(module, sn.Norm) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_frozen_parameters(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), sn.StreamingNorm(6)).to(dtype)
    model[0].weight.requires_grad_(False)
    trained(model, 9, 4)
    x = draw((5, 4), 9).to(dtype)
    before = model(x)
    sn.fold_into(model)
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(model(x), before, rtol=tolerance, atol=4 * tolerance)
    assert model[0].bias.dtype == dtype
    assert not model[0].bias.requires_grad


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), sn.BatchNorm(3)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), sn.StreamingNorm(3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.bn1(self.conv1(x)).relu())


def test_pairs_of_any_model() -> None:
    model = trained(Block(), 4, 3, 5, 5)
    x = draw((2, 3, 5, 5), 9).float()
    before = model(x)
    sn.fold_into(model, [("conv1", "bn1"), ("inner.0", "inner.1")])
    assert (type(model.bn1), type(model.inner[1])) == (nn.Identity, nn.Identity)
    assert torch.allclose(model(x), before, atol=2e-6)
    chained = trained(Block(), 4, 3, 5, 5)
    before = chained(x)
    sn.fold_into(chained)
    assert isinstance(chained.bn1, sn.BatchNorm)  # that conv1 is before it stands in forward alone
    assert torch.allclose(chained(x), before, atol=2e-6)


def test_features_that_stand_last_and_a_frozen_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), sn.convert(nn.LayerNorm(6)))
    trained(model, 5, 7, 4)
    sn.freeze(model).train()
    x = draw((3, 2, 4), 9).float()
    before = model(x)
    sn.fold_into(model)
    assert torch.allclose(model(x), before, atol=2e-6)


def chain(norm: nn.Module, map_: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(map_ or nn.Conv2d(3, 4, 2), norm)


def shared() -> nn.Module:
    model = trained(chain(sn.BatchNorm(4)), 4, 3, 5, 5)
    return nn.Sequential(*model, nn.ModuleList([model[1]]))


def hooked() -> nn.Module:
    model = trained(chain(sn.BatchNorm(4)), 4, 3, 5, 5)
    model[1].register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    model = trained(chain(sn.BatchNorm(4)), 4, 3, 5, 5).append(nn.Conv2d(3, 4, 2))
    model[2].weight = model[0].weight
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "training": (lambda: trained(chain(sn.BatchNorm(4)), 4, 3, 5, 5).train(), "it is in training"),
    "untrained": (lambda: chain(sn.StreamingNorm(4)).eval(), "it has no statistics yet"),
    "untrained places": (lambda: chain(sn.StreamingNorm(4, sn.BA6)).eval(), "it has no statistics yet"),
    "places": (lambda: trained(chain(sn.StreamingNorm(4, sn.BA6)), 4, 3, 5, 5), "statistics for every place"),
    "sample": (lambda: chain(sn.SampleNorm(4)).eval(), "each sample with its own statistics"),
    "shared": (shared, "the norm stands in 2 places"),
    "hooked": (hooked, "it has hooks"),
    "tied": (tied, "the map shares its weight with '1.2'"),
    "clamped": (lambda: trained(chain(sn.OnlineNorm(4)), 4, 3, 5, 5), "it does more than"),
    "parametrized": (
        lambda: trained(chain(sn.BatchNorm(4), parametrizations.weight_norm(nn.Conv2d(3, 4, 2))), 4, 3, 5, 5),
        "a pair is an nn.Linear",
    ),
    "width": (lambda: nn.Sequential(nn.Linear(3, 2), trained(sn.BatchNorm(4), 4, 4)).eval(), "4 features, and the map"),
    "last": (lambda: trained(chain(sn.convert(nn.LayerNorm(4))), 4, 3, 5, 5), "it takes its features from other axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_change_nothing(name: str) -> None:
    make, why = REFUSED[name]
    model = nn.Sequential(trained(nn.Sequential(nn.Linear(3, 2), sn.BatchNorm(2)), 8, 3), make())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=why):
        sn.fold_into(model, [("0.0", "0.1"), ("1.0", "1.1")])
    if name not in ("sample", "parametrized"):
        with pytest.raises(ValueError, match=rf"'1.1' \(\w+\) cannot be folded into '1.0' .*{why}"):
            sn.fold_into(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_and_pairs() -> None:
    model = trained(Block(), 4, 3, 5, 5)
    for pairs, why in (
        ([("conv1", "bn2")], "Block has no module 'bn2'"),
        ([("conv1", "bn1"), ("conv1", "bn1")], "belongs to one pair"),
        (["conv1"], "a pair is the name of a map"),
        ([("bn1", "conv1")], "a pair is an nn.Linear"),
    ):
        with pytest.raises((ValueError, TypeError), match=why):
            sn.fold_into(model, pairs)
    with pytest.raises(ValueError, match="ReLU has no norm with a memory that directly follows"):
        sn.fold_into(nn.ReLU())
