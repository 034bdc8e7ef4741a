"""Collections of short documents as sparse binary bags of words: ``load_documents("movies")``.

What lives here: finding and reading a collection, the rule that chooses its vocabulary, its split, and how a document
is found by its title. Imports torch, the standard library, and from ``data`` what all files have in common.

Legend: ``n`` documents, ``V`` words of the vocabulary.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamnorm.lab.runs.classifier.data import ENVIRONMENT, DataError, read_gzip
from streamnorm.reading import misfit, parsed

VOCABULARY = 1992
"""Input units of the auto-encoder (seed 000)."""
TRAIN_PERCENT = 90
ORDER_SEED = 0
WORD = re.compile(r"[^\W\d_]{3,}")
PARAGRAPH_WORDS = 12
"""The fewest words of a paragraph of ``pydoc``."""
FILES = {"movies": "movies.jsonl.gz"}
"""Collections that lie in the data folder, under ``text/`` or directly."""
STOP_WORDS = frozenset(
    WORD.findall(
        """
    about above after again against all along also among and another any are around because been before being below
    between both but can could did does doing down during each either few for from further had has have having her here
    hers herself him himself his how into its itself just may might more most much must myself neither nor not now
    off once one only onto other our ours ourselves out over own same shall she should since some such than that the
    their theirs them themselves then there these they this those though through thus too toward towards two under
    until upon very was were what when where whether which while who whom whose why will with within without would yet
    you your yours yourself yourselves
    """
    )
)
"""English words that say nothing of what a document is about."""


@dataclass(frozen=True, eq=False)
class Bags:
    """n sets of numbers below ``size``, one after another: document i has ``members[offsets[i] : offsets[i + 1]]``.

    The rows of a sparse binary matrix ``(n, size)``, of which only mini-batches are ever made dense.

    >>> bags = Bags.of([[0, 2], [], [1]], 3)
    >>> bags.dense()
    tensor([[1., 0., 1.],
            [0., 0., 0.],
            [0., 1., 0.]])
    >>> bags.select(torch.tensor([2, 0])).members
    tensor([1, 0, 2])
    """

    members: Tensor
    offsets: Tensor
    size: int

    @classmethod
    def of(cls, sets: Iterable[Sequence[int]], size: int) -> Bags:
        """Bags with these members."""
        numbers, offsets = array("q"), array("q", [0])
        for members in sets:
            numbers.extend(members)
            offsets.append(len(numbers))
        return cls(torch.tensor(numbers, dtype=torch.int64), torch.tensor(offsets), size)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def select(self, index: Tensor) -> Bags:
        """The documents ``index (m,)``, in that order."""
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        where = torch.repeat_interleave(starts - offsets[:-1], lengths)
        return Bags(self.members[where.add_(torch.arange(len(where)))], offsets, self.size)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of them as zeros and ones, ``(n, size)``."""
        x = torch.zeros(len(self), self.size, dtype=dtype)
        rows = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())
        x[rows, self.members] = 1
        return x


@dataclass(frozen=True)
class Document:
    """One document as it was read; ``labels`` are never trained on."""

    title: str
    text: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Documents:
    """A collection ready for training, in an order that is the same for everybody.

    The first ``train`` documents train, those from ``held_out`` on test. ``titles`` are all different. ``name`` and
    ``source`` say what was read; both belong in a record.
    """

    name: str
    source: str
    titles: tuple[str, ...]
    words: Bags
    vocabulary: tuple[str, ...]
    labels: Bags
    label_names: tuple[str, ...]
    train: int
    held_out: int

    @property
    def tested(self) -> Tensor:
        """The numbers of the documents that test."""
        return torch.arange(self.held_out, len(self.titles))

    def labels_of(self, i: int) -> list[str]:
        """The labels of one document, by name."""
        here = self.labels.members[self.labels.offsets[i] : self.labels.offsets[i + 1]]
        return [self.label_names[label] for label in here.tolist()]

    def search(self, text: str) -> list[str]:
        """The titles that contain ``text``, whatever its case, in alphabetical order."""
        return sorted(title for title in self.titles if text.casefold() in title.casefold())

    def find(self, title: str) -> int:
        """The number of the document called ``title``, which may leave out its case and what stands in brackets at its
        end.

        Raises:
            ValueError: for a title that several documents have, with all of them, and for an unknown one, with those
                that contain it, or else the nearest.

        >>> documents = load_documents("pydoc", vocabulary=500)
        >>> documents.titles[documents.find("Lambda")]
        'lambda'
        """
        for fold in (str, str.casefold, _bare):
            found = [i for i, known in enumerate(self.titles) if fold(known) == fold(title)]
            if len(found) > 1:
                several = ", ".join(repr(self.titles[i]) for i in sorted(found, key=lambda i: self.titles[i])[:8])
                more = " ..." if len(found) > 8 else ""
                raise ValueError(f"{len(found)} documents of {self.name} are called {title!r}: {several}{more}")
            if found:
                return found[0]
        folded = {_bare(known): known for known in self.titles}
        near = [folded[match] for match in difflib.get_close_matches(_bare(title), folded, n=3, cutoff=0.5)]
        if holding := self.search(title):
            hint = f"{len(holding)} contain it, such as {', '.join(map(repr, holding[:3]))}"
        else:
            hint = f"the nearest are {', '.join(map(repr, near))}" if near else f"one of them is {self.titles[0]!r}"
        raise ValueError(f"no document of {self.name} is called {title!r}; {hint}")


def load_documents(
    name: str, data_root: str | Path | None = None, *, vocabulary: int = VOCABULARY, train_limit: int | None = None
) -> Documents:
    """The collection ``name``, a key of ``COLLECTIONS`` or the path of a JSON Lines file, gzipped or not.

    A word is a run of three letters or more, in lower case, that is not in ``STOP_WORDS``. The vocabulary is the
    words that stand in most documents of the whole collection, those of equal rank in alphabetical order. A document is
    the set of its words in the vocabulary. In an order drawn once from a fixed seed, the first 90 % of the documents
    train and the others test.

    Args:
        data_root: folder of the data files; default: the environment variable ``STREAMNORM_DATA``.
        vocabulary: V, how many words.
        train_limit: train on so many documents only; the vocabulary and the documents that test stay the same.

    Raises:
        ValueError: for an unknown name, or fewer words or documents than were asked for.
        FileNotFoundError: for a file that is not there.
        DataError: for a file that holds something else.

    >>> documents = load_documents("pydoc", vocabulary=300)
    >>> documents.words.size, documents.train == len(documents.titles) * 9 // 10
    (300, True)
    """
    for key, value in {"vocabulary": vocabulary, "train_limit": 1 if train_limit is None else train_limit}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is a whole number >= 1, got {value!r}")
    read, title = _read(name, data_root)
    if len(read) < 2:
        raise ValueError(f"{title} has {len(read)} documents; give at least two, one to train on and one to test")
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
    titles, known = _distinct(document.title for document in read), {}
    words = [_numbered(set(WORD.findall(read[i].text.lower())) - STOP_WORDS, known) for i in order]
    counts = Counter(number for numbers in words for number in numbers)
    if vocabulary > len(counts):
        raise ValueError(
            f"{title} has {len(counts)} different words, fewer than a vocabulary of {vocabulary}; ask for fewer by "
            f"--vocabulary {len(counts)} or give more text"
        )
    chosen = sorted(known, key=lambda word: (-counts[known[word]], word))[:vocabulary]
    held_out = max(1, len(read) * TRAIN_PERCENT // 100)
    if train_limit is not None and train_limit > held_out:
        raise ValueError(f"train_limit is {train_limit}, {title} has {held_out} documents to train on; lower it")
    labels = sorted({label for document in read for label in document.labels})
    digest = hashlib.sha256()
    for document in read:
        digest.update(json.dumps([document.title, document.text, document.labels]).encode())
    return Documents(
        Path(name).name,
        f"{title}: {len(read)} documents, the {vocabulary} commonest of {len(counts)} words, "
        f"sha256 {digest.hexdigest()[:16]}",
        tuple(titles[i] for i in order),
        _bags(words, [known[word] for word in chosen]),
        tuple(chosen),
        _bags([read[i].labels for i in order], labels),
        tuple(labels),
        train_limit or held_out,
        held_out,
    )


def same_documents(documents: Documents, there: str, path: Path) -> None:
    """Raise unless ``there``, the source that the checkpoint at ``path`` names, is that of ``documents``.

    Raises:
        ValueError: with both sources.
    """
    if there != documents.source:
        raise ValueError(f"{path} was trained on other documents: {there} there and {documents.source} here")


def _numbered(words: Iterable[str], known: dict[str, int]) -> Sequence[int]:
    """A number for each word, a new one for those not yet ``known``: a large collection fits that way."""
    return array("q", (known.setdefault(word, len(known)) for word in words))


def _bags(sets: Iterable[Iterable[Hashable]], names: Sequence[Hashable]) -> Bags:
    """The places in ``names`` of what each set holds of them."""
    place = {name: i for i, name in enumerate(names)}
    return Bags.of((sorted({place[name] for name in names_ if name in place}) for names_ in sets), len(names))


def _distinct(titles: Iterable[str]) -> list[str]:
    """The titles, all different: one that comes again gets its number behind it, the first that is not taken.

    >>> _distinct(["Dust", "Dust", "Dust [2]"])
    ['Dust', 'Dust [2]', 'Dust [2] [2]']
    """
    seen: Counter[str] = Counter()
    found: dict[str, None] = {}
    for title in titles:
        seen[title] += 1
        name = title if seen[title] == 1 else f"{title} [{seen[title]}]"
        while name in found:
            seen[title] += 1
            name = f"{title} [{seen[title]}]"
        found[name] = None
    return list(found)


def _bare(title: str) -> str:
    return re.sub(r"\s*[(\[][^()\[\]]*[)\]]$", "", title).casefold()


# --- Reading


def read_pydoc(root: Path | None) -> tuple[list[Document], str]:
    """The paragraphs of the language reference that CPython carries for its interactive help, each labeled with its
    topic; ``root`` is not used. They differ a little between versions of Python."""
    from pydoc_data.topics import topics

    found: dict[str, Document] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            if len(WORD.findall(paragraph)) >= PARAGRAPH_WORDS:
                found.setdefault(paragraph, Document(topic, paragraph, (topic,)))
    return list(found.values()), f"pydoc_data of Python {platform.python_version()}"


def read_lines(path: Path) -> list[Document]:
    """A JSON Lines file of documents: objects with ``title`` and ``text``, and ``year`` and ``genres`` where known.

    Raises:
        DataError: for a line that is something else.
    """
    try:
        lines = read_gzip(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(path, f"is neither UTF-8 text nor gzipped UTF-8 text ({error.reason})") from error
    documents = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            document = _document(line)
            if document is None:
                wanted = 'an object like {"title": "...", "text": "...", "year": 1995, "genres": ["..."]}'
                raise DataError(path, f"line {number} is not {wanted}, it begins {line[:40]!r}")
            documents.append(document)
    return documents


def _document(line: str) -> Document | None:
    row, wrong = parsed(line, {"title": str, "text": str})
    if wrong:
        return None
    year, genres = row.get("year"), row.get("genres", [])
    if misfit([year, genres], [(float, str, None), [str, ...]]):
        return None
    return Document(row["title"] if year is None else f"{row['title']} ({year})", row["text"], tuple(genres))


def _file_reader(name: str) -> Callable[[Path | None], tuple[list[Document], str]]:
    file = FILES[name]

    def read(root: Path | None) -> tuple[list[Document], str]:
        how = f"Put {file} into FOLDER/text or FOLDER and set {ENVIRONMENT}=FOLDER or pass --data-root FOLDER"
        if root is None:
            raise FileNotFoundError(f"{name}: no data folder was given. {how}")
        for path in (root / "text" / file, root / file):
            if path.is_file():
                return read_lines(path), file
        raise FileNotFoundError(f"{name}: no {file} in {root} or {root / 'text'}. {how}")

    return read


COLLECTIONS: dict[str, Callable[[Path | None], tuple[list[Document], str]]] = {
    "pydoc": read_pydoc,
    **{name: _file_reader(name) for name in FILES},
}
"""Name -> reader. A reader takes the data folder (None: none was given); it returns documents and their source."""


def _read(name: str, data_root: str | Path | None) -> tuple[list[Document], str]:
    if name in COLLECTIONS:
        root = data_root if data_root is not None else os.environ.get(ENVIRONMENT) or None
        return COLLECTIONS[name](None if root is None else Path(root).expanduser())
    path = Path(name).expanduser()
    if path.is_file():
        return read_lines(path), path.name
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"no file of documents at {path}; known without a file are {', '.join(COLLECTIONS)}")
    near = difflib.get_close_matches(name.lower(), COLLECTIONS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown collection {name!r}; known are {', '.join(COLLECTIONS)} and paths of files.{hint}")
