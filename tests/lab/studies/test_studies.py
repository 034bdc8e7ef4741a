"""The studies by name: none is forgotten, and all are started alike."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streamnorm.lab.studies
from streamnorm.lab.studies.arguments import SMOKE, Arguments, begin
from streamnorm.lab.studies.registry import STUDIES, study
from streamnorm.lab.studies.sidebyside import side_by_side

ROOM = Path(streamnorm.lab.studies.__file__).parent


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_module_with_a_main_is_a_study() -> None:
    def is_study(path: Path) -> bool:
        return any(
            isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body
        )

    assert {path.parent.name for path in ROOM.glob("*/study.py") if is_study(path)} == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_the_same_files_and_each_of_them_its_own_part(name: str) -> None:
    def defined(part: str) -> set[str]:
        path = ROOM / name / f"{part}.py"
        return names_of(ast.parse(path.read_text()).body)

    assert "CLAIMS" in defined("claims")
    assert defined("runs") & {"runs", "RUNS"}
    assert "main" in defined("study")
    assert not defined("study") & {"TIERS", "Tier", "runs", "RUNS", "CLAIMS"}


def names_of(body: list[ast.stmt]) -> set[str]:
    """What a module defines at its top, what it imports left out."""
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    named = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return named | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_kept_under_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class BegunError(Exception):
        pass

    def begun(arguments: Arguments, name: str, sizes: dict[str, object], side_by_side: bool = False) -> None:
        raise BegunError(name, *sizes)

    main = study(name)
    monkeypatch.setitem(main.__globals__, "begin", begun)
    with pytest.raises(BegunError) as stopped:
        main(Arguments())
    told, *sizes = stopped.value.args
    assert told == name
    assert sizes == ["smoke", "reduced", "full"]


def test_the_tier_smoke_alone_says_that_its_verdicts_mean_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for tier in ("reduced", "smoke"):
        assert capsys.readouterr().out == ""
        begin(Arguments(tier), "a study", {"smoke": 1, "reduced": 2})  # type: ignore[arg-type]
    assert capsys.readouterr().out == f"{SMOKE}\n"


@pytest.mark.usefixtures("threads")
def test_where_a_study_is_kept_and_with_how_many_threads(tmp_path: Path) -> None:
    sizes = {"smoke": 1, "reduced": 2}
    assert begin(Arguments(), "mine", sizes) == (2, Path("runs/mine-reduced"))
    assert begin(Arguments("smoke", tmp_path, threads=3), "mine", sizes) == (1, tmp_path)
    assert torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="the study mine comes in smoke and reduced, got --tier full"):
        begin(Arguments("full", threads=2), "mine", sizes)
    with pytest.raises(ValueError, match="the study mine trains one run after another, got --processes 2"):
        begin(Arguments("smoke", threads=2, processes=2), "mine", sizes)
    assert torch.get_num_threads() == 3, "what is refused changes nothing"


def test_seeds_are_those_asked_for_or_the_studys_own() -> None:
    assert Arguments().seeds_or() == (0, 1, 2)
    assert Arguments().seeds_or((5,)) == (5,)
    assert Arguments(seeds=(0,)).seeds_or((5,)) == (0,)
    for refused in ({"seeds": ()}, {"processes": 0}):
        with pytest.raises(ValueError, match=r"at least one seed|processes is a whole number >= 1, got 0"):
            Arguments(**refused)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 2])
def test_work_side_by_side_is_all_done(processes: int) -> None:
    assert sorted(side_by_side(math.factorial, range(6), processes, 1)) == [1, 1, 2, 6, 24, 120]


def test_an_error_of_work_side_by_side_comes_through() -> None:
    with pytest.raises(ValueError, match="factorial"):
        list(side_by_side(math.factorial, [3, -1]))
