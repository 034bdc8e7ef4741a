"""Small files of images in the published formats, and what becomes of them: what the tests of data sets stand on."""

from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("STREAMNORM_DATA") or REPOSITORY.parent / "shared" / "data")
TRAIN, TEST = 20, 10


def needs_real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"no real files in {REAL / name}")


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


def channel_moments(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Means and deviations (of 1) a channel, from counts of the 256 values: exact, and quick on 150 million of them."""
    value = torch.arange(256, dtype=torch.float64) / 255
    weights = [channel.flatten().bincount(minlength=256) / channel.numel() for channel in x.unbind(1)]
    means = [(w * value).sum() for w in weights]
    stds = [(w * (value - m) ** 2).sum().sqrt().item() for w, m in zip(weights, means, strict=True)]
    return [m.item() for m in means], stds
