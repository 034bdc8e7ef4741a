"""Collections of documents: what is read and refused, the rule of the vocabulary, sparse bags, and titles."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from streamnorm.lab.runs.autoencoder.data import COLLECTIONS, STOP_WORDS, Bags, load_documents, same_documents
from streamnorm.lab.runs.classifier.data import DataError

REAL = Path(os.environ.get("STREAMNORM_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
FILMS = [
    {"title": "Dust", "year": 1939, "genres": ["Western"], "text": "A rider and a RIDER's horse. The horse: a bay!"},
    {"title": "Dust", "year": 1998, "genres": ["Western", "Drama"], "text": "The horse of 1939 remade, with no rider"},
    {"title": "The Sea", "year": 1950, "genres": ["Drama"], "text": "Sailors at the bay; sailors_and sea123shore"},
    {"title": "Été", "text": "L'été is a bay horse"},
]


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMNORM_DATA", raising=False)


def written(folder: Path, rows: Any = FILMS, name: str = "films.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") and not isinstance(rows, bytes) else content)
    return path


# --- Bags


def test_bags_are_the_rows_of_a_binary_matrix() -> None:
    bags = Bags.of([[0, 3], [], [1, 2, 3]], 4)
    dense = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    assert len(bags) == 3
    assert torch.equal(bags.dense(), dense)
    assert bags.dense(torch.float64).dtype == torch.float64
    for index in ([2, 0, 0], [1], [], [1, 2, 1]):
        assert torch.equal(bags.select(torch.tensor(index, dtype=torch.int64)).dense(), dense[index])


def test_a_selection_of_many_bags_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(60, 40, generator=generator) < 0.1).float()
    bags = Bags.of([row.nonzero()[:, 0].tolist() for row in x], 40)
    index = torch.randint(60, (100,), generator=generator)
    assert torch.equal(bags.select(index).dense(), x[index])
    assert torch.equal(bags.select(index).select(index[:50]).dense(), x[index][index[:50]])


# --- The vocabulary and the split


def test_the_vocabulary_are_the_words_of_most_documents_and_then_the_alphabet(tmp_path: Path) -> None:
    path = str(written(tmp_path))
    every = ("bay", "horse", "rider", "remade", "sailors", "sea", "shore", "été")
    assert load_documents(path, vocabulary=8).vocabulary == every, "3 documents, 3, 2, and 1 each"
    documents = load_documents(path, vocabulary=3)
    assert documents.vocabulary == every[:3]
    found = dict(zip(documents.titles, documents.words.dense().tolist(), strict=True))
    assert found == {"Dust (1939)": [1, 1, 1], "Dust (1998)": [0, 1, 1], "The Sea (1950)": [1, 0, 0], "Été": [1, 1, 0]}


def test_stop_words_are_words_in_lower_case() -> None:
    assert {"the", "and", "which"} < STOP_WORDS
    assert all(len(word) >= 3 and word == word.lower() for word in STOP_WORDS)


def test_labels_are_kept_by_name(tmp_path: Path) -> None:
    documents = load_documents(str(written(tmp_path)), vocabulary=3)
    assert documents.label_names == ("Drama", "Western")
    assert documents.labels_of(documents.find("Dust (1998)")) == ["Drama", "Western"]
    assert documents.labels_of(documents.find("Été")) == []


def many(count: int) -> list[dict[str, Any]]:
    return [{"title": f"film {i}", "text": f"horse rider bay{'x' * (i % 3)}"} for i in range(count)]


def test_nine_tenths_train_and_a_limit_changes_nothing_else(tmp_path: Path) -> None:
    path = str(written(tmp_path, many(50)))
    whole, limited = load_documents(path, vocabulary=3), load_documents(path, vocabulary=3, train_limit=7)
    assert (whole.train, whole.held_out, len(whole.tested)) == (45, 45, 5)
    assert (limited.train, limited.held_out) == (7, 45)
    assert limited.titles == whole.titles
    assert limited.source == whole.source
    assert torch.equal(limited.words.members, whole.words.members)
    assert sorted(whole.titles) != list(whole.titles), "in an order of their own"
    with pytest.raises(ValueError, match=r"train_limit is 46, films.jsonl has 45 documents to train on"):
        load_documents(path, vocabulary=3, train_limit=46)


def test_gzipped_or_not_is_the_same(tmp_path: Path) -> None:
    plain = load_documents(str(written(tmp_path)), vocabulary=3)
    packed = load_documents(str(written(tmp_path, name="films.jsonl.gz")), vocabulary=3)
    assert plain.source.split(":")[1:] == packed.source.split(":")[1:]
    assert torch.equal(plain.words.members, packed.words.members)


def test_another_text_or_vocabulary_is_another_source(tmp_path: Path) -> None:
    path = written(tmp_path)
    source = load_documents(str(path), vocabulary=3).source
    assert load_documents(str(path), vocabulary=4).source != source
    written(tmp_path, [*FILMS[:3], {**FILMS[3], "text": "L'été is a bay"}])
    changed = load_documents(str(path), vocabulary=3)
    assert changed.source != source
    with pytest.raises(ValueError, match=r"here.ckpt was trained on other documents: .* there and .* here"):
        same_documents(changed, source, Path("here.ckpt"))


def test_pydoc_needs_no_files() -> None:
    documents = load_documents("pydoc")
    assert len(documents.titles) > 500
    assert documents.words.size == 1992
    assert len(set(documents.titles)) == len(documents.titles)
    assert "lambda" in documents.titles
    assert documents.labels.offsets.diff().tolist() == [1] * len(documents.titles)
    again = load_documents("pydoc")
    assert again.titles == documents.titles
    assert again.source == documents.source


@pytest.mark.skipif(not (REAL / "text").is_dir(), reason=f"no real files in {REAL / 'text'}")
def test_the_films_are_those_that_were_counted() -> None:
    documents = load_documents("movies", REAL)
    assert (len(documents.titles), documents.train, documents.words.size) == (22_023, 19_820, 1992)
    sizes = documents.words.offsets.diff()
    assert (int(sizes.min()), int(sizes.max())) == (7, 89)
    assert documents.labels_of(documents.find("toy story")) == ["Animated", "Comedy"]
    assert len(documents.label_names) == 41
    assert documents.vocabulary[0] == "film"


@pytest.mark.parametrize("place", ["movies.jsonl.gz", "text/movies.jsonl.gz"])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_films_are_looked_for_in_the_data_folder(
    place: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, name=place)
    if how == "environment":
        monkeypatch.setenv("STREAMNORM_DATA", str(tmp_path))
    assert len(load_documents("movies", tmp_path if how == "argument" else None, vocabulary=2).titles) == 4


# --- Titles


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("The Sea (1950)", "The Sea (1950)"),
        ("the sea", "The Sea (1950)"),
        ("ÉTÉ", "Été"),
        ("dust (1939)", "Dust (1939)"),
    ],
)
def test_a_title_may_leave_out_its_case_and_year(asked: str, found: str, tmp_path: Path) -> None:
    documents = load_documents(str(written(tmp_path)), vocabulary=3)
    assert documents.titles[documents.find(asked)] == found


def test_a_title_of_several_and_one_of_none_are_answered_with_those_there_are(tmp_path: Path) -> None:
    documents = load_documents(str(written(tmp_path)), vocabulary=3)
    with pytest.raises(
        ValueError, match=r"2 documents of films.jsonl are called 'Dust': 'Dust \(1939\)', 'Dust \(1998\)'"
    ):
        documents.find("Dust")
    with pytest.raises(ValueError, match=r"no document .* is called 'The See'; the nearest are 'The Sea \(1950\)'"):
        documents.find("The See")
    with pytest.raises(ValueError, match=r"is called 'us'; 2 contain it, such as 'Dust \(1939\)', 'Dust \(1998\)'$"):
        documents.find("us")
    with pytest.raises(ValueError, match=r"is called '123'; one of them is '"):
        documents.find("123")


def test_titles_that_come_again_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    texts = ["horse", "horse rider", "horse rider bay"]
    path = written(tmp_path, [{"title": "Dust", "text": text} for text in texts])
    documents = load_documents(str(path), vocabulary=3)
    sizes = dict(zip(documents.titles, documents.words.offsets.diff().tolist(), strict=True))
    assert sizes == {"Dust": 1, "Dust [2]": 2, "Dust [3]": 3}
    assert documents.titles[documents.find("Dust")] == "Dust"


def test_titles_are_all_different_even_if_one_looks_numbered(tmp_path: Path) -> None:
    titles = ["Dust", "Dust", "Dust [2]", "Dust"]
    path = written(tmp_path, [{"title": title, "text": "horse rider bay"} for title in titles])
    found = load_documents(str(path), vocabulary=3).titles
    assert len(set(found)) == 4
    assert {"Dust", "Dust [2]"} < set(found)


# --- What is refused


def test_what_is_not_there_is_said_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data folder was given.*STREAMNORM_DATA=FOLDER.*--data-root"):
        load_documents("movies")
    with pytest.raises(FileNotFoundError, match=r"no movies.jsonl.gz in .*Put movies.jsonl.gz into"):
        load_documents("movies", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no file of documents at nowhere/a.jsonl; known without a file are pydoc"
    ):
        load_documents("nowhere/a.jsonl")
    with pytest.raises(ValueError, match=r"unknown collection 'movie'.*Did you mean 'movies'") as refusal:
        load_documents("movie")
    assert all(name in str(refusal.value) for name in COLLECTIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"To be, or not to be", r'line 1 is not an object like \{"title": .*, it begins \'To be'),
        (b'{"title": "a", "text": "b"}\n\n["c"]', r"line 3 is not an object"),
        (b'{"title": "a"}', r"line 1 is not an object"),
        (b'{"title": "a", "text": 3}', r"line 1 is not an object"),
        (b'{"title": "a", "text": "b", "genres": "Drama"}', r"line 1 is not an object"),
        (b"\x89PNG\r\n\x1a\n\xff", r"is neither UTF-8 text nor gzipped UTF-8 text"),
        (gzip.compress(b"x" * 100, mtime=0)[:-9], r"gzip data does not unpack"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_path(content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as refusal:
        load_documents(str(path))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 9}, r"has 8 different words, fewer than a vocabulary of 9; ask for fewer by --vocabulary 8"),
        ({"vocabulary": 0}, r"vocabulary is a whole number >= 1, got 0"),
        ({"vocabulary": 2.0}, r"vocabulary is a whole number >= 1, got 2.0"),
        ({"train_limit": 0}, r"train_limit is a whole number >= 1, got 0"),
    ],
)
def test_more_than_there_is_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents(str(written(tmp_path)), **options)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 1 documents; give at least two"):
        load_documents(str(written(tmp_path, FILMS[:1])), vocabulary=1)
