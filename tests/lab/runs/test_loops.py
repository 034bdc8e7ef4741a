"""Architectures C and D, whose convolutions are recurrent in time: as modules, and as runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import flat, small, steps, to_the_end, toy

import streamnorm as sn
from streamnorm.lab.cli import main
from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.checkpoint import CheckpointError
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate, reloop
from streamnorm.lab.runs.classifier.models import ARMS, Convolutional, FullyRecurrent, build
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.underway import load_model
from streamnorm.ops import backends

# --- The modules


def image(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.BatchNorm, sn.SampleNorm, nn.BatchNorm2d])
def test_c_of_one_and_one_is_b_bit_for_bit(norm: type[nn.Module]) -> None:
    torch.manual_seed(3)
    b = Convolutional(3, 5, norm, 4)
    torch.manual_seed(3)
    c = Convolutional(3, 5, norm, 4, loops=(1, 1))
    for _ in range(3):
        x = image()
        y, z = b(x), c(x)
        assert torch.equal(y, z)
        y.sum().backward(), z.sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(b.parameters(), c.parameters(), strict=True))


def test_b_is_its_stages_one_after_another() -> None:
    model, x = Convolutional(3, 5, sn.SampleNorm, 4), image()
    y = x
    for stage in model:
        y = stage(y)
    assert torch.equal(model(x), y)


def test_blocks_share_weights_and_statistics_over_time() -> None:
    model = Convolutional(3, 5, sn.StreamingNorm, 4, loops=(2, 3))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in Convolutional(3, 5, sn.StreamingNorm, 4).parameters()
    )
    model(image())
    assert [int(block.branch[0].H1.seen) for block in (model[1], model[3])] == [2, 3]


def test_statistics_per_time_step_are_as_many_as_the_loops() -> None:
    model = Convolutional(3, 5, sn.TimeSpecific(sn.BatchNorm), 4, loops=(2, 3))
    model(image())
    assert [block.branch[0].trained_steps for block in (model[1], model[3])] == [2, 3]
    model.loops = (4, 4)
    assert model.eval()(image()).isfinite().all()


@pytest.mark.parametrize("norm", [sn.StreamingNorm, sn.BatchNorm, sn.SampleNorm, sn.TimeSpecific(sn.BatchNorm)])
def test_d_trains(norm: sn.TimeSpecific) -> None:
    torch.manual_seed(0)
    model = FullyRecurrent(3, 2, norm, 4, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x = image(16)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_d_renews_every_state_from_all() -> None:
    """With every transition but one silenced, the read-out hears the image only by way of the one from 0 to 2."""
    model = FullyRecurrent(3, 2, partial(sn.SampleNorm, affine=True), 4, steps=1)
    x = image(2)
    for name, transition in model.transitions.items():
        if name != "0to2":
            nn.init.zeros_(
                transition[2][-1].weight if isinstance(transition[2], nn.Sequential) else transition[2].weight
            )
    heard = model(x)
    nn.init.zeros_(model.transitions["0to2"][2].weight)
    assert not torch.equal(heard, model(x))
    assert torch.equal(model(x)[0], model(x)[1])


def test_the_zeros_that_d_begins_with_leave_no_gradient_in_h2() -> None:
    """Their sigma is sqrt(eps): a gradient divided by it would outweigh all others."""
    model = FullyRecurrent(3, 2, sn.StreamingNorm, 4, steps=3)
    model(image()).sum().backward()
    counts = {name: (int(norm.H1.seen), int(norm.H2.seen)) for name, (norm, *_) in model.transitions.items()}
    # What goes to the first and the second state at the last step is not read any more.
    assert counts == {f"{j}to{i}": (3, 3 - (j > 0) - (i < 2)) for i in range(3) for j in range(3)}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="both >= 1"):
        Convolutional(3, 5, sn.StreamingNorm, 4, loops=(0, 1))
    with pytest.raises(ValueError, match="steps is a number"):
        FullyRecurrent(3, 5, sn.StreamingNorm, 4, steps=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        FullyRecurrent(3, 5, sn.StreamingNorm, 4)(torch.randn(1, 3, 6, 8))


def test_a_vectorized_cycle_refuses_a_layer_that_is_called_twice() -> None:
    model = Convolutional(3, 5, sn.StreamingNorm, 4, loops=(2, 1))
    with pytest.raises(ValueError, match="called twice in a vectorized cycle"), sn.vectorized(model, 2):
        model(image())
    once = Convolutional(3, 5, sn.StreamingNorm, 4)
    for _ in range(2):
        with sn.vectorized(once, 2):
            once(image())
    assert once[1].branch[0].H1.seen == 4


# --- Runs


UNROLLED: list[dict[str, Any]] = [
    {"architecture": "C", "loops": (2, 3), "width": 4},
    {"architecture": "D", "loops": (3,), "width": 4},
]


def trainer_of(**changes: Any) -> Trainer:
    return Trainer(small(learning_rate=0.02, **changes), toy(place=8))


def test_loops_are_the_papers_where_none_are_given() -> None:
    made = {letter: Run(architecture=letter) for letter in "ABCD"}  # type: ignore[arg-type]
    assert {letter: run.loops for letter, run in made.items()} == {"A": (), "B": (), "C": (5, 5), "D": (5,)}
    assert [run.network for run in made.values()] == ["A", "B", "C(5, 5)", "D(5)"]
    assert Run.from_json(json.loads(json.dumps(made["D"].to_json()))) == made["D"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": (5, 5)}, r"^loops is for architectures C and D, A has none; got \(5, 5\)"),
        ({"architecture": "B", "loops": (1, 1)}, "B has none"),
        *[
            (
                {"architecture": "C", "loops": loops},
                "^loops is two whole numbers >= 1, k1 and k2, for architecture C, got ",
            )
            for loops in ((5,), (5, 0), (5, -1), (5, 5, 5), (5, True), (5, 2.0), ("5", "5"), 5, None)
        ],
        *[
            ({"architecture": "D", "loops": loops}, "^loops is one whole number >= 1, k, for architecture D")
            for loops in ((0,), (5, 5), (1.5,), 5)
        ],
        ({"backward_stats": "last"}, '^backward_stats is "saved" or "latest", got \'last\''),
        ({"backward_stats": "latest"}, "for architectures C and D alone: a layer of A is called once"),
        ({"backward_stats": "latest", "architecture": "B"}, "a layer of B is called once"),
    ],
)
def test_a_run_refuses_loops_that_its_architecture_does_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**changes)


@pytest.mark.parametrize(("architecture", "shape"), [("C", (16,)), ("D", (4, 4))])
def test_what_is_no_image_is_refused(architecture: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"architecture {architecture} takes images .* use A"):
        build(small(architecture=architecture), torch.zeros(shape), 3)


def test_an_image_that_d_cannot_halve_twice_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 6, 6\)"):
        Trainer(small(architecture="D"), toy(place=6))


@pytest.mark.parametrize(("turn", "arm"), [*enumerate(ARMS)])
def test_every_arm_has_finite_gradients_in_a_loop(turn: int, arm: str) -> None:
    """In C or D, in turns."""
    changes = UNROLLED[(turn + turn // 2) % 2]
    model = build(small(**{**changes, "width": 8}, arm=arm), torch.zeros(1, 8, 8), 3)
    for _ in range(2):  # an average place has no gradient before a second mini-batch
        output = model(torch.randn(4, 1, 8, 8))
        F.cross_entropy(output, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.any(), f"{name} has no gradient"
    assert model.eval()(torch.randn(5, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("changes", UNROLLED, ids=["C", "D"])
def test_an_unrolled_run_takes_its_mini_batches_one_after_another(changes: dict[str, Any]) -> None:
    """The same operations in the same order as a plain loop, hence the same bits; nobody had to ask for it."""
    trainer = trainer_of(**changes)
    twin = trainer_of(**changes)
    for cycle in range(2):
        x, y = twin._cycle(cycle)
        for a, b in zip(x.split(3), y.split(3), strict=True):
            F.cross_entropy(twin.model(a), b).backward()
        for parameter in twin.model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad / 4
        twin.optimizer.step()
        twin.optimizer.zero_grad()
    assert torch.equal(flat(steps(trainer, 2).model), flat(twin.model))


@pytest.mark.parametrize("changes", UNROLLED, ids=["C", "D"])
def test_original_bn_trains_as_time_specific_bn_does_and_is_tested_otherwise(changes: dict[str, Any]) -> None:
    """In training both normalize a time step with its own mini-batch; their running estimates serve testing alone."""
    shared, own = (to_the_end(trainer_of(**changes, arm=arm)) for arm in ("batch", "tsbn"))
    for a, b in zip(shared.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(shared.metrics, own.metrics, strict=True):
        assert (a["train_loss"], a["train_error"]) == (b["train_loss"], b["train_error"])
        assert a["test_loss"] != b["test_loss"]


@pytest.mark.parametrize("arm", ["streaming", "batch", "tsbn", "BA6-S", "layer"])
@pytest.mark.parametrize("changes", UNROLLED, ids=["C", "D"])
def test_a_checkpoint_goes_on_bit_for_bit(changes: dict[str, Any], arm: str, tmp_path: Path) -> None:
    whole = to_the_end(trainer_of(**changes, arm=arm))
    checkpoint.save(tmp_path / "half", steps(trainer_of(**changes, arm=arm), 5).state())
    resumed = trainer_of(**changes, arm=arm)
    resumed.restore(checkpoint.load(tmp_path / "half"))
    assert torch.equal(flat(to_the_end(resumed).model), flat(whole.model))
    assert resumed.metrics[-1]["test_loss"] == whole.metrics[-1]["test_loss"]


def test_a_checkpoint_from_before_a_setting_was_added_takes_its_default() -> None:
    before = steps(trainer_of(architecture="B", width=4), 1)
    state = before.state()
    for name in ("loops", "backward_stats"):
        del state["run"][name]
    after = trainer_of(architecture="B", width=4)
    after.restore(state)
    assert torch.equal(flat(after.model), flat(before.model))


def test_statistics_per_time_step_are_not_taken_for_shared_ones() -> None:
    own, shared = (steps(trainer_of(**UNROLLED[0], arm=arm), 1) for arm in ("tsbn", "batch"))
    for mine, other in ((own, shared), (shared, own)):
        before = flat(mine.model)
        with pytest.raises(CheckpointError, match=r"of another architecture; of another shape: .*counter"):
            load_model(mine.model, dict(other.model.state_dict()))
        assert torch.equal(flat(mine.model), before)


def test_a_checkpoint_with_a_memory_for_each_time_step_loads() -> None:
    trained = steps(trainer_of(**UNROLLED[0], arm="tsbn"), 1).model
    older: dict[str, torch.Tensor] = {}
    for name, value in trained.state_dict().items():
        at, mark, member = name.partition(".H1.")
        older |= {f"{at}.times.{t}.H1.{member}": one for t, one in enumerate(value)} if mark else {name: value}
    fresh = trainer_of(**UNROLLED[0], arm="tsbn").model
    load_model(fresh, older)
    assert torch.equal(flat(fresh), flat(trained))


@pytest.mark.parametrize("arm", ["streaming", "tsbn"])
@pytest.mark.parametrize("changes", UNROLLED, ids=["C", "D"])
def test_a_trained_network_can_be_tested_with_other_loops(changes: dict[str, Any], arm: str) -> None:
    trainer = to_the_end(trainer_of(**changes, arm=arm))
    x, y, loops = trainer.data.test_x, trainer.data.test_y, trainer.run.loops
    before = flat(trainer.model)
    assert evaluate(reloop(trainer, loops), x, y) == evaluate(trainer.model, x, y)
    longer = reloop(trainer, tuple(k + 2 for k in loops))
    assert torch.equal(flat(longer), before), "it has the same weights and statistics"
    assert evaluate(longer, x, y) != evaluate(trainer.model, x, y)
    with pytest.raises(ValueError, match=r"^loops is "):
        reloop(trainer, (1, 2, 3))


def test_the_latest_statistics_matter_only_where_a_layer_is_called_again() -> None:
    after = {}
    for loops in ((1, 1), (2, 1)):
        for stats in ("saved", "latest"):
            with backends.using("eager"):
                trainer = trainer_of(architecture="C", loops=loops, width=4, backward_stats=stats)
                after[loops, stats] = flat(steps(trainer, 2).model)
    assert torch.equal(after[(1, 1), "saved"], after[(1, 1), "latest"])
    assert not torch.equal(after[(2, 1), "saved"], after[(2, 1), "latest"])


# --- The command line


@pytest.mark.parametrize(
    ("architecture", "loops", "longer"), [("C", ["2", "1"], ["3", "2"]), ("D", ["2"], ["4"])], ids=["C", "D"]
)
def test_train_and_evaluate_with_loops(
    architecture: str, loops: list[str], longer: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--architecture", architecture, "--loops", *loops, "--arm", "tsbn", "--width", "4", "--epochs", "1"]
    run += ["--samples-per-batch", "16", "--batches-per-update", "2", "--train-limit", "64", "--test-limit", "32"]
    assert main([*run, "--out", str(tmp_path)]) == 0
    network = f"{architecture}({', '.join(loops)})"
    assert f"architecture {network}" in capsys.readouterr().out
    assert main([*run, "--out", str(tmp_path)]) == 0, "the same command finds it finished"
    trained = capsys.readouterr().out.split("test loss ")[-1].split(" nats")[0]
    assert main(["evaluate", str(tmp_path), "--loops", *longer]) == 0
    as_trained, beyond = capsys.readouterr().out.splitlines()
    assert f"architecture {network}, after 2 of 2 updates: test loss {trained} nats" in as_trained
    assert beyond.startswith(f"with loops {' '.join(longer)}: test loss ")
    assert main(["evaluate", str(tmp_path), "--loops", "1", "2", "3"]) == 2
    assert "loops is " in capsys.readouterr().err


def test_a_comparison_names_the_loops(tmp_path: Path) -> None:
    command = ["compare", "--architecture", "C", "--loops", "1", "2", "--arms", "batch", "tsbn", "--seeds", "0"]
    command += ["--samples-per-batch", "16", "--batches-per-update", "2", "--width", "4", "--epochs", "1"]
    assert main([*command, "--train-limit", "64", "--test-limit", "32", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["title"] == "digits, architecture C(1, 2)"
    assert [(run["arm"], run["run"]["loops"]) for run in results["runs"]] == [("batch", [1, 2]), ("tsbn", [1, 2])]
    assert "architecture C(1, 2)" in (tmp_path / "report.html").read_text()


def test_loops_of_what_has_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"run": {"arch": "gru"}, "data": {}, "model": {}, "failed": None, "done": 1, "updates": 1}
    checkpoint.save(tmp_path / "checkpoint.safetensors", held)
    assert main(["evaluate", str(tmp_path), "--loops", "2"]) == 2
    assert "holds a language model" in capsys.readouterr().err
    short = ["--width", "4", "--epochs", "1", "--train-limit", "64", "--test-limit", "32"]
    assert main(["train", *short, "--out", str(tmp_path / "a")]) == 0
    assert main(["evaluate", str(tmp_path / "a"), "--loops", "2"]) == 2
    assert "loops is for architectures C and D, A has none; got (2,)" in capsys.readouterr().err
