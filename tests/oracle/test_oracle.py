"""The oracle's definitions, R, S and N with exact gradients, against torch's layers and autograd in float64."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from masks import CENTERS, EPS, REFS, SHAPE, Masks, close, rand, ref
from torch import Tensor

from streamnorm.oracle import Oracle

# --- The exact special cases: torch's own layers


def grad_of(function, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (3, 2, 3, 4), (2, 2, 2, 3, 2)])
def test_streaming_reduces_to_batch_norm(shape):
    o = Oracle(**ref("BA1"), alpha=(0.0, 1.0), beta=(0.0, 0.0, 1.0))
    for seed in (1, 2, 3):
        x, dy = rand(*shape, seed=seed), rand(*shape, seed=seed + 10)
        y, dx = grad_of(lambda x: F.batch_norm(x, None, None, training=True, eps=EPS), x, dy)
        close(o.forward(x), y)
        close(o.backward(dy), dx)
        close(o.evaluate(x), y)
        o.update()


TORCH_LAYERS = {
    "layer_norm": (ref("SP2"), lambda x: F.layer_norm(x, x.shape[1:], eps=EPS)),
    "instance_norm": (ref("SP1"), lambda x: F.instance_norm(x, eps=EPS)),
    "group_norm": ({**ref("SP2"), "features": 2}, lambda x: F.group_norm(x, 2, eps=EPS)),
    "rms_norm": (
        {**ref("SP2"), "center": "zero", "subtract_mean": False},
        lambda x: F.rms_norm(x, x.shape[1:], eps=EPS),
    ),
}


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_sample_normalization_is_torchs(name):
    choice, layer = TORCH_LAYERS[name]
    x, dy = rand(*SHAPE, seed=1), rand(*SHAPE, seed=2)
    y, dx = grad_of(layer, x, dy)
    o = Oracle(**choice, policy="sample")
    close(o.forward(x), y)
    close(o.backward(dy), dx)
    close(o.evaluate(x), y)


# --- The exact policies: autograd of an independent expression


@pytest.mark.parametrize(("p", "subtract_mean"), [(1, True), (1.5, True), (2, True), (3, True), (1.5, False)])
@pytest.mark.parametrize(
    ("name", "policy", "center"),
    [
        *((name, "sample", center) for name in REFS if name.startswith("SP") for center in ("batch", "zero")),
        *((name, "batch", center) for name in REFS if name.startswith("BA") for center in CENTERS),
        ("BA1", "sample", "batch"),
    ],
)
def test_exact_gradients(name, policy, center, p, subtract_mean):
    masks = Masks(*REFS[name], shape=SHAPE, window=3)
    o = Oracle(**ref(name), window=3, p=p, center=center, policy=policy, subtract_mean=subtract_mean)
    mu_hat = None
    for seed in (1, 2):
        x, dy = rand(*SHAPE, seed=seed), rand(*SHAPE, seed=seed + 10)
        if policy == "batch":
            now = masks.S(x, p, "zero")[0, 0]
            mu_hat = now if mu_hat is None else 0.9 * mu_hat + 0.1 * now
        expected, dx = grad_of(lambda x: masks.N(x, masks.S(x, p, center, mu_hat), subtract_mean), x, dy)  # noqa: B023
        close(o.forward(x), expected)
        close(o.backward(dy), dx)


# --- Windows


@pytest.mark.parametrize("policy", ["exact", "streaming"])
@pytest.mark.parametrize(
    ("local", "other", "window"),
    [
        *(("SP3", "SP5", 1), ("BA3", "BA5", 1), ("BA4", "BA6", 1)),
        *(("SP3", "SP2", 9), ("SP4", "SP1", 9), ("BA3", "BA2", 9), ("BA4", "BA1", 9)),
    ],
)
def test_windows_collapse(local, other, window, policy):
    if policy == "exact":
        policy = "sample" if local.startswith("SP") else "batch"
    a, b = (Oracle(**ref(name), window=window, p=3, policy=policy, beta=(0.0, 0.0, 1.0)) for name in (local, other))
    x, dy = rand(2, 2, 3, 5), rand(2, 2, 3, 5, seed=1)
    close(a.forward(x), b.forward(x))
    if policy == "streaming" and window > 1:
        # The local references hold a copy of the statistic at every place; the gradients of the copies add up, and
        # a g_hat that is linear in g (as here) comes out the same.
        spread = a.estimate.reshape(2, a.estimate.shape[1], -1)
        close(spread, b.estimate[:, :, None].expand_as(spread))
    close(a.backward(dy), b.backward(dy))


def test_windows_at_the_border():
    """Three places, window 3: the ends average two places, the middle all three."""
    o = Oracle(**ref("BA4"), window=3, p=1, eps=0.0, policy="batch")
    o.forward(torch.tensor([[[1.0, 2.0, 6.0]]]))
    close(o.estimate[0, 0], torch.tensor([1.5, 3.0, 4.0], dtype=torch.float64))
    close(o.estimate[1, 0], torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("same", [("SP2", "SP3", "SP5"), ("BA1", "BA4", "BA6"), ("BA2", "BA3", "BA5")])
def test_references_collapse_without_place(same):
    x, dy = rand(4, 3), rand(4, 3, seed=1)
    oracles = [Oracle(**ref(name), p=1.5, center="estimate") for name in same]
    for results in (*zip(*([o.forward(x), o.backward(dy), o.H1.short, o.H2.short] for o in oracles), strict=True),):
        for other in results[1:]:
            close(other, results[0])


# --- Estimates and evaluation


def test_running_estimate_of_batch_policy():
    o = Oracle(**ref("BA1"), policy="batch", rate=0.25)
    s = []
    for seed in (1, 2, 3):
        x = rand(4, 2, seed=seed)
        o.forward(x)
        s.append(torch.stack((x.mean(0), (x.var(0, correction=0) + EPS).sqrt())))
        o.update()
    close(o.H1.long, 0.75 * (0.75 * s[0] + 0.25 * s[1]) + 0.25 * s[2])
    close(o.estimate, o.H1.long)
    close(o.evaluate(x), (x - o.H1.long[0]) / o.H1.long[1])
    assert (o.H1.count, o.H1.updates, o.H2.updates) == (0, 3, 0)


def test_evaluation_changes_nothing():
    o = Oracle(**ref("BA4"), window=3)
    with pytest.raises(RuntimeError, match="no estimate"):
        o.evaluate(rand(*SHAPE))
    o.forward(rand(*SHAPE))
    o.backward(rand(*SHAPE))
    before = (o.H1, o.H2, o.estimate, o.skipped)
    x = rand(*SHAPE, seed=2)
    y = o.evaluate(x)
    close(o.evaluate(x[1:2]), y[1:2])
    assert all(a is b for a, b in zip(before, (o.H1, o.H2, o.estimate, o.skipped), strict=True))
    o.update()
    close(o.evaluate(x), y)


# --- Limits of sigma


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_the_slope_at_the_center_is_zero(p):
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-3.0, 4.0]], dtype=torch.float64)
    dy = rand(3, 2)
    masks = Masks(*REFS["BA1"], shape=(3, 2), window=1)
    y, dx = grad_of(lambda x: masks.N(x, masks.S(x, p, "zero")), x, dy)
    o = Oracle(p=p, center="zero", policy="batch")
    close(o.forward(x), y)
    close(o.backward(dy), dx)


def test_constants():
    """Without any spread sigma is the floor sqrt(eps), and it has no gradient."""
    for p, center in itertools.product((1, 1.5, 2, 7), CENTERS):
        o = Oracle(p=p, center=center, beta=(0.0, 0.0, 1.0))
        o.forward(torch.zeros(3, 2))
        close(o.estimate[1], torch.full((2,), EPS**0.5, dtype=torch.float64))
        dy = rand(3, 2)
        close(o.backward(dy) * EPS**0.5, dy - dy.mean(0))


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_high_powers_neither_overflow_nor_vanish(scale):
    small, large = (Oracle(p=7, eps=0.0, policy="batch") for _ in range(2))
    x, dy = rand(4, 2), rand(4, 2, seed=1)
    close(large.forward(x * scale), small.forward(x))
    close(large.backward(dy) * scale, small.backward(dy))


# --- What it refuses


@pytest.mark.parametrize(
    "choice",
    [
        {"place": "somewhere"},
        {"samples": "two"},
        {"window": 4},
        {"center": "median"},
        {"p": 0.5},
        {"policy": "both"},
        {"policy": "sample", "center": "estimate"},
        {"policy": "batch", "samples": "one"},
    ],
)
def test_refuses(choice):
    with pytest.raises(ValueError, match=r"no reference|no statistics|does not go with|policy is"):
        Oracle(**choice)


def test_refuses_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="do not divide"):
        Oracle(features=3).forward(rand(2, 4))
    o = Oracle(**ref("BA6"))
    o.forward(rand(2, 3, 4))
    with pytest.raises(ValueError, match="does not fit"):
        o.forward(rand(2, 3, 1))


@pytest.mark.parametrize(("name", "parts"), [("oracle.py", {"streamnorm.oracle_rules"}), ("oracle_rules.py", set())])
def test_imports_nothing_of_ours(name: str, parts: set[str]):
    """Nothing but its own other file, which holds the newer rules."""
    source = Path(__file__).parents[2] / "streamnorm" / name
    imported = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    outside = {"__future__", "math", "collections.abc", "dataclasses", "itertools", "typing", "torch"}
    assert imported <= outside | parts
