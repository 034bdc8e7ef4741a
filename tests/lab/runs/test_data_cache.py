"""The cache of decoded images: it spares decoding, is made again where it is damaged, and is never in the way."""

from __future__ import annotations

import pytest
import torch
from images import TRAIN, encode, labels, random_pixels, write_cifar10, write_parquet

from streamnorm.lab.runs.classifier import data

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_second_load_decodes_nothing_and_the_data_folder_is_left_alone(tmp_path, own_cache, monkeypatch):
    root = tmp_path / "root"
    write_cifar10(root / "cifar10", "JPEG")
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    first = data.load("cifar10", root)
    assert [path.suffix for path in own_cache.iterdir()] == [".safetensors"], "a temporary file was left"
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    second = data.load("cifar10", root)
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path, own_cache, damage):
    write_cifar10(tmp_path)
    first = data.load("cifar10", tmp_path)
    (cache,) = own_cache.iterdir()
    good = cache.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    cache.write_bytes({"truncated": good[:-9], "one bit": bytes(flipped), "empty": b""}[damage])
    again = data.load("cifar10", tmp_path)
    assert torch.equal(first.train_x, again.train_x)
    assert torch.equal(first.test_x, again.test_x)
    data_of_cache = cache.read_bytes()
    assert len(data_of_cache) == len(good)
    assert data_of_cache != bytes(flipped)


def test_a_cache_of_another_kind_is_made_again_and_nothing_is_unpickled(tmp_path, own_cache, monkeypatch):
    write_cifar10(tmp_path)
    first = data.load("cifar10", tmp_path)
    (cache,) = own_cache.iterdir()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for there in ({"train": [torch.ones(3)], "test": [], "jpeg": False}, {"train": "x"}):
        data.checkpoint.save(cache, there)
        assert torch.equal(first.train_x, data.load("cifar10", tmp_path).train_x)


def test_other_files_have_another_cache(tmp_path, own_cache):
    write_cifar10(tmp_path)
    data.load("cifar10", tmp_path)
    other = random_pixels(TRAIN, 3, 32, 32, seed=9)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [encode(x, "PNG") for x in other], labels(TRAIN))
    assert torch.equal(data.DATASETS["cifar10"](tmp_path).train[0], other)
    assert len(list(own_cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, own_cache):
    images = write_cifar10(tmp_path)
    own_cache.parent.mkdir()
    own_cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept"):
        raw = data.DATASETS["cifar10"](tmp_path)
    assert torch.equal(raw.train[0], images["train"])
