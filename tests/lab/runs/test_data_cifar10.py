"""CIFAR-10: small parquet files written here are read, damaged, refused; the real ones are checked where they exist."""

from __future__ import annotations

import pytest
import torch
from images import (
    REAL,
    TEST,
    TRAIN,
    assert_float32_close,
    channel_moments,
    encode,
    expected,
    labels,
    needs_real,
    random_pixels,
    write_cifar10,
    write_parquet,
)

from streamnorm.lab.runs.classifier import data

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("subfolder", ["cifar10", "."])
def test_cifar10_of_pngs_is_read_bit_by_bit(tmp_path, subfolder):
    images = write_cifar10(tmp_path / "root" / subfolder)
    raw = data.DATASETS["cifar10"](tmp_path / "root")
    assert torch.equal(raw.train[0], images["train"])
    assert torch.equal(raw.test[0], images["test"])
    d = data.load("cifar10", tmp_path / "root", train_limit=4)
    assert d.name.startswith("cifar10 [partial")
    assert d.test_y.tolist() == labels(TEST)
    assert_float32_close(d.train_x, expected(images["train"], images["train"])[:4])
    assert_float32_close(d.test_x, expected(images["test"], images["train"]))


def test_cifar10_of_jpegs_says_so_also_from_the_cache(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar10", "JPEG")
    assert data.load("cifar10", tmp_path).name.startswith("cifar10 (JPEG mirror) [partial")
    monkeypatch.setitem(data.PUBLISHED, "cifar10", (TRAIN, TEST))
    assert data.load("cifar10", tmp_path).name == "cifar10 (JPEG mirror)"


def test_one_jpeg_among_pngs_is_enough_for_the_name(tmp_path):
    images = write_cifar10(tmp_path)["test"]
    mixed = [encode(x, "JPEG" if i == 4 else "PNG") for i, x in enumerate(images)]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", mixed, labels(TEST))
    assert "JPEG" in data.load("cifar10", tmp_path).name


def test_an_image_column_of_plain_bytes_is_read_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    images = write_cifar10(tmp_path)["test"]
    table = pyarrow.table({"img": [encode(x, "PNG") for x in images], "label": labels(TEST)})
    pyarrow.parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert torch.equal(data.DATASETS["cifar10"](tmp_path).test[0], images)


def test_shards_are_joined_in_order_and_a_lost_one_is_missed(tmp_path):
    images = write_cifar10(tmp_path)["train"]
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    for i, part in enumerate(images.split(TRAIN // 2)):
        contents = [encode(x, "PNG") for x in part]
        write_parquet(tmp_path / f"train-0000{i}-of-00002.parquet", contents, labels(TRAIN // 2))
    assert torch.equal(data.DATASETS["cifar10"](tmp_path).train[0], images)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train-00000-of-00002\.parquet"):
        data.load("cifar10", tmp_path)


PIXELS = random_pixels(1, 3, 32, 32)[0]
DAMAGED_ROWS = {
    "not an image": ([b"hello"], [1], "image 0 is neither a JPEG nor a PNG: b'hello'"),
    "no bytes": ([encode(PIXELS, "PNG"), None], [1, 1], "image 1 is neither.*None"),
    "truncated png": ([encode(PIXELS, "PNG")[:100]], [1], "image 0 does not decode"),
    "truncated jpeg": ([encode(PIXELS, "JPEG")[:-300]], [1], "image 0 does not decode"),
    "other size": ([encode(random_pixels(1, 3, 16, 24)[0], "PNG")], [1], "image 0 is 24x16 instead of 32x32"),
    "label 2**62": ([encode(PIXELS, "PNG")], [2**62], "from 4611686018427387904 to"),
    "label 10": ([encode(PIXELS, "PNG")], [10], "from 10 to 10"),
    "label -1": ([encode(PIXELS, "PNG")], [-1], "from -1 to -1"),
    "no label": ([encode(PIXELS, "PNG")] * 2, [1, None], "not an integer"),
    "label 0.5": ([encode(PIXELS, "PNG")], [0.5], "not an integer"),
    "no rows": ([], [], "no rows"),
}


def test_what_the_parquet_reader_says_in_several_lines_is_said_in_one():
    assert "\n" not in str(data.DataError("x.parquet", "is not readable (invalid data\nin a page header\n)"))


def test_an_image_of_another_size_is_refused_by_its_header(tmp_path, own_cache, monkeypatch):
    """Nothing is decoded that may be a thousand times as large as its file."""
    write_cifar10(tmp_path)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [encode(random_pixels(1, 3, 64, 64)[0], "PNG")], [1])
    from PIL import ImageFile

    decode = ImageFile.ImageFile.load
    sizes = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or decode(self))
    with pytest.raises(data.DataError, match="image 0 is 64x64 instead of 32x32"):
        data.load("cifar10", tmp_path)
    assert set(sizes) == {(32, 32)}


@pytest.mark.parametrize("case", DAMAGED_ROWS)
def test_a_damaged_row_is_named_with_the_reason(tmp_path, own_cache, case):
    images, label, reason = DAMAGED_ROWS[case]
    write_cifar10(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(path, images, label)
    with pytest.raises(data.DataError, match=reason) as caught:
        data.load("cifar10", tmp_path)
    assert str(path) in str(caught.value)
    assert not own_cache.exists(), "a refused file left a cache"


@pytest.mark.parametrize("damage", ["truncated", "zeros inside", "not parquet", "empty", "other column"])
def test_a_damaged_parquet_file_is_named_with_the_reason(tmp_path, damage):
    write_cifar10(tmp_path)
    path = tmp_path / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "other column":
        write_parquet(path, [encode(PIXELS, "PNG")], [1], image_column="image")
    else:
        zeros = content[:4] + bytes(middle) + content[4 + middle :]
        path.write_bytes(
            {"truncated": content[:middle], "zeros inside": zeros, "not parquet": b"a,b\n1,2\n"}.get(damage, b"")
        )
    with pytest.raises(
        data.DataError, match="needs img and label" if damage == "other column" else "parquet"
    ) as caught:
        data.load("cifar10", tmp_path)
    assert str(path) in str(caught.value)


@needs_real("cifar10")
def test_real_cifar10():
    raw = data.DATASETS["cifar10"](REAL)
    assert raw.name == "cifar10 (JPEG mirror)"
    assert "9cc3fe294576dc85" in raw.source
    assert raw.train[0].shape == (50_000, 3, 32, 32)
    assert raw.test[0].shape == (10_000, 3, 32, 32)
    assert raw.train[1][:10].tolist() == [2, 3, 9, 5, 8, 6, 6, 2, 6, 5]
    assert raw.test[1][:10].tolist() == [9, 0, 2, 5, 2, 8, 5, 6, 2, 3]
    assert raw.train[1].bincount().tolist() == [5000] * 10
    assert raw.test[1].bincount().tolist() == [1000] * 10
    for (x, _), means, stds in (
        (raw.train, [0.4913, 0.4821, 0.4465], [0.2452, 0.2428, 0.2606]),
        (raw.test, [0.4941, 0.4851, 0.4504], [0.2448, 0.2422, 0.2606]),
    ):
        mean, std = channel_moments(x)
        assert mean == pytest.approx(means, abs=6e-5)
        assert std == pytest.approx(stds, abs=6e-5)
