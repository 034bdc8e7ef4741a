"""Data sets: small files written here are read, damaged and refused; the real ones are checked where they exist."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamnorm.training import data

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("STREAMNORM_DATA") or REPOSITORY.parent / "shared" / "data")
TRAIN, TEST = 20, 10


def needs_real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"no real files in {REAL / name}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or data folder; the cache folder is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("STREAMNORM_DATA", raising=False)
    return tmp_path / "xdg" / "streamnorm"


def random_pixels(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> list[int]:
    return [i * 7 % 10 for i in range(count)]


def idx(magic: int, sizes: list[int], values: bytes) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + values


def write_mnist(folder: Path) -> dict[str, torch.Tensor]:
    """Four small idx files, the training ones gzipped; returns the images written."""
    folder.mkdir(parents=True)
    images = {}
    for part, count, suffix in (("train", TRAIN, ".gz"), ("t10k", TEST, "")):
        pack = gzip.compress if suffix else bytes
        images[part] = random_pixels(count, 28, 28, seed=count)
        content = idx(2051, [count, 28, 28], images[part].numpy().tobytes())
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(content))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(2049, [count], bytes(labels(count)))))
    return images


def encode(image: torch.Tensor, kind: str) -> bytes:
    """A ``(3, h, w)`` uint8 image as the bytes of a file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(out, kind)
    return out.getvalue()


def write_parquet(path: Path, images: list, label: list, image_column: str = "img") -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": content, "path": f"{i}"} for i, content in enumerate(images)]
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {image_column: pyarrow.array(rows, image_type), "label": pyarrow.array(label)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_cifar10(folder: Path, kind: str = "PNG") -> dict[str, torch.Tensor]:
    """One train and one test parquet file; returns the images written."""
    images = {"train": random_pixels(TRAIN, 3, 32, 32, seed=1), "test": random_pixels(TEST, 3, 32, 32, seed=2)}
    for split, x in images.items():
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [encode(i, kind) for i in x], labels(len(x)))
    return images


def expected(x: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Standardization in float64, written apart from the code under test."""
    x, train = x.double() / 255, train.double() / 255
    mean, var = train.mean((0, 2, 3), keepdim=True), train.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / var.sqrt()


def assert_float32_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Four roundings to float32 of numbers up to about 4 in size: 1e-5 leaves room for no other statistics."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


# --- digits


def test_digits_has_the_documented_shapes_and_is_standardized():
    d = data.load("digits")
    assert d.name == "digits"
    assert d.classes == 10
    assert "scikit-learn" in d.source
    assert d.train_x.shape == (1437, 1, 8, 8)
    assert d.test_x.shape == (360, 1, 8, 8)
    assert d.train_y.dtype == d.test_y.dtype == torch.int64
    assert d.train_x.dtype == d.test_x.dtype == torch.float32
    assert d.train_x.double().mean().abs() < 1e-5
    assert (d.train_x.double().std(correction=0) - 1).abs() < 1e-5
    assert d.test_x.mean().abs() > 1e-4, "the test split was standardized by its own mean"


def test_digits_splits_the_whole_set_without_overlap():
    from sklearn.datasets import load_digits

    raw = data.DATASETS["digits"](None)
    ours = torch.cat([raw.train[0], raw.test[0]]).flatten(1).tolist()
    theirs = load_digits().data.astype(int).tolist()
    assert ours != theirs, "not shuffled"
    assert sorted(ours) == sorted(theirs)
    by_image = {tuple(x): y for x, y in zip(theirs, load_digits().target.tolist(), strict=True)}
    assert [by_image[tuple(x)] for x in ours] == torch.cat([raw.train[1], raw.test[1]]).tolist()


def test_digits_split_is_the_recorded_one_whatever_the_global_seed():
    first = data.load("digits")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = data.load("digits")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert first.train_y[:10].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8]
    assert first.test_y[:10].tolist() == [2, 4, 8, 4, 9, 6, 8, 7, 7, 2]


# --- names and limits


def test_limits_keep_the_first_images_and_do_not_change_them():
    whole, part = data.load("digits"), data.load("digits", train_limit=30, test_limit=7)
    assert part.train_x.shape[0] == part.train_y.shape[0] == 30
    assert part.test_x.shape[0] == part.test_y.shape[0] == 7
    assert torch.equal(part.train_x, whole.train_x[:30])
    assert torch.equal(part.train_y, whole.train_y[:30])
    assert torch.equal(part.test_x, whole.test_x[:7])
    assert torch.equal(part.test_y, whole.test_y[:7])
    assert data.load("digits", train_limit=1437, test_limit=360).test_x.shape[0] == 360


@pytest.mark.parametrize("key", ["train_limit", "test_limit"])
@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "10", 1438])
def test_a_limit_out_of_range_is_refused(key, limit):
    with pytest.raises(ValueError, match=rf"{key}.*{limit}"):
        data.load("digits", **{key: limit})


@pytest.mark.parametrize(
    ("name", "near"), [("cifar-10", "cifar10"), ("MNIST", "mnist"), ("digit", "digits"), ("xyzzy", None)]
)
def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match="cifar10, digits, mnist") as caught:
        data.load(name)
    assert repr(name) in str(caught.value)
    assert (f"Did you mean {near!r}" in str(caught.value)) if near else ("Did you mean" not in str(caught.value))


def test_a_new_data_set_is_one_entry_and_may_have_no_space_axes(monkeypatch):
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    pair = (x, torch.tensor([0, 1]))
    monkeypatch.setitem(data.DATASETS, "table", lambda root: data.Raw("table", "here", pair, pair, 1.0, 2))
    got = data.load("table")
    assert got.classes == 2
    torch.testing.assert_close(got.train_x, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert torch.equal(x, torch.tensor([[1.0, 10.0], [3.0, 30.0]])), "the loader's tensor was changed in place"


def test_a_constant_channel_is_refused_rather_than_divided_by_zero(monkeypatch):
    pair = (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    monkeypatch.setitem(data.DATASETS, "flat", lambda root: data.Raw("flat", "here", pair, pair))
    with pytest.raises(data.DataError, match="same in all training images"):
        data.load("flat")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("cifar10", "pyarrow"), ("cifar10", "PIL")])
def test_a_missing_package_says_what_to_install(name, module, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar10")
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*pip install 'streamnorm\[cli\]'"):
        data.load(name, tmp_path)


# --- mnist


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


def test_the_argument_comes_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "right" / "mnist")
    monkeypatch.setenv("STREAMNORM_DATA", str(tmp_path / "wrong"))
    assert data.load("mnist", str(tmp_path / "right")).name.startswith("mnist")


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


# --- cifar10


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
    "label 10": ([encode(PIXELS, "PNG")], [10], "from 10 to 10"),
    "label -1": ([encode(PIXELS, "PNG")], [-1], "from -1 to -1"),
    "no label": ([encode(PIXELS, "PNG")] * 2, [1, None], "not an integer"),
    "label 0.5": ([encode(PIXELS, "PNG")], [0.5], "not an integer"),
    "no rows": ([], [], "no rows"),
}


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


# --- the cache of decoded images


def test_the_second_load_decodes_nothing_and_the_data_folder_is_left_alone(tmp_path, own_cache, monkeypatch):
    root = tmp_path / "root"
    write_cifar10(root / "cifar10", "JPEG")
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    first = data.load("cifar10", root)
    assert [path.suffix for path in own_cache.iterdir()] == [".pt"], "a temporary file was left"
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


# --- the hub


def test_the_hub_answer_is_decoded_and_its_revision_recorded(monkeypatch):
    import datasets

    x = random_pixels(TRAIN, 3, 32, 32)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"img": [{"bytes": encode(i, "PNG"), "path": None} for i in x], "label": labels(TRAIN)}
    both = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows, features) for split in ("train", "test")})
    revision = "0123456789abcdef" * 2 + "01234567"
    both["train"].info.download_checksums = {f"hf://datasets/uoft-cs/cifar10@{revision}/plain_text/a.parquet": {}}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: asked.append(repo) or both)
    d = data.load("cifar10")
    assert asked == ["uoft-cs/cifar10"]
    assert d.name.startswith("cifar10 [partial")
    assert f"uoft-cs/cifar10, revision {revision}" in d.source
    assert d.train_y.tolist() == labels(TRAIN)
    assert_float32_close(d.train_x, expected(x, x))


def test_a_given_folder_never_falls_back_to_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda repo: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="files not found"):
        data.load("mnist", tmp_path)


OFFLINE = """
import json, sys
from streamnorm.training import data
heavy = sorted({"datasets", "sklearn", "PIL", "pyarrow", "torchvision"} & set(sys.modules))
messages = {}
for name in ("mnist", "cifar10"):
    try:
        data.load(name)
    except FileNotFoundError as error:
        messages[name] = str(error)
print(json.dumps([heavy, messages]))
"""


def test_import_is_lean_and_offline_without_files_says_how_to_give_them(tmp_path):
    changes = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=os.environ | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, messages = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    for name, repo, file in (
        ("mnist", "ylecun/mnist", "t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "uoft-cs/cifar10", "train-*.parquet"),
    ):
        for word in (repo, file, "STREAMNORM_DATA=FOLDER", "--data-root FOLDER"):
            assert word in messages[name], f"{word} not in {messages[name]}"


# --- the real files


def channel_moments(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Means and deviations (of 1) a channel, from counts of the 256 values: exact, and quick on 150 million of them."""
    value = torch.arange(256, dtype=torch.float64) / 255
    weights = [channel.flatten().bincount(minlength=256) / channel.numel() for channel in x.unbind(1)]
    means = [(w * value).sum() for w in weights]
    stds = [(w * (value - m) ** 2).sum().sqrt().item() for w, m in zip(weights, means, strict=True)]
    return [m.item() for m in means], stds


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
