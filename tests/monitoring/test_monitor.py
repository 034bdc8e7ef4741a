"""The monitor: a training does not notice it; its steps, what it watches, its file and its picture."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watching import hooks, net, sgd, train, watch_one

import streamnorm
from streamnorm import BatchNorm, NormGRU, SampleNorm, StreamingNorm
from streamnorm.lab.runs.classifier.models import Convolutional
from streamnorm.monitoring.monitor import Monitor, monitor, read


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values() if v is not None)]


# --- A training does not notice it


@pytest.mark.parametrize("watch", [None, "*", nn.Linear, ()], ids=repr)
@pytest.mark.parametrize("norm", [StreamingNorm, BatchNorm, nn.BatchNorm1d])
def test_training_is_the_same_bit_for_bit(norm: Any, watch: Any, tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = net(norm)
        optimizer = sgd(model)
        names = list(model.state_dict())
        if watched:
            with monitor(model, optimizer, tmp_path / "seen.jsonl", watch=watch, every=2):
                losses = train(model, optimizer, 5)
        else:
            losses = train(model, optimizer, 5)
        assert list(model.state_dict()) == names
        ends.append([losses, *everything(model, optimizer), torch.get_rng_state()])
    for plain, seen in zip(*ends, strict=True):
        assert torch.equal(plain, seen)
    assert [r["step"] for r in read(tmp_path / "seen.jsonl")] == [0, 2, 4]


def test_a_recurrent_layer_keeps_its_compiled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can be chosen is chosen, and the scan still finds nobody inside of its cells."""
    model = NormGRU(4, 6)
    with monitor(model, watch=["*"], every=1) as watching:
        inner = [m for cell in model.cells.values() for m in cell.modules() if m is not cell]
        assert inner
        assert not any(hooks(m) for m in inner)
        assert watching.watched == ("cells.l0",)


def test_hooks_are_there_while_a_record_is_made_and_at_no_other_time() -> None:
    model = net()
    optimizer = sgd(model)
    with monitor(model, optimizer, every=3):
        for step in range(7):
            assert hooks(model) == (2 if step % 3 == 0 else 0)
            train(model, optimizer, 1)
        assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ZeroDivisionError), monitor(model, optimizer):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_nobody_watches_a_copy() -> None:
    model = net()
    with monitor(model, every=1) as watching:
        twins = [deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            twin(torch.full((16, 5), 1e3))
            probes = [
                probe for m in twin.modules() for probe in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
            ]
            assert probes
            assert all(probe.site is None and probe.model is None for probe in probes), "it takes no monitor with it"
        model(torch.zeros(16, 5))
        watching.step()
    assert watching.records[0]["preactivations"]["2"]["calls"] == 1


# --- Steps


@pytest.mark.parametrize("norm", [StreamingNorm, partial(StreamingNorm, alpha=(0.7, 0.3))], ids=["evidence", "paper"])
def test_a_step_is_a_weight_update_however_many_mini_batches_it_takes(norm: Any) -> None:
    model = net(norm)
    optimizer = sgd(model)
    with monitor(model, optimizer, every=2) as watching:
        train(model, optimizer, 5, batches=3)
        with pytest.raises(RuntimeError, match="the optimizer counts the steps"):
            watching.step()
    assert [r["step"] for r in watching.records] == [0, 2, 4]
    assert watching.steps == 5
    assert all(r["preactivations"]["2"]["calls"] == 3 for r in watching.records)
    for k, record in zip((0, 2, 4), watching.records, strict=True):
        H1 = record["norms"]["1"]["H1"]
        assert H1["seen"] == 3 * (k + 1), "before the update, short is whole"
        if norm is StreamingNorm:
            assert (H1["count"], H1["held"]) == (3 * 16, 3 * 16 * k)
        else:
            assert (H1["count"], H1["updates"]) == (3, k)


def test_a_step_that_a_gradient_scaler_skips_is_none() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # type: ignore[attr-defined]
    with monitor(model, optimizer, every=2) as watching:
        for factor in (1.0, math.inf, 1.0, math.inf, math.inf, 1.0):
            scaler.scale(model(torch.randn(8, 5)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert watching.steps == 3
    assert next(iter(optimizer.state.values()))["step"] == 3, "as the optimizer counts them"
    assert [record["step"] for record in watching.records] == [0, 2]
    assert watching.records[1]["preactivations"]["2"]["calls"] == 3, "all passes since the update before"


def test_an_optimizer_that_asks_for_the_loss_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = torch.randn(8, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with monitor(model, optimizer, every=2) as watching:
        for _ in range(3):
            optimizer.step(closure)  # type: ignore[arg-type]
    assert [(r["step"], r["preactivations"]["1"]["calls"] >= 3) for r in watching.records] == [(0, True), (2, True)]


def test_training_without_a_counted_step_is_said_to_be_lost() -> None:
    model = net()
    watching = monitor(model)
    model(torch.randn(16, 5))
    with pytest.warns(UserWarning, match="no weight update"):
        watching.close()
    watching.close()


# --- What is watched


def names(model: nn.Module, watch: Any = None) -> tuple[str, ...]:
    with monitor(model, watch=watch) as watching:
        return watching.watched


def test_modules_are_chosen_by_name_class_function_or_themselves() -> None:
    model = net()
    assert names(model) == ("2", "5")
    assert names(model, "2") == names(model, model[2]) == ("2",)
    assert names(model, nn.Linear) == names(model, lambda name, m: hasattr(m, "in_features")) == ("0", "4", "6")
    assert names(model, ["1", nn.ReLU, model[0]]) == ("0", "1", "5"), "in the order of the model"
    assert names(model, "*") == tuple("0123456"), "not what is inside of a normalization"
    assert names(model, ()) == ()
    assert names(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))) == ("1",), "without nonlinearities, normalizations"
    block = Convolutional(3, 4, StreamingNorm, 4)
    assert names(block, "*branch*") == tuple(f"{i}.branch.{j}" for i in (1, 3) for j in range(6))
    shared = nn.ReLU()
    assert names(nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)) == ("1",)


@pytest.mark.parametrize("model", [NormGRU(4, 6), nn.ModuleDict({"gru": NormGRU(4, 6), "out": nn.Linear(6, 2)})])
def test_norms_inside_of_cells_are_recorded_without_a_choice(model: nn.Module, tmp_path: Path) -> None:
    gru = model if isinstance(model, NormGRU) else model.get_submodule("gru")
    with monitor(model, every=1) as watching:
        gru(torch.randn(3, 8, 4))
        watching.step()
    assert watching.watched == ()
    norms = [name for name, module in model.named_modules() if isinstance(module, StreamingNorm)]
    assert len(norms) == 6
    assert list(watching.records[0]["norms"]) == norms
    assert watching.draw(tmp_path / "seen.png").exists()


def test_what_fits_nothing_is_refused_with_the_nearest() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(2, 3), "output": nn.Linear(3, 1)})
    with pytest.raises(ValueError, match=r"watch='hiden' fits no module; did you mean 'hidden'\? there are 'hidden'"):
        monitor(model, watch=["output", "hiden"])
    with pytest.raises(ValueError, match=r"Conv2d.* fits no module; there are 'hidden', 'output'"):
        monitor(model, watch=nn.Conv2d)
    with pytest.raises(ValueError, match=r"no nonlinearities and no normalization .* choose by watch= from 'hidden'"):
        monitor(model)
    with pytest.raises(ValueError, match=r"no nonlinearities and no normalization .* choose by watch= from 'cells.l0'"):
        monitor(NormGRU(2, 3, norm=SampleNorm))
    with pytest.raises(ValueError, match="ModuleDict has none that remember"):
        monitor(model, watch=())
    with pytest.raises(TypeError, match="got 5"):
        monitor(model, watch=5)  # type: ignore[arg-type]


def test_other_bad_input_is_refused_and_leaves_no_hook() -> None:
    model = net()
    optimizer = sgd(model)
    with pytest.raises(TypeError, match="got Sequential and list"):
        monitor(model, [])  # type: ignore[arg-type]
    for name, value in (("every", 0), ("every", 2.0), ("values", 63), ("start", -1), ("start", True)):
        with pytest.raises(ValueError, match=f"{name} is a whole number >= .*{value}"):
            monitor(model, optimizer, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="add_scalar"):
        monitor(model, optimizer, writer="runs")  # type: ignore[arg-type]
    assert hooks(model) == len(optimizer._optimizer_step_pre_hooks) == 0
    with pytest.raises(TypeError, match=r"'0' \(Identity\) cannot be watched: .* torch.int64"):
        watch_one(nn.Identity(), torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="axis=3 is no axis of what '0' brings"):
        watch_one(nn.ReLU(), torch.ones(3, 2, 4), axis=3)


def test_a_watched_module_that_is_never_called_is_named() -> None:
    model = net()
    optimizer = sgd(model)
    model.register_module("unused", nn.ReLU())
    model.forward = lambda x: nn.Sequential(*list(model)[:7])(x)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="before update 0: 'unused'") as warned, monitor(model, optimizer, every=1):
        train(model, optimizer, 2)
    assert len(warned) == 1


# --- The file


def begin(path: Path | None, start: int | None = None, **options: Any) -> tuple[nn.Module, Any, Monitor]:
    torch.manual_seed(1)
    model = net(BatchNorm)
    del model[3]
    optimizer = sgd(model)
    return model, optimizer, monitor(model, optimizer, path, every=2, start=start, **options)


@pytest.mark.parametrize("done", [4, 5])
def test_a_stopped_run_that_goes_on_leaves_the_file_of_one_that_was_not_stopped(done: int, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "folder" / "parts.jsonl"
    model, optimizer, watching = begin(whole)
    train(model, optimizer, 9)
    watching.close()

    model, optimizer, watching = begin(parts)
    train(model, optimizer, done)
    saved = deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 7 - done, first=done)  # after the checkpoint, then killed while it writes
    with parts.open("ab") as file:
        file.write(b'{"step": 8, "preact')
    assert [r["step"] for r in read(parts)] == [0, 2, 4, 6]

    model, optimizer, watching = begin(parts, start=done)
    assert [r["step"] for r in read(parts)] == list(range(0, done, 2)), "update 4 will be recorded again"
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 9 - done, first=done)
    watching.close()
    assert parts.read_bytes() == whole.read_bytes()
    assert watching.records == read(whole)
    assert whole.read_text().count("\n") == len(read(whole)) == 5


def test_in_memory_is_the_same_as_in_a_file(tmp_path: Path) -> None:
    both = []
    for path in (None, tmp_path / "seen.jsonl"):
        model, optimizer, watching = begin(path)
        train(model, optimizer, 4)
        watching.close()
        both.append(watching.records)
    assert both[0] == both[1]


def test_a_file_in_the_way_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "seen.jsonl"
    with monitor(model, path=path, every=1) as watching:
        model(torch.randn(16, 5))
        watching.step()
    kept = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"records up to step 0; to go on there .* start="):
        monitor(model, path=path)
    assert path.read_bytes() == kept
    for text in ('{"loss": 1}\n', "a novel", "[1]\n", '{"step": 0, "preactivations": {}, "norms": {}}\nrest\n'):
        path.write_text(text)
        for start in (None, 3):
            with pytest.raises(ValueError, match="no file of a monitor"):
                monitor(model, path=path, start=start)
        assert path.read_text() == text
    with pytest.raises(IsADirectoryError, match=r"for instance .*monitor.jsonl"):
        monitor(model, path=tmp_path)
    assert hooks(model) == 0


def test_a_run_killed_inside_its_first_line_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "seen.jsonl"
    path.write_bytes(b'{"step": 0, "preac')
    assert read(path) == []
    with monitor(net(), path=path) as watching:
        assert watching.records == []
    assert path.read_bytes() == b""


# --- What looks at it


class Writer:
    def __init__(self) -> None:
        self.told: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.told.append((tag, scalar_value, global_step))


def test_a_summary_writer_is_told_every_figure() -> None:
    writer = Writer()
    model, optimizer, watching = begin(None, writer=writer)
    train(model, optimizer, 3)
    assert {step for *_, step in writer.told} == {0, 2}
    last = {tag: value for tag, value, step in writer.told if step == 2}
    record = watching.records[-1]
    assert last["preactivations/2/p85"] == record["preactivations"]["2"]["p85"]
    assert last["norms/1/H1/estimate/sigma/p50"] == record["norms"]["1"]["H1"]["estimate"]["sigma"][1]
    assert last["norms/1/H1/skipped"] == 0
    assert all(isinstance(value, (int, float)) for value in last.values())


def test_a_writer_that_fails_leaves_the_step_counted(tmp_path: Path) -> None:
    class Failing(Writer):
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            if global_step == 0:
                raise OSError("the disk is full")

    model, path = net(), tmp_path / "monitor.jsonl"
    optimizer = sgd(model)
    with monitor(model, optimizer, path, every=1, writer=Failing()) as watching:
        with pytest.raises(OSError, match="the disk is full"):
            train(model, optimizer, 1)
        train(model, optimizer, 2, first=1)
    assert watching.steps == 3
    assert [record["step"] for record in read(path)] == [0, 1, 2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_picture_is_drawn_from_the_records(tmp_path: Path) -> None:
    model, optimizer, watching = begin(tmp_path / "seen.jsonl")
    with pytest.raises(ValueError, match="no step was recorded"):
        watching.draw(tmp_path / "seen.png")
    train(model, optimizer, 5)
    watching.close()
    assert watching.draw(tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_names_modules_as_a_reader_knows_them() -> None:
    from streamnorm.monitoring.curves import _named

    model, optimizer, watching = begin(None)
    train(model, optimizer, 1)
    named = [_named(name, watching.records) for name in ("1", "2", "4")]
    assert named == ["1 BatchNorm", "2 Sigmoid", "4 ReLU"]
    assert _named("2", [{"step": 0, "preactivations": {}, "norms": {}}]) == "2", "of a file without classes"
    with monitor(norm := BatchNorm(5), every=1, watch=()) as watching:
        norm(torch.randn(16, 5))
        watching.step()
    assert _named("", watching.records) == "the model itself BatchNorm"


def test_the_picture_shows_so_many_modules_at_most_and_says_so() -> None:
    from streamnorm.monitoring.curves import MOST, _inputs, _thinned

    seen = {f"layer{i}": {"p15": -1.0, "p50": 0.0, "p85": None if i == 3 else 1.0} for i in range(100)}
    seen["empty"] = {"p15": None, "p50": None, "p85": None}
    curves = _inputs([{"step": 0, "preactivations": seen, "norms": {}}])
    assert "empty" not in curves
    assert len(_thinned(curves)) == MOST


def test_the_function_is_public() -> None:
    assert streamnorm.monitor is monitor
    assert streamnorm.Monitor is Monitor
