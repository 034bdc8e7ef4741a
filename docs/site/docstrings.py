"""Docstrings as pages show them: literal blocks as equations, examples as code, shapes in bold."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import griffe

BLOCK = re.compile(r"(^|\S)::\n\n((?:    .*\n|\n)*(?:    .*))(?=\n|$)", re.MULTILINE)
ALONE = re.compile(r"^``([^`\n]+ (?:=|<-) [^`\n]+)``$", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
SHAPES = re.compile(r"^((?:Args, s|S)hapes(?: and errors)?):", re.MULTILINE)
SOURCE = """

<details class="source" markdown="1"><summary>Source: {where}</summary>

````python
{code}
````

</details>
"""
LETTERS = {"alpha": "α", "beta": "β", "kappa": "κ", "theta": "θ", "sigma": "σ", "mu": "μ"}
GREEK = re.compile(rf"\b({'|'.join(LETTERS)})(?=\d|_|\b)")


def equation(text: str) -> str:
    """Plain text with Greek letters, hats, indices and powers, in the columns that it was written in.

    >>> equation("s_hat = alpha1 long^2")
    '<span class="hat">s</span> = α<sub>1</sub> long<sup>2</sup>'
    """
    text = GREEK.sub(lambda match: LETTERS[match[1]], escape(text, quote=False).replace("&lt;-", "←"))
    text = re.sub(r"\bdE/d(?=[a-zμσ])", "∂E/∂", text)
    text = re.sub(r"(?<![a-zA-Z])([a-zμσ])_hat\b", r'<span class="hat">\1</span>', text)
    text = re.sub(r"\b([a-zA-Zαβκθσμ])_(?:\{([^}]+)\}|([a-zA-Z]{1,3}|\d)\b)", r"\1<sub>\2\3</sub>", text)
    text = re.sub(r"([αβκθ])(\d)\b", r"\1<sub>\2</sub>", text)
    return re.sub(r"\^(?:\(([^)]+)\)|(\w+))", r"<sup>\1\2</sup>", text)


def _shown(text: str) -> str:
    return f'<pre class="equation">{equation(text)}</pre>'


def _block(match: re.Match[str]) -> str:
    lines = match[2].rstrip().split("\n")
    body = "\n".join(line.removeprefix("    ") for line in lines)
    before = f"{match[1]}:\n\n" if match[1] else ""
    return f"{before}{_shown(body)}\n"


def readable(docstring: str) -> str:
    """The docstring in Markdown."""
    text = BLOCK.sub(_block, docstring)
    text = ALONE.sub(lambda match: _shown(match[1]), text)
    text = EXAMPLE.sub(lambda match: f"**Example**\n\n```pycon\n{match[0]}\n```", text)
    return SHAPES.sub(r"**\1:**", text)


class Readable(griffe.Extension):
    """Does so when a module is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and (obj.is_class or obj.is_function or obj.is_attribute):
            obj.docstring.value = readable(obj.docstring.value) + _source(obj)


def _source(obj: griffe.Object) -> str:
    """The source of a class or function, folded."""
    if obj.is_attribute or not obj.source:
        return ""
    where = f"{obj.relative_package_filepath.as_posix()}, line {obj.lineno}"
    return SOURCE.format(where=where, code=obj.source)
