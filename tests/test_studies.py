"""The studies by name: none is forgotten, and all are started alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streamnorm.experiments
from streamnorm.experiments.arguments import SMOKE, Arguments, begin
from streamnorm.experiments.registry import STUDIES, study

ROOM = Path(streamnorm.experiments.__file__).parent


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

    assert {path.stem for path in ROOM.glob("*.py") if is_study(path)} == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_kept_under_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class BegunError(Exception):
        pass

    def begun(arguments: Arguments, name: str, sizes: dict[str, object]) -> None:
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
    assert torch.get_num_threads() == 3, "what is refused changes nothing"
