"""The site: the reference has every public name, the pages that stand by themselves run, pictures are of their records.

The build, its links and what it loads are checked by ``make docs``.
"""

from __future__ import annotations

import importlib.util
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import streamnorm

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OTHERS = {
    *("calibration.gap", "calibration.Gap"),
    *(f"{library}.Streaming{kind}" for library in ("river", "sklearn") for kind in ("Classifier", "Regressor")),
}


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = re.findall(r"^::: streamnorm\.([\w.]+)$", pages, re.MULTILINE)
    assert sorted(names) == sorted({*streamnorm.__all__, *OTHERS})


def test_every_public_name_has_an_example_that_doctest_runs() -> None:
    for name in streamnorm.__all__:
        thing = getattr(streamnorm, name)
        if callable(thing):
            assert ">>> " in str(thing.__doc__), f"{name} has no example"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    folders = {"results", "decisions", "site"}
    for page in DOCS.rglob("*.md"):
        where = page.relative_to(DOCS)
        assert where.parts[0] in folders or str(where) in nav, f"mkdocs.yml does not name {where}"


def numbers(text: str) -> tuple[str, list[int]]:
    """A text without its percentages, and these."""
    return re.sub(r"\d+%", "%", text), [int(number) for number in re.findall(r"(\d+)%", text)]


def test_the_tutorial_prints_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "tutorial.md").read_text()
    steps = re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(steps) == text.count("```python") > 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for code, written in steps:
        with redirect_stdout(io.StringIO()) as said:
            exec(compile(code, "tutorial.md", "exec", dont_inherit=True), names)
        (got, found), (want, told) = numbers(said.getvalue()), numbers(written)
        assert got == want
        # 360 digits tell a rate of 85 % to 2 points; other processors add in another order, and training amplifies it.
        assert found == pytest.approx(told, abs=4)


def test_the_picture_of_the_readme_is_drawn_from_its_record(tmp_path: Path) -> None:
    drawn = module(DOCS / "small_errors.py")
    measured = drawn.errors()
    assert measured["B", "batch"][0] == pytest.approx((2, 74.52, 1.76))
    assert [samples for samples, *_ in measured["A", "default"]] == [1, 2, 4, 8, 32]
    drawn.main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_checker_finds_what_is_dead_and_what_is_loaded(tmp_path: Path) -> None:
    check = module(DOCS / "site" / "check.py")
    (tmp_path / "b.html").write_text("<h1 id='there'>B</h1>")
    good = "<a href='b.html#there'></a><a href='#own'></a><a id='own' href='https://arxiv.org'></a><img src='b.html'>"
    (tmp_path / "a.html").write_text(good)
    assert check.faults(tmp_path) == []
    bad = "<a href='c.html'></a><a href='b.html#nowhere'></a><script src='https://cdn/x.js'></script><img src='no.png'>"
    (tmp_path / "a.html").write_text(bad)
    (tmp_path / "far.css").write_text("@font-face { src: url(https://cdn/f.woff) }")
    assert len(check.faults(tmp_path)) == 5
    assert check.faults(tmp_path / "empty")
