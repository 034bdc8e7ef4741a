"""MNIST: small idx files written here are read, damaged, refused; the real ones are checked where they exist."""

from __future__ import annotations

import gzip

import pytest
import torch
from images import (
    REAL,
    TEST,
    TRAIN,
    assert_float32_close,
    channel_moments,
    expected,
    idx,
    labels,
    needs_real,
    write_mnist,
)

from streamnorm.lab.runs.classifier import data

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("subfolder", ["mnist", "."])
def test_mnist_is_read_bit_by_bit(tmp_path, monkeypatch, subfolder):
    images = write_mnist(tmp_path / "root" / subfolder)
    monkeypatch.setenv("STREAMNORM_DATA", str(tmp_path / "root"))
    raw = data.DATASETS["mnist"](tmp_path / "root")
    assert torch.equal(raw.train[0], images["train"].unsqueeze(1))
    assert torch.equal(raw.test[0], images["t10k"].unsqueeze(1))
    d = data.load("mnist")
    assert d.train_y.tolist() == labels(TRAIN)
    assert d.test_y.tolist() == labels(TEST)
    assert_float32_close(d.test_x, expected(images["t10k"].unsqueeze(1), images["train"].unsqueeze(1)))


def test_a_partial_set_carries_its_counts_in_its_name(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    assert data.load("mnist", tmp_path).name == f"mnist [partial: {TRAIN} train, {TEST} test]"
    monkeypatch.setitem(data.PUBLISHED, "mnist", (TRAIN, TEST))
    assert data.load("mnist", tmp_path, train_limit=5).name == "mnist"


def test_mnist_identity_is_of_the_bits_not_of_their_compression(tmp_path):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    before = data.load("mnist", tmp_path).source
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=5))
    assert data.load("mnist", tmp_path).source == before
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    assert data.load("mnist", tmp_path).source != before


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGED_IDX = {
    "bad magic": (IMAGES, idx(2049, [TEST, 28, 28], bytes(TEST * 784)), "magic number 2049 instead of 2051"),
    "labels for images": (LABELS, idx(2051, [TEST, 1, 1], bytes(TEST)), "magic number 2051 instead of 2049"),
    "a web page": (IMAGES, b"<!DOCTYPE html><html></html>", "magic number"),
    "empty": (LABELS, b"", "has 0 bytes"),
    "too short": (IMAGES, idx(2051, [TEST, 28, 28], bytes(TEST * 784 - 1)), "has 7855 bytes.*7856 bytes"),
    "too long": (LABELS, idx(2049, [TEST], bytes(TEST + 1)), "has 19 bytes.*18 bytes"),
    "no images": (IMAGES, idx(2051, [0, 28, 28], b""), "header says"),
    "other size": (IMAGES, idx(2051, [TEST, 14, 56], bytes(TEST * 784)), "14x56 instead of 28x28"),
    "fewer labels": (LABELS, idx(2049, [TEST - 1], bytes(TEST - 1)), f"{TEST - 1} labels for {TEST} images"),
    "label 10": (LABELS, idx(2049, [TEST], bytes([10] * TEST)), "from 10 to 10"),
    "truncated gzip": (IMAGES, gzip.compress(bytes(range(256)) * 40)[:-20], "does not unpack"),
    "flipped gzip": (LABELS, gzip.compress(b"12345678")[:-8] + bytes(8), "does not unpack"),
}


@pytest.mark.parametrize("case", DAMAGED_IDX)
def test_a_damaged_idx_file_is_named_with_the_reason(tmp_path, case):
    name, content, reason = DAMAGED_IDX[case]
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(data.DataError, match=reason) as caught:
        data.load("mnist", tmp_path)
    assert str(tmp_path / "mnist" / name) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_what_unpacks_to_more_than_any_such_file_is_refused_before_it_is_held(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setattr(data, "LARGEST_IDX", 1000)
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.gz: unpacks to more than 1,000 bytes"):
        data.load("mnist", tmp_path)


def test_missing_files_are_named_with_the_folders_and_the_way_out(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / LABELS).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'mnist'} lacks {LABELS} or {LABELS}.gz;" in message
    assert "STREAMNORM_DATA" in message
    assert "--data-root" in message
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        data.load("cifar10", tmp_path / "nowhere")


@needs_real("mnist")
def test_real_mnist():
    raw = data.DATASETS["mnist"](REAL)
    assert raw.name == "mnist"
    assert raw.train[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert raw.test[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert raw.train[1].bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert raw.test[1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    (mean,), (std,) = channel_moments(raw.train[0])
    assert (mean, std) == pytest.approx((0.130660, 0.308108), abs=6e-7)
