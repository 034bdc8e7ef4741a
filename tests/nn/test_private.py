"""Differential privacy: layers that mix samples are refused by a validator like opacus' and in its training."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from streamnorm import Affine, BatchNorm, SampleNorm, StreamingNorm, convert, freeze


@pytest.fixture
def validators(monkeypatch: pytest.MonkeyPatch) -> dict[type, Any]:
    """A stand-in for opacus: a registry of validators by type, and the class of their errors."""
    made: dict[type, Any] = {}
    package, errors = ModuleType("opacus.validators"), ModuleType("opacus.validators.errors")
    package.ModuleValidator = type("ModuleValidator", (), {"VALIDATORS": made})  # type: ignore[attr-defined]
    errors.ShouldReplaceModuleError = type("ShouldReplaceModuleError", (Exception,), {})  # type: ignore[attr-defined]
    for module in (ModuleType("opacus"), package, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def errors_of(model: nn.Module, validators: dict[type, Any]) -> list[Exception]:
    """As opacus looks: at modules that hold parameters themselves."""
    held = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    return [error for m in held if type(m) in validators for error in validators[type(m)](m)]


@pytest.mark.parametrize("make", [StreamingNorm, BatchNorm, lambda c: copy.deepcopy(StreamingNorm(c))])
def test_layers_that_mix_samples_announce_themselves(make: Any, validators: dict[type, Any]) -> None:
    (error,) = errors_of(nn.Sequential(nn.Linear(4, 4), make(4)), validators)
    assert "use SampleNorm" in str(error)
    assert not errors_of(nn.Sequential(nn.Linear(4, 4), SampleNorm(4), Affine(4)), validators)


def test_converted_layers_do_too(validators: dict[type, Any]) -> None:
    assert len(errors_of(convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), validators)) == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("make", [StreamingNorm, BatchNorm])
def test_training_on_gradients_of_single_samples_is_refused(
    make: Any, affine: bool, validators: dict[type, Any]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(4, affine=affine))
    model(torch.randn(8, 4)).sum().backward()  # opacus is there, and records nothing
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad_sample = None  # as opacus marks what it records
    for mask in ({}, {"mask": torch.ones(8, dtype=torch.bool)}):
        with pytest.raises(RuntimeError, match="its gradient is not its own"):
            model[1](model[0](torch.randn(8, 4)), **mask)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    freeze(model)
    model(torch.randn(8, 4))
    nn.Sequential(model[0], SampleNorm(4))(torch.randn(8, 4))
