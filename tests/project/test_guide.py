"""The guide and the README: their examples run and print what is written, their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import streamnorm

ROOT = Path(__file__).parents[2]
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
PAGES = [GUIDE, README]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<printed>.*?)^```$)?", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[Any]:
    """Of every example the page, the line at which it begins, the code, and what it prints, or None."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(page, line, match["code"], match["printed"], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize(("page", "line", "code", "printed"), examples())
def test_example(
    page: Path, line: int, code: str, printed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes does not stay
    assert len(code.splitlines()) < 20, "an example is short"
    lines = compile("\n" * line + code, str(page), "exec", dont_inherit=True)  # an error shows the line of the page
    with redirect_stdout(io.StringIO()) as said:
        exec(lines, {"__name__": "__main__"})
    got = said.getvalue()
    assert got, "an example prints something"
    if printed is not None:
        assert doctest.OutputChecker().check_output(printed, got, FLAGS), f"printed:\n{got}\nwritten:\n{printed}"


def test_every_example_of_the_guide_says_what_it_prints() -> None:
    text = GUIDE.read_text()
    blocks = [*BLOCK.finditer(text)]
    assert len(blocks) == text.count("```python") > 10
    assert all(block["printed"] for block in blocks)


def anchors(page: Path) -> set[str]:
    """What a link can name after the #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(FENCED.sub("", page.read_text())) if "://" not in link]
    assert links
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_guide_is_linked_and_names_all_its_sections() -> None:
    assert "(docs/guide.md)" in README.read_text()
    text = GUIDE.read_text()
    listed = LINK.findall(text[: text.index("\n## ")])
    assert {link.removeprefix("#") for link in listed} == anchors(GUIDE) - {"a-guide-for-beginners"}


def test_the_space_that_is_told() -> None:
    c = 7
    for layer, told in (
        (torch.nn.BatchNorm1d(c), 2 * c + 1),
        (streamnorm.BatchNorm(c), 4 * c + 3),
        (streamnorm.StreamingNorm(c), 10 * c + 7),
    ):
        assert sum(p.numel() for p in layer.parameters()) == 2 * c
        assert sum(b.numel() for b in layer.buffers()) == told


def test_layers_that_are_frozen_learn_and_change_no_statistics() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), streamnorm.StreamingNorm(3), streamnorm.NormGRU(3, 5)
    )
    model(torch.randn(8, 4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    streamnorm.freeze(model).train()
    model(torch.randn(8, 4))[0].square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_picture_is_made_of_what_it_shows(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("small_batches", ROOT / "docs" / "small_batches.py")
    assert spec is not None
    assert spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    x = torch.randn(drawn.SAMPLES, 1)

    def correlation(y: torch.Tensor) -> float:
        return torch.corrcoef(torch.cat([x, y], 1).T)[0, 1].item()

    # Two samples leave the order of two normal numbers, +-1; its correlation with one of them is 1 / sqrt(pi) = 0.56.
    # Of n = 512 samples it is estimated with a standard error of (1 - 0.56^2) / sqrt(n) = 0.03; 4 of them are allowed.
    assert correlation(drawn.batch(x, 2)) == pytest.approx(torch.pi**-0.5, abs=0.12)
    assert correlation(drawn.batch(x, 64)) > 0.95
    assert correlation(drawn.streaming(x)) > 0.95
    drawn.main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
