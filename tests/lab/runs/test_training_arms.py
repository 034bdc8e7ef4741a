"""Architectures and arms: the layers that a run says, their first weights, and what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import small

from streamnorm.definition.ref import REFS
from streamnorm.definition.stats import DegenerateReferenceError
from streamnorm.lab.runs.classifier.models import ARMS, PEERS, Block, build
from streamnorm.nn.affine import Affine
from streamnorm.nn.norm import Norm

IMAGE = (1, 8, 8)
ONE_ACTIVATION = {
    # In A there is no place: one feature of one sample is one activation.
    ("A", 2): {"instance", "SP1-B", "SP4-B"},
    ("A", 1): {
        "instance",
        "SP1-B",
        "SP4-B",
        "batch",
        "tsbn",
        "batchrenorm",
        "BA1-B",
        "BA4-B",
        "BA6-B",
        "BA1-T",
        "BA4-T",
        "BA6-T",
    },
    # In B the maps of an 8x8 image hold at least 4x4 places; only "here" leaves one of them.
    ("B", 2): set(),
    ("B", 1): {"BA6-B", "BA6-T"},
}
"""The arms of Setting A whose references hold a single activation, by architecture and samples per batch."""


def images(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *IMAGE, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def test_the_arms_are_ten_names_the_peers_there_are_and_every_reference_in_two_forms() -> None:
    named = {"none", "layer", "instance", "group", "rms", "batch", "tsbn", "streaming", "paper", "default"}
    named |= PEERS.keys()
    named |= {f"{name}-T" for name, ref in REFS.items() if ref.samples == "batch"}
    assert set(ARMS) == named | {f"{ref}-{form}" for ref in REFS for form in "BS"}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("architecture", "m"), ONE_ACTIVATION)
def test_every_arm_has_finite_gradients_or_says_that_sigma_would_be_zero(architecture: str, m: int, arm: str) -> None:
    run = small(architecture=architecture, arm=arm, width=16)  # 16: two features in each of the 8 groups of "group"
    model = build(run, torch.zeros(IMAGE), 3)
    if arm in ONE_ACTIVATION[architecture, m]:
        with pytest.raises(DegenerateReferenceError, match=r"has no spread.*Setting A.*Setting B"):
            model(images(m)[0])
        return
    for step in range(3):  # one sample about its own estimate is 0: only a second one has a gradient
        x, y = images(m, step)
        output = model(x)
        assert output.shape == (m, 3)
        F.cross_entropy(output, y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.any(), f"{name} has no gradient"
    assert model.eval()(images(5)[0]).isfinite().all()


@pytest.mark.parametrize("architecture", ["A", "B"])
def test_arms_with_one_seed_start_from_the_same_weights(architecture: str) -> None:
    def weights(arm: str, seed: int) -> list[Tensor]:
        model = build(small(architecture=architecture, arm=arm, width=16, seed=seed), torch.zeros(IMAGE), 3)
        return [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]

    reference = weights("none", 5)
    assert len(reference) == {"A": 3 + 2, "B": 6 + 2}[architecture]
    for arm in ARMS:
        for a, b in zip(weights(arm, 5), reference, strict=True):
            assert torch.equal(a, b), arm
    assert not torch.equal(weights("none", 6)[0], reference[0])


@pytest.mark.parametrize("architecture", ["A", "B"])
def test_building_leaves_the_global_generator_alone(architecture: str) -> None:
    before = torch.get_rng_state()
    build(small(architecture=architecture, seed=3), torch.zeros(IMAGE), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_do_not_depend_on_the_global_generator() -> None:
    first = build(small(), torch.zeros(IMAGE), 3)
    torch.manual_seed(99)
    second = build(small(), torch.zeros(IMAGE), 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("architecture", "layers", "linears", "convolutions"), [("A", 3, 4, 0), ("B", 7, 1, 6)])
def test_the_architectures_have_their_layers_and_no_bias_before_a_normalization(
    architecture: str, layers: int, linears: int, convolutions: int
) -> None:
    model = build(small(architecture=architecture, width=8), torch.zeros(IMAGE), 3)
    kinds = [sum(isinstance(m, kind) for m in model.modules()) for kind in (Norm, nn.Linear, nn.Conv2d)]
    assert kinds == [layers, linears, convolutions]
    biased = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None]
    assert [type(m) for m in biased] == [nn.Linear]
    assert not biased[0].bias.any()


def test_architecture_b_halves_the_map_once_and_doubles_the_features() -> None:
    model = build(small(architecture="B", width=8), torch.zeros(IMAGE), 3)
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: shapes.append(tuple(y.shape[1:])))
    model(images(2)[0])
    assert shapes == [(8, 8, 8)] * 3 + [(16, 4, 4)] * 3


def test_a_block_adds_to_what_came_in() -> None:
    block = Block(4, Affine)
    nn.init.zeros_(block.branch[-1].weight)
    h = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(h), h)


def norm_of(arm: str, **changes: Any) -> nn.Module:
    model = build(small(arm=arm, width=16, **changes), torch.zeros(IMAGE), 3)
    return next(m for m in model.modules() if isinstance(m, (Norm, Affine)))


@pytest.mark.parametrize(
    ("arm", "changes", "layer"),
    [
        ("none", {}, "Affine(16)"),
        ("layer", {}, "Norm(16, SP2, Lp(p=2.0, center='batch', eps=1e-05), Sample(), affine=True)"),
        ("instance", {}, "Norm(16, SP1, Lp(p=2.0, center='batch', eps=1e-05), Sample(), affine=True)"),
        ("group", {}, "NormRef(features=8, place='all', samples='one')"),
        ("rms", {}, "Norm(16, SP2, Lp(p=2, center='zero', eps=1e-05), Sample(), affine=True, op=Scale())"),
        ("batch", {}, "Norm(16, BA1, Lp(p=2.0, center='batch', eps=1e-05), Batch(rate=0.1), affine=True)"),
        ("BA4-B", {"p": 1}, "Norm(16, BA4, Lp(p=1, center='batch', eps=1e-05), Batch(rate=0.1), affine=True)"),
        ("SP3-B", {"center": "zero"}, "Norm(16, SP3, Lp(p=2.0, center='zero', eps=1e-05), Sample(), affine=True)"),
        ("streaming", {}, "Norm(16, BA1, Lp(p=2.0, center='estimate', eps=1e-05), Streaming("),
        ("paper", {}, "Norm(16, BA1, Lp(p=2.0, center='estimate', eps=1e-05), Streaming("),
        ("default", {"alpha": (0.5, 0.5)}, "Norm(16, BA1, Lp(p=2.0, center='estimate', eps=1e-05), Evidence("),
        ("SP1-S", {"center": "zero"}, "Norm(16, SP1, Lp(p=2.0, center='zero', eps=1e-05), Streaming("),
        ("streaming", {"alpha": (0.5, 0.5)}, "Streaming(alpha=(0.5, 0.5), beta=(0.7, 0.3, 0.0), kappa=None)"),
        ("BA6-S", {"kappa": (0.9, 0.1, 0.8, 0.2)}, "kappa=(0.9, 0.1, 0.8, 0.2))"),
    ],
)
def test_an_arm_is_the_layer_that_its_name_and_the_run_say(arm: str, changes: dict[str, Any], layer: str) -> None:
    assert layer in repr(norm_of(arm, **changes))


@pytest.mark.parametrize(
    ("typo", "meant"), [("streming", "streaming"), ("BA6_S", "BA6-S"), ("layers", "layer"), ("Batch", "batch")]
)
def test_an_unknown_arm_is_refused_with_the_nearest_one(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown arm {typo!r}; did you mean {meant!r}?") as refusal:
        build(small(arm=typo), torch.zeros(IMAGE), 3)
    assert all(arm in str(refusal.value) for arm in ARMS)


def test_an_arm_like_no_other_is_refused_with_the_list_and_no_guess() -> None:
    with pytest.raises(ValueError, match="unknown arm '123'") as refusal:
        build(small(arm="123"), torch.zeros(IMAGE), 3)
    assert "did you mean" not in str(refusal.value)
    assert all(arm in str(refusal.value) for arm in ARMS)


@pytest.mark.parametrize("shape", [(16,), (4, 4), (1, 2, 4, 4)])
def test_architecture_b_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images \(c, height, width\), got") as refusal:
        build(small(architecture="B"), torch.zeros(shape), 3)
    assert f"got {shape}; use A" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 0.5}, "p is a number >= 1, got 0.5"),
        ({"center": "median"}, "center is \"batch\".*got 'median'"),
        ({"alpha": (1.0,)}, r"alpha is a tuple of 2 numbers, got \(1.0,\)"),
        ({"kappa": (1.0, 0.0)}, r"kappa is a tuple of 4 numbers, got \(1.0, 0.0\)"),
        ({"alpha": (1.0, 0.0)}, "give kappa"),
        ({"arm": "layer", "center": "estimate"}, r"needs a running estimate and Sample\(\) keeps none"),
        ({"arm": "group", "width": 12}, "12 features do not divide into 8 groups; choose a divisor of 12"),
    ],
)
def test_a_run_whose_layers_cannot_be_is_refused_before_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small(**changes), torch.zeros(IMAGE), 3)
