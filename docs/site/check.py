"""The built site: no link is dead, nothing is loaded from elsewhere. ``python docs/site/check.py build/site``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that a link can end in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.names |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values and values.get("rel") != "canonical":
            self.loads.append(values[LOADED[tag]])


def faults(site: Path) -> list[str]:
    """A line for every link that leads nowhere, and for every file that would come from a network."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        found += [f"{here}: loads {url}" for url in page.loads if urlsplit(url).netloc]
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].names if target in pages else {unquote(parts.fragment)}
            if not target.is_file() or unquote(parts.fragment) not in known:
                found.append(f"{here}: {link} leads nowhere")
    found += [f"{path.relative_to(site)}: loads from a network" for path in site.rglob("*.css") if _far(path)]
    return found if pages else [f"{site}: no pages"]


def _far(style: Path) -> bool:
    text = style.read_text(encoding="utf-8")
    return "url(http" in text or "url(//" in text or "@import" in text


if __name__ == "__main__":
    lines = sorted(set(faults(Path(sys.argv[1]))))
    print(*lines, sep="\n")
    sys.exit(bool(lines))
