"""The texts of the language models, as symbols: ``load_text("tinyshakespeare")``.

What lives here: finding and reading a text, its vocabulary, the split into training and validation, and how a text is
cut into streams and they into chunks. Imports torch, the standard library, and from ``data`` the name of the
environment variable.

Legend: ``V`` symbols of the vocabulary, ``n`` streams, ``T`` time steps.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamnorm.lab.runs.classifier.data import ENVIRONMENT

TRAIN_PERCENT = 99
FILES = {"tinyshakespeare": "tinyshakespeare.txt", "shakespeare": "shakespeare.txt"}
"""Texts that lie in the data folder, under ``shakespeare/`` or directly."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text ready for training: symbols int64, each the place of its character in ``vocabulary``.

    The first 99 % train, the rest validates (paper, section 7.6). ``validation`` begins with the last training symbol,
    from which its first own symbol is predicted. ``name`` and ``source`` say what was read; both belong in a record.
    """

    name: str
    vocabulary: str
    train: Tensor
    validation: Tensor
    source: str


def load_text(
    name: str, data_root: str | Path | None = None, *, vocabulary: str | None = None, limit: int | None = None
) -> Text:
    """The text ``name``, a key of ``TEXTS`` or the path of a UTF-8 file.

    Args:
        data_root: folder of the data files; default: the environment variable ``STREAMNORM_DATA``.
        vocabulary: of a checkpoint that is to read the text; None: the text's own characters, sorted.
        limit: keep so many characters only, the first.

    Raises:
        ValueError: for an unknown name, a file that is no UTF-8, a text of a single symbol, fewer characters than
            ``limit``, or characters that ``vocabulary`` does not have.
        FileNotFoundError: for a file that is not there.

    >>> text = load_text("pydoc", limit=10_000)
    >>> len(text.train), len(text.validation) - 1
    (9900, 100)
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit is a number of characters >= 1, or None for all, got {limit!r}")
    whole, title = _read(name, data_root)
    if limit is not None:
        if limit > len(whole):
            raise ValueError(f"limit of {title} is {limit}, but it has {len(whole)} characters; lower it or omit it")
        whole = whole[:limit]
    own = "".join(sorted(set(whole)))
    if len(own) < 2:
        what = f"the single symbol {own!r}" if own else "no characters"
        raise ValueError(f"{title} holds {what}, there is nothing to predict; give a text of at least two symbols")
    symbols = encode(whole, own if vocabulary is None else vocabulary)
    cut = len(symbols) * TRAIN_PERCENT // 100
    if cut < 1:
        raise ValueError(f"{title} has {len(whole)} characters, too few to train on 99 % and validate on 1 % of them")
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    source = f"{title}: {len(whole)} characters, {len(own)} symbols, sha256 {digest}"
    return Text(Path(name).name, vocabulary or own, symbols[:cut], symbols[cut - 1 :], source)


def read_pydoc(root: Path | None) -> tuple[str, str]:
    """The language reference that CPython carries for its interactive help, topic after topic; ``root`` is not used.

    English prose with examples, some 700,000 characters; they differ a little between versions of Python.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)), f"pydoc_data of Python {platform.python_version()}"


def _file_reader(name: str) -> Callable[[Path | None], tuple[str, str]]:
    file = FILES[name]

    def read(root: Path | None) -> tuple[str, str]:
        how = f"Put {file} into FOLDER/shakespeare or FOLDER and set {ENVIRONMENT}=FOLDER or pass --data-root FOLDER"
        if root is None:
            raise FileNotFoundError(f"{name}: no data folder was given. {how}")
        for path in (root / "shakespeare" / file, root / file):
            if path.is_file():
                return _decode(path), f"{file}"
        raise FileNotFoundError(f"{name}: no {file} in {root} or {root / 'shakespeare'}. {how}")

    return read


TEXTS: dict[str, Callable[[Path | None], tuple[str, str]]] = {
    "pydoc": read_pydoc,
    **{name: _file_reader(name) for name in FILES},
}
"""Name -> reader. A reader takes the data folder (None: none was given) and returns the text and where it came from."""


def _read(name: str, data_root: str | Path | None) -> tuple[str, str]:
    if name in TEXTS:
        root = data_root if data_root is not None else os.environ.get(ENVIRONMENT) or None
        return TEXTS[name](None if root is None else Path(root).expanduser())
    path = Path(name).expanduser()
    if path.exists():
        return _decode(path), path.name
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"no text file at {path}; known without a file are {', '.join(sorted(TEXTS))}")
    near = difflib.get_close_matches(name.lower(), TEXTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown text {name!r}; known are {', '.join(sorted(TEXTS))} and paths of text files.{hint}")


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], error.start
        raise ValueError(
            f"{path} is no UTF-8 text: byte 0x{byte:02x} at position {place} ({error.reason}); "
            f"convert it, for instance: iconv -f latin1 -t utf-8 {path}"
        ) from error


def encode(text: str, vocabulary: str) -> Tensor:
    """Symbols int64 ``(len(text),)``.

    Raises:
        ValueError: for characters that the vocabulary does not have, with the first of them.

    >>> encode("abba", "ab").tolist()
    [0, 1, 1, 0]
    """
    if not text:
        return torch.zeros(0, dtype=torch.int64)
    codes, known = _codes(text), _codes(vocabulary)
    symbols = torch.searchsorted(known, codes).clamp_(max=len(known) - 1)
    strange = known[symbols] != codes
    if strange.any():
        characters = sorted({text[i] for i in strange.nonzero()[:, 0].tolist()})
        shown = ", ".join(map(repr, characters[:8])) + (" ..." if len(characters) > 8 else "")
        raise ValueError(f"{len(characters)} unknown characters: {shown}; the vocabulary is {vocabulary!r}")
    return symbols


def decode(symbols: Tensor, vocabulary: str) -> str:
    """The text that ``encode`` read."""
    return "".join(vocabulary[i] for i in symbols.tolist())


def _codes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)


def streams(symbols: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``(length, n)``: the text as n contiguous streams side by side, the target one symbol on.

    What does not fill all streams is left out at the end.

    >>> x, y = streams(torch.arange(8), 2)
    >>> x.T.tolist(), y.T.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    length = (len(symbols) - 1) // n
    return symbols[: n * length].view(n, length).T, symbols[1 : n * length + 1].view(n, length).T


def chunk(lengths: Sequence[int], update: int, batch: int) -> slice:
    """The rows of the streams that mini-batch ``batch`` of an update reads.

    Lengths take turns from update to update, and mini-batch j begins with the j-th of them: the mini-batches of an
    update differ in length, and after a turn of all lengths every stream has come equally far.

    >>> [chunk((2, 5), update, 0) for update in range(3)]
    [slice(0, 2, None), slice(2, 7, None), slice(7, 9, None)]
    >>> [chunk((2, 5), update, 1) for update in range(3)]
    [slice(0, 5, None), slice(5, 7, None), slice(7, 12, None)]
    """
    turns, since = divmod(update, len(lengths))
    start = turns * sum(lengths) + sum(lengths[(batch + i) % len(lengths)] for i in range(since))
    return slice(start, start + lengths[(batch + since) % len(lengths)])
