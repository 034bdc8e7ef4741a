"""The paper map is true: every code reference in the documents resolves, every part of the paper has its row.

Names are read with ``ast`` where they are defined, so a rename, a move or a removal fails here; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "paper-map.md"
DOCUMENTS = [MAP, ROOT / "docs" / "derivations.md"]

REFERENCE = re.compile(r"((?:streamnorm|tests)/[\w/]+\.py)(?:::([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*))?")
NAMES = [f"{kind}{i}" for kind, count in (("SP", 5), ("BA", 6)) for i in range(1, count + 1)]
ROWS = {
    "Sections": [
        *(
            f"Section {s}"
            for s in ("2", "3", "3.1", "3.2", "3.3", "3.3.1", "3.3.2", "3.3.3", "3.3.4", "3.4", "3.5", "7.1")
        ),
        *(f"Footnote {i}" for i in (1, 2)),
    ],
    "Algorithms": [f"Algorithm {i}" for i in range(1, 7)],
    "Equations and settings": [
        *(f"Equation {i}" for i in range(1, 8)),
        *("Setting A", "Setting B", "Setting C"),
        *("Special case A-2", "Special case p=1", "Special case of 3.3.3"),
    ],
    "References": NAMES,
    "Figures": [
        *(f"Figure 1 {letter}" for letter in "ABCDE"),
        *(f"Figure 2 {letter}" for letter in "ABCD"),
        *(f"Figure {number}" for number in (8, 9, 10, 11, 12)),
    ],
    "Symbols": [
        *("$m$", "$n$", "$x_i$", "$R$, $R_i$", "$S$", "$s_i$", r"$\mu$", r"$\sigma$", "$N$", "$H_1$", "$H_2$", "$F$"),
        *("$G$", r"$\hat s$", r"$\hat s_{long}$", r"$\hat s_{short}$", "counter", r"$\hat g_{long}$, $\hat g_{short}$"),
        *(r"$\partial E / \partial \hat s$", r"$\hat g$", r"$\alpha$", r"$\beta$", r"$\kappa$", "$p$", "$c$"),
    ],
}
"""Under each heading, the rows that must be there."""

ANYWHERE = [f"Section {s}" for s in ("4.1", "4.2", "4.3", "5", "7.2", "7.3", "7.4", "7.5", "7.6")]
"""Rows that stand under ``Sections`` or, until there is code, under ``Not yet here``."""


def defined(source: str) -> set[str]:
    """The dotted names that a module defines: functions, classes, constants, and what classes and instances hold."""
    found: set[str] = set()

    def targets(node: ast.AST) -> list[ast.expr]:
        if isinstance(node, ast.Assign):
            return [e for t in node.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return [node.target] if isinstance(node, ast.AnnAssign) else []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            found.update(prefix + t.id for t in targets(node) if isinstance(t, ast.Name))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and prefix:
                for target in (t for part in ast.walk(node) for t in targets(part)):
                    if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                        found.add(prefix + target.attr)

    visit(ast.parse(source).body, "")
    return found


@cache
def names_of(file: str) -> set[str]:
    return defined((ROOT / file).read_text(encoding="utf-8"))


def code_spans(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def references(document: Path) -> list[tuple[str, str | None]]:
    return sorted(
        {(m[1], m[2]) for span in code_spans(document) if (m := REFERENCE.fullmatch(span))},
        key=lambda r: (r[0], r[1] or ""),
    )


def tables() -> dict[str, list[list[str]]]:
    """Heading -> its table's rows, the header first; a heading has at most one table."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in MAP.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:].strip()
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {title: [row for row in rows if not set("".join(row)) <= set("-:")] for title, rows in found.items()}


def first_cells(title: str) -> list[str]:
    return [row[0] for row in tables()[title][1:]]


ALL = sorted({ref for document in DOCUMENTS for ref in references(document)}, key=lambda r: (r[0], r[1] or ""))


@pytest.mark.parametrize(("file", "name"), ALL, ids=[f"{f}::{n}" if n else f for f, n in ALL])
def test_reference_resolves(file: str, name: str | None) -> None:
    path = ROOT / file
    assert path.is_file(), f"docs name {file}, which does not exist"
    if name is None:
        return
    assert name in names_of(file), f"docs name {file}::{name}, which is not defined there; correct docs/*.md"
    leaf = name.rpartition(".")[2]
    renamed = re.sub(rf"\b{leaf}\b", "something_else", path.read_text(encoding="utf-8"))
    assert name not in defined(renamed), "this test would not notice a rename"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_mention_of_a_file_is_a_reference(document: Path) -> None:
    assert references(document)
    odd = [span for span in code_spans(document) if ".py" in span and not REFERENCE.fullmatch(span)]
    assert not odd, f"write these as `streamnorm/file.py::Name`: {odd}"
    bare = re.sub(r"`[^`\n]+`", "", document.read_text(encoding="utf-8"))
    assert ".py::" not in bare, "a reference without backticks"


@pytest.mark.parametrize("title", ROWS)
def test_every_part_of_the_paper_has_its_row(title: str) -> None:
    missing = [row for row in ROWS[title] if row not in first_cells(title)]
    assert not missing, f"docs/paper-map.md, {title!r}, lacks {missing}"


def test_every_section_is_either_mapped_or_said_to_be_missing() -> None:
    listed = first_cells("Sections") + first_cells("Not yet here")
    for row in ANYWHERE:
        assert listed.count(row) == 1, f"{row} stands {listed.count(row)} times in the map"
    assert list(tables())[-1] == "Not yet here"


def test_no_row_stands_twice() -> None:
    rows = [row for title in tables() for row in first_cells(title)]
    twice = sorted({row for row in rows if rows.count(row) > 1})
    assert not twice, f"docs/paper-map.md lists {twice} more than once"


def test_tables_are_whole() -> None:
    for title, (header, *rows) in tables().items():
        for row in rows:
            assert len(row) == len(header), f"{title!r}: {row[0]!r} has {len(row)} cells, its header {len(header)}"
            if title != "Not yet here":
                where = row[header.index("Code")] if "Code" in header else row[0]
                assert any(REFERENCE.fullmatch(s) for s in re.findall(r"`([^`]+)`", where)), f"{row[0]!r} has no code"


def test_references_are_the_three_choices_that_the_code_makes() -> None:
    made = {}
    for node in ast.parse((ROOT / "streamnorm/definition/ref.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="NormRef"), args=args)):
                made[name] = [a.value for a in args if isinstance(a, ast.Constant)]
    header, *rows = tables()["References"]
    assert header[2:5] == ["features", "place", "samples"]
    assert {row[0]: row[2:5] for row in rows} == made
    for row in rows:
        assert row[1] == f"`streamnorm/definition/ref.py::{row[0]}`"


def test_every_module_is_in_the_map() -> None:
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "streamnorm").rglob("*.py") if p.name != "__init__.py"}
    missing = sorted(modules - {file for file, _ in references(MAP)})
    assert not missing, f"docs/paper-map.md does not mention {missing}; say there what they are for"


def test_links_reach_a_heading() -> None:
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", document.read_text(encoding="utf-8")):
            text = (document.parent / target if target else document).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{document.name} links to {target}#{anchor}, which is no heading"
