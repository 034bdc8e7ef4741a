"""What mkdocs is told beside mkdocs.yml: pages that live outside of docs/, pages that may not be there yet, equations.

A folder in the navigation stands for all its pages. README.md becomes the home page, a program a page that shows it.
Links are written for a reader of the repository, and are made to lead to the pages of the site here.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
RENAMED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
OUTSIDE = ("benchmarks/results/**/*.md", "benchmarks/results/**/*.png", "examples/*.md")
STACKED = (
    "index.md",
    "which.md",
    "compatibility.md",
    "paper-map.md",
    "api/README.md",
    "decisions/README.md",
    "results/README.md",
)
OPTIONAL = ("scaling.md", "reliability.md")  # in the navigation once they are there
PROGRAMS = ("examples/*.py", "examples/gallery/*.py", "docs/*.py", "docs/results/*.py")
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
SHIM = "https://unpkg.com/iframe-worker/shim"
FORMULA = re.compile(r"^```math\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def added() -> dict[str, str]:
    """Of every page from outside of docs/, its path in the repository, and where it stands in the site."""
    found = dict(RENAMED)
    found |= {path: path for pattern in OUTSIDE for path in _paths(pattern)}
    return found | {path: f"{path.removesuffix('.py')}.md" for pattern in PROGRAMS for path in _paths(pattern)}


def _paths(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def _program(path: str) -> str:
    """A page that shows a program: the first line of its docstring, then the code."""
    return f"# {Path(path).name}\n\n`{path}`\n\n```python\n{(ROOT / path).read_text()}```\n"


def on_files(files: Files, config: Any) -> Files:
    for path, uri in added().items():
        if path.endswith(".py"):
            files.append(File.generated(config, uri.removeprefix("docs/"), content=_program(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    config["nav"] = _expanded(config["nav"], {file.src_uri for file in files})
    return files


def _expanded(nav: list[Any], pages: set[str]) -> list[Any]:
    """The navigation with folders replaced by their pages, newest first, and without pages that do not exist."""
    found: list[Any] = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            found.append({title: _expanded(value, pages)})
        elif value.endswith(".md"):
            found += [entry] if value in pages or value not in OPTIONAL else []
        else:
            inside = sorted(uri for uri in pages if re.fullmatch(rf"{value}/.+\.md", uri))
            index = f"{value}/README.md"
            records = inside[::-1] if re.search(r"/\d{4}-", inside[-1]) else inside
            found.append({title: [index] * (index in inside) + [uri for uri in records if uri != index]})
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from a file to another of the repository, as links from its page to the other's page."""
    here = page.file.src_uri
    there = {uri: path for path, uri in added().items()}
    own = there.get(here, there.get(f"docs/{here}", f"docs/{here}"))
    where = added()

    def led(match: re.Match[str]) -> str:
        start, link, anchor, end = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
        if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
            path += "/README.md"
        uri = where.get(path, path).removeprefix("docs/")
        return f"{start}{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor or ''}{end}"

    markdown = FORMULA.sub(r"$$\n\1$$\n", markdown)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(led, part) for part in parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Equations as MathML, which browsers draw by themselves; tables of sentences that a phone stacks."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = unescape(match[3]).strip().replace("{aligned}", "{align*}")  # the converter's name for it
        return convert(formula, display=display)

    html = MATH.sub(drawn, html)
    return TABLE.sub(_stacked, html) if page.file.src_uri in STACKED else html


def _stacked(table: re.Match[str]) -> str:
    """Each cell with the name of its column."""
    names = re.findall(r"<th[^>]*>(.*?)</th>", table[0])

    def named(row: re.Match[str]) -> str:
        name = iter(names)
        return re.sub(r"<td", lambda _: f'<td data-name="{re.sub("<.*?>", "", next(name))}"', row[0])

    return f'<div class="stacked">{re.sub(r"<tr>.*?</tr>", named, table[0], flags=re.DOTALL)}</div>'


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme's helper for search without a server comes from a network; ours lies beside the pages."""
    return output.replace(SHIM, get_relative_url("frame-worker.js", page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    return output_content.replace(SHIM, "frame-worker.js")
