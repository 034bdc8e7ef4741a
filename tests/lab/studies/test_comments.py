"""The study of two comments: its networks, its curvature and its laws by hand, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import steps, to_the_end, toy

from streamnorm.lab.runs.classifier.loop import Trainer
from streamnorm.lab.runs.classifier.models import Block
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.arguments import Arguments
from streamnorm.lab.studies.comments.arrangement import (
    AFTER,
    ARRANGEMENTS,
    BARE_AFTER,
    BARE_BEFORE,
    BEFORE,
    ArrangedRun,
    ArrangedTrainer,
)
from streamnorm.lab.studies.comments.claims import CLAIMS, at_the_same_loss, gap, share_below
from streamnorm.lab.studies.comments.curvature import hessian, largest_eigenvalue, loss_and_gradient, relative
from streamnorm.lab.studies.comments.runs import FACTORS, RATES, TIERS, CurvedTrainer, rated, runs, scaling
from streamnorm.lab.studies.comments.study import main
from streamnorm.nn.layers import BatchNorm, StreamingNorm
from streamnorm.nn.norm import Norm

CHECK = {claim.id: claim.check for claim in CLAIMS}
B = {"data": "toy", "architecture": "B", "arm": "batch", "width": 4, "samples_per_batch": 13, "batches_per_update": 1}


# --- Where the normalization stands


def arranged(name: str) -> ArrangedTrainer:
    return ArrangedTrainer(ArrangedRun(**B, arrangement=name), toy())


def watched(model: nn.Module, kind: type[nn.Module], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes into each layer of a kind and what comes out, in training."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.detach())))
        for module in model.modules()
        if isinstance(module, kind)
    ]
    model.train()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", [BEFORE, BARE_BEFORE])
def test_before_means_right_before_each_convolution(name: str) -> None:
    trainer = arranged(name)
    model, x = trainer.model, trainer.data.train_x
    convolutions, normalized = watched(model, nn.Conv2d, x), watched(model, Norm, x)
    assert (len(convolutions), len(normalized)) == (6, 7), "and one before the read-out"
    for (taken, _), (_, given) in zip(convolutions, normalized, strict=False):
        assert torch.equal(taken, given)
    ((pooled, _),) = watched(model, nn.AdaptiveAvgPool2d, x)
    assert torch.equal(pooled, normalized[-1][1])
    branches = [[type(layer) for layer in m.branch] for m in model.modules() if isinstance(m, Block)]
    assert branches == [[nn.ReLU, Norm, nn.Conv2d] * 2] * 2
    for _, given in normalized:
        mean, variance = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
        # Means of a few hundred values of order 1 in float32; the variance lacks eps / (var + eps).
        assert mean.abs().max() < 1e-5
        assert (variance - 1).abs().max() < 1e-2


@pytest.mark.parametrize("name", [BARE_AFTER, BEFORE, BARE_BEFORE])
def test_what_is_learned_beside_the_weights(name: str) -> None:
    usual, trainer = arranged(AFTER), arranged(name)
    weights, own = ([p for p in t.model.parameters() if p.ndim > 1] for t in (usual, trainer))
    assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True)), "the weights begin alike"
    assert len(list(usual.model.parameters())) == len(weights) + 2 * 7 + 1, "gains, biases, the read-out's bias"
    others = [n for n, p in trainer.model.named_parameters() if p.ndim == 1]
    assert len(others) == (7 if name == BEFORE else 1)
    convolutions = [m for m in trainer.model.modules() if isinstance(m, nn.Conv2d)]
    assert all((m.bias is None) == (name != BEFORE) for m in convolutions)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_after_is_architecture_b_bit_for_bit() -> None:
    usual, own = Trainer(Run(**B), toy()), arranged(AFTER)
    for _ in range(6):
        usual.step()
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(usual.model.parameters(), own.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_trains_and_goes_on_where_it_was_stopped(name: str) -> None:
    whole, first, second = (arranged(name) for _ in range(3))
    begun = [p.detach().clone() for p in whole.model.parameters()]
    second.restore(steps(first, 5).state())
    steps(whole, 9)
    steps(second, 4)
    for a, b, c in zip(whole.model.parameters(), second.model.parameters(), begun, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c), "every parameter is trained"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arrangement": "beside"}, "arrangement is one of 'after, gain and bias', .*, got 'beside'"),
        ({"architecture": "A"}, "of architecture B and the arm 'batch', got 'A' and 'batch'"),
        ({"arm": "layer"}, "of architecture B and the arm 'batch', got 'B' and 'layer'"),
    ],
)
def test_an_arrangement_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ArrangedRun(**{**B, **changes})


# --- Curvature


def symmetric(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.T


def test_the_largest_eigenvalue_of_a_known_matrix() -> None:
    matrix = symmetric(40)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # All 40 vectors span everything: the roundings of float64 over as many products remain.
    assert largest_eigenvalue(lambda v: matrix @ v, 40, 100) == pytest.approx(eigenvalues[-1].item(), rel=1e-12)
    down = matrix - 50 * torch.eye(40, dtype=torch.float64)
    assert largest_eigenvalue(lambda v: down @ v, 40, 40) == pytest.approx(eigenvalues[-1].item() - 50, rel=1e-12)
    few = [largest_eigenvalue(lambda v: matrix @ v, 40, count) for count in (1, 2, 5, 10)]
    assert few == sorted(few), "more vectors hold those before them"
    assert few[-1] <= eigenvalues[-1]


def test_eigenvalues_that_coincide_end_the_search() -> None:
    assert largest_eigenvalue(lambda v: 2 * v, 30, 20) == pytest.approx(2, rel=1e-14)
    assert largest_eigenvalue(torch.zeros_like, 30, 20) == 0


def plain(norm: Callable[[], nn.Module], depth: int = 2) -> nn.Sequential:
    """Twice linear, norm and tanh, which has no kink, of 4 units; and a read-out."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (16, 4)[:depth]:
        layers += [nn.Linear(before, 4, bias=False), norm(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


class WrittenOut(nn.Module):
    """Batch normalization in single operations: nn.BatchNorm1d (torch 2.13) has no symmetric Hessian in torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.var(0, correction=0) + 1e-5).sqrt()
        return (x - x.mean(0)) / deviation * self.weight + self.bias


def hessian_by_autograd(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """All of it, by ``torch.func``."""
    model, x = model.double().train(), x.double()
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.reshape(v.shape) for part, v in zip(flat.split(sizes), values, strict=True)]
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    return torch.func.jacrev(torch.func.jacrev(loss))(torch.cat([value.detach().flatten() for value in values]))


@pytest.mark.parametrize("kind", ["identity", "batch"])
def test_products_are_those_of_the_hessian(kind: str) -> None:
    data = toy()
    x, y = data.train_x, data.train_y
    model = plain(nn.Identity if kind == "identity" else lambda: BatchNorm(4))
    twin = plain(nn.Identity if kind == "identity" else WrittenOut)
    matrix = hessian_by_autograd(twin, x, y)
    product = hessian(model, x, y)
    v = torch.randn(len(matrix), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Rounding of the gradient over the step, 1e-16 / 1e-8 of it, by a handful of layers.
    assert (product(v) - matrix @ v).norm() <= 1e-6 * (matrix @ v).norm()
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    assert largest_eigenvalue(product, len(matrix), 40) == pytest.approx(top, rel=1e-6)
    lengths = torch.cat([p.detach().norm().expand(p.numel()) for p in twin.parameters()])
    top = torch.linalg.eigvalsh(lengths * matrix * lengths[:, None])[-1].item()
    assert largest_eigenvalue(relative(product, model), len(matrix), 40) == pytest.approx(top, rel=1e-6)


def test_a_look_at_the_curvature_leaves_the_model_as_it_is() -> None:
    data = toy()
    model = plain(lambda: BatchNorm(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hessian(model, data.train_x, data.train_y)(torch.ones(sum(p.numel() for p in model.parameters())).double())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_relative_curvature_does_not_know_the_scale_of_normalized_weights() -> None:
    data = toy()
    tops = []
    for a in (1.0, 8.0):
        model = plain(lambda: BatchNorm(4, eps=0.0))
        first = model[1]
        assert isinstance(first, nn.Linear)
        first.weight.data.mul_(a)
        product, size = hessian(model, data.train_x, data.train_y), sum(p.numel() for p in model.parameters())
        own = torch.zeros(size, dtype=torch.float64)
        own[: first.weight.numel()] = 1
        block = largest_eigenvalue(lambda v, product=product, own=own: own * product(own * v), size, 40)
        tops.append((block * a**2, largest_eigenvalue(relative(product, model), size, 40)))
    assert tops[1] == pytest.approx(tops[0], rel=1e-5)


def test_what_streams_has_no_hessian() -> None:
    data = toy()
    with pytest.raises(ValueError, match=r"normalize with Batch\(\) or Sample\(\), got StreamingNorm"):
        hessian(plain(lambda: StreamingNorm(4)), data.train_x, data.train_y)


# --- The gradient and the scale of the weights


def test_a_gradient_is_divided_by_what_the_weights_are_multiplied_by() -> None:
    data = toy()
    found = scaling(plain(lambda: BatchNorm(4)), data.train_x, data.train_y)
    assert [line["factor"] for line in found["0"]] == list(FACTORS)
    for line in found["0"]:
        # Float64 through a handful of layers, whatever the power of two that a is not.
        assert max(line["loss"], line["gradient"]) <= 1e-12
    off = {line["factor"]: line["gradient"] for line in found["1e-05"]}
    # Of variances about 1, eps / a^2 is 0.1, 1e-3 and less: it shows where weights become small.
    assert off[0.01] > 10 * off[0.1] > 10 * off[100.0] > 0
    without = scaling(plain(nn.Identity), data.train_x, data.train_y)
    assert all(line["gradient"] > 0.1 for line in without["0"])


def test_eps_enters_as_an_eps_divided_by_the_square() -> None:
    data = toy()
    x, y = data.train_x.double(), data.train_y
    gradients = []
    for a, eps in ((0.1, 1e-3), (1.0, 1e-1)):
        model = plain(lambda eps=eps: BatchNorm(4, eps=eps), depth=1).double()
        first = model[1]
        assert isinstance(first, nn.Linear)
        first.weight.data.mul_(a)
        loss, gradient = loss_and_gradient(model, x, y)
        gradients.append((loss, a * gradient[: first.weight.numel()]))
    assert gradients[0][0].item() == pytest.approx(gradients[1][0].item(), rel=1e-12)
    assert gradients[0][1].numpy() == pytest.approx(gradients[1][1].numpy(), rel=1e-9, abs=1e-15)


# --- Training under observation

A = Run(data="toy", arm="batch", width=8, samples_per_batch=13, batches_per_update=1, epochs=3, learning_rate=0.05)
SIZE = replace(TIERS["smoke"], every=3, samples=20, steps=3)


def test_a_look_changes_nothing_and_is_kept() -> None:
    plain_run, seen, first, second = Trainer(A, toy()), *(CurvedTrainer(A, toy(), SIZE) for _ in range(3))
    for trainer in (plain_run, seen):
        to_the_end(trainer)
    assert [look["updates"] for look in seen.trace] == [0, 3, 6, 9, 11], "the last update of all is left undone"
    assert all(torch.equal(a, b) for a, b in zip(plain_run.model.parameters(), seen.model.parameters(), strict=True))
    second.restore(steps(first, 5).state())
    assert to_the_end(second).trace == seen.trace  # type: ignore[attr-defined]
    assert seen.trace[-1]["test_error"] == seen.metrics[-1]["test_error"]
    assert "scaling" in seen.record()


def test_a_look_is_at_the_weights_of_its_update() -> None:
    trainer = CurvedTrainer(A, toy(), replace(SIZE, steps=40))
    size = sum(p.numel() for p in trainer.model.parameters())
    expected = largest_eigenvalue(hessian(trainer.model, *trainer.looked_at()), size, 40)
    steps(trainer, 1)
    assert trainer.trace[0]["curvature"] == expected
    assert len(trainer.looked_at()[0]) == 20


def test_a_run_that_diverges_says_so_and_has_no_curvature() -> None:
    trainer = CurvedTrainer(replace(A, arm="none", learning_rate=1e12), toy(), replace(SIZE, every=1))
    to_the_end(trainer)
    assert trainer.failed
    assert "diverged" in trainer.failed
    assert "scaling" not in trainer.record()


# --- Claims


def of_b(error: float, failed: str | None = None) -> dict[str, Any]:
    return {"metrics": [{"test_error": error}], "failed": failed}


@pytest.mark.parametrize(
    ("error", "verdict"), [(0.41, "reproduced"), (0.424, "reproduced"), (0.39, "contradicted"), (0.43, "contradicted")]
)
def test_the_arrangements_may_be_a_point_and_a_half_apart(error: float, verdict: str) -> None:
    records = {name: [of_b(0.41)] * 3 for name in ARRANGEMENTS} | {BEFORE: [of_b(error)] * 3}
    assert CHECK["C-49"](records)[0] == verdict
    records[BEFORE] = [of_b(0.41, "diverged")] * 3
    assert CHECK["C-49"](records)[0] == "contradicted"


def of_a(curvature: float, off: float = 1e-12, failed: str | None = None, speed: float = 1.0) -> dict[str, Any]:
    """A run whose curvature doubles from look to look while its training loss falls from 1 by ``speed`` / 4 each."""
    trace = [
        {
            "updates": 10 * i,
            "train_loss": 1 - speed * i / 4,
            "test_loss": 1.5,
            "train_error": 0.1,
            "test_error": 0.3,
            "curvature": curvature * 2**i,
            "relative": curvature * 2**i,
        }
        for i in range(4)
    ]
    line = {"factor": 10.0, "loss": off, "gradient": off}
    return {"trace": trace, "failed": failed, "scaling": {"0": [line], "1e-05": [{**line, "gradient": 0.1}]}}


def pairs(none: list[dict[str, Any]], batch: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {rated(arm, rate): seeds for rate in RATES for arm, seeds in (("none", none), ("batch", batch))}


def test_the_law_holds_for_batch_normalization_to_a_millionth_and_not_without() -> None:
    assert CHECK["C-50"](pairs([of_a(1, off=3.0)] * 3, [of_a(1)] * 3))[0] == "reproduced"
    verdict, figures = CHECK["C-50"](pairs([of_a(1)] * 3, [of_a(1), of_a(1), of_a(1, off=2e-6)]))
    assert verdict == "contradicted"
    assert "batch, eps 0: loss off by 2.0e-06" in figures
    assert CHECK["C-50"](pairs([of_a(1)], [of_a(1, failed="diverged")]))[0] == "contradicted"


def test_curvature_is_judged_along_the_path_at_every_rate() -> None:
    lower = pairs([of_a(4)] * 3, [of_a(1)] * 3)
    assert CHECK["C-51"](lower)[0] == "reproduced"
    assert CHECK["C-51"](pairs([of_a(4)] * 3, [of_a(5)] * 3))[0] == "contradicted"
    assert CHECK["C-51"](lower | {rated("batch", RATES[0]): [of_a(5)] * 3})[0] == "partly"
    assert CHECK["C-51"](pairs([of_a(4)] * 3, [of_a(1), of_a(1), of_a(9)]))[0] == "reproduced", "two seeds in three"
    assert CHECK["C-51"](pairs([of_a(4)] * 3, [of_a(1, failed="diverged")] * 3))[0] == "contradicted"


def test_looks_at_the_same_training_loss_by_hand() -> None:
    # Losses 1, 0.75, 0.5, 0.25, and 1, 0.875, 0.75, 0.625: the one is at 0.625 or below at its third look.
    assert at_the_same_loss(of_a(1), of_a(1, speed=0.5), "curvature") == (4.0, 8.0)
    assert all(map(math.isnan, at_the_same_loss(of_a(1), of_a(1, failed="diverged"), "curvature")))
    assert share_below(of_a(1), of_a(2), "relative") == 1
    assert share_below(of_a(2), of_a(2), "relative") == 0
    assert gap({"a": [of_a(1)]}, "a", "error") == pytest.approx([0.2])
    assert gap({"a": [of_a(1)]}, "a", "loss") == pytest.approx([1.25])


# --- The study


def test_the_runs_differ_as_their_names_say() -> None:
    for tier in TIERS.values():
        named = runs(tier)
        assert list(named) == [*ARRANGEMENTS, *(rated(arm, rate) for rate in RATES for arm in ("none", "batch"))]
        assert len({(run.data, run.train_limit, run.test_limit) for run in named.values()}) == 1
        for name, run in named.items():
            size = 32 if name in ARRANGEMENTS else 64
            assert run.samples_per_batch == run.samples_per_update == size
            assert run.architecture == ("B" if name in ARRANGEMENTS else "A")
            assert name in (getattr(run, "arrangement", None), rated(run.arm, run.learning_rate))


def test_a_smoke_run_goes_from_training_to_the_record_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Arguments("smoke", tmp_path, seeds=(0,))
    page = main(arguments).read_text()
    for claim in CLAIMS:
        assert f"| {claim.id}: {claim.text} | **" in page
    assert "| C-50: " + CLAIMS[1].text + " | **reproduced** |" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(results) == list(runs(TIERS["smoke"]))

    def never(*_: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(Trainer, "step", never)
    assert main(arguments).read_text() == page
