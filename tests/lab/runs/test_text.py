"""Texts: what is read and refused, the split, and the streams that a text is cut into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from streamnorm.lab.runs.language.data import TEXTS, decode, encode, load_text, streams

REAL = Path(os.environ.get("STREAMNORM_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMNORM_DATA", raising=False)


def written(folder: Path, content: str | bytes, name: str = "some.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- Reading


def test_pydoc_is_english_text_that_needs_no_files() -> None:
    text = load_text("pydoc")
    assert len(text.train) > 300_000
    assert 60 < len(text.vocabulary) < 200
    assert " the statement " in decode(text.train, text.vocabulary)
    assert "pydoc_data of Python" in text.source
    again = load_text("pydoc")
    assert torch.equal(again.train, text.train)
    assert again.source == text.source


def test_the_vocabulary_is_the_sorted_characters_and_the_split_99_to_1(tmp_path: Path) -> None:
    content = "abcé\n" * 100
    text = load_text(str(written(tmp_path, content)))
    assert text.vocabulary == "\nabcé"
    assert text.name == "some.txt"
    assert decode(text.train, text.vocabulary) == content[:495]
    assert decode(text.validation, text.vocabulary) == content[494:], "it begins with the last training character"
    assert text.train.dtype == text.validation.dtype == torch.int64


def test_a_limit_keeps_the_first_characters(tmp_path: Path) -> None:
    path = written(tmp_path, "ab" * 100 + "c" * 100)
    text = load_text(str(path), limit=200)
    assert text.vocabulary == "ab"
    assert len(text.train) + len(text.validation) - 1 == 200
    with pytest.raises(ValueError, match=r"limit of some.txt is 301, but it has 300 characters"):
        load_text(str(path), limit=301)
    with pytest.raises(ValueError, match=r"limit .* got 0"):
        load_text(str(path), limit=0)


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    assert load_text(str(written(tmp_path, b"\xef\xbb\xbf" + b"ab" * 50))).vocabulary == "ab"


@pytest.mark.parametrize("place", ["tinyshakespeare.txt", "shakespeare/tinyshakespeare.txt"])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_shakespeare_is_looked_for_in_the_data_folder(
    place: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "To be, or not to be. " * 20, place)
    if how == "environment":
        monkeypatch.setenv("STREAMNORM_DATA", str(tmp_path))
    assert load_text("tinyshakespeare", tmp_path if how == "argument" else None).vocabulary == " ,.Tbenort"


@pytest.mark.skipif(not (REAL / "shakespeare").is_dir(), reason=f"no real files in {REAL / 'shakespeare'}")
@pytest.mark.parametrize(
    ("name", "characters", "symbols"), [("tinyshakespeare", 1_115_394, 65), ("shakespeare", 5_283_871, 80)]
)
def test_the_real_files_have_their_published_counts(name: str, characters: int, symbols: int) -> None:
    text = load_text(name, REAL)
    assert len(text.train) + len(text.validation) - 1 == characters
    assert len(text.vocabulary) == symbols


def test_what_is_not_there_is_said_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data folder was given.*STREAMNORM_DATA=FOLDER.*--data-root"):
        load_text("shakespeare")
    with pytest.raises(FileNotFoundError, match=r"no shakespeare.txt in .*Put shakespeare.txt into"):
        load_text("shakespeare", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no text file at nowhere/a.txt; known without a file are pydoc"):
        load_text("nowhere/a.txt")
    with pytest.raises(ValueError, match=r"unknown text 'shakespere'.*Did you mean 'shakespeare'") as refusal:
        load_text("shakespere")
    assert all(name in str(refusal.value) for name in TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\xff" * 20, r"is no UTF-8 text: byte 0xff at position 2 .*iconv"),
        (b"aaaa" * 50, r"holds the single symbol 'a', there is nothing to predict"),
        (b"", r"holds no characters, there is nothing to predict"),
    ],
)
def test_a_text_that_cannot_be_learned_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_text(str(written(tmp_path, content)))


# --- Symbols


def test_symbols_come_back_as_the_text_they_were() -> None:
    text = "naïve \U0001f600 Σ\n"
    vocabulary = "".join(sorted(set(text)))
    assert decode(encode(text, vocabulary), vocabulary) == text
    assert encode("", vocabulary).shape == (0,)


def test_unknown_characters_are_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 unknown characters: 'z', 'é'; the vocabulary is 'abc'"):
        encode("azbéz", "abc")
    many = r"26 unknown characters: 'a', .*'h' \.\.\.; the vocabulary is '01'"
    with pytest.raises(ValueError, match=many):
        encode("abcdefghijklmnopqrstuvwxyz", "01")
    with pytest.raises(ValueError, match=r"1 unknown characters: 'b'; the vocabulary is 'ac'"):
        load_text(str(written(tmp_path, "ab" * 60)), vocabulary="ac")


# --- Streams


@pytest.mark.parametrize(("length", "n"), [(101, 4), (103, 4), (50, 1), (9, 8)])
def test_streams_are_contiguous_side_by_side_and_one_symbol_ahead(length: int, n: int) -> None:
    symbols = torch.arange(length)
    x, y = streams(symbols, n)
    each = (length - 1) // n
    assert x.shape == y.shape == (each, n)
    assert torch.equal(y, x + 1)
    assert x.T.flatten().tolist() == list(range(n * each)), "every symbol once, in its order"


def test_a_text_too_short_for_its_streams_has_none() -> None:
    assert streams(torch.arange(5), 8)[0].shape == (0, 8)
