"""The data sets of the experiments, as tensors: ``load("cifar10")``.

What lives here: finding, checking and decoding the files of a data set, and standardizing its images. Importing this
file needs torch and the standard library alone; the optional packages (scikit-learn, datasets, pyarrow, pillow) are
imported by the loader which needs them. Nothing is ever written into a data folder.

Files are looked for in ``data_root``, else in the folder named by the environment variable ``STREAMNORM_DATA``. With
neither, ``mnist`` and ``cifar10`` are asked of the Hugging Face hub. ``digits`` comes with scikit-learn.

Legend: ``n`` images, ``c`` channels, ``h`` height, ``w`` width.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.folder import read_folder
from streamnorm.lab.runs.hub import at_once_or_never

ENVIRONMENT = "STREAMNORM_DATA"
CLASSES = 10
LARGEST_IDX = 1 << 28
"""Bytes that a packed idx file may unpack to: five times those of the largest one of MNIST."""
DIGITS_TRAIN = 1437
DIGITS_SEED = 0
PUBLISHED = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}
MNIST_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mnist": tuple((f"{part}-ubyte", f"{part}-ubyte.gz") for part in MNIST_PARTS),
    "cifar10": (("train-*.parquet",), ("test-*.parquet",)),
}
"""Name -> the files it needs, each as a glob pattern or several, of which the first that matches counts."""
IDX_IMAGES, IDX_LABELS = 2051, 2049
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"


class DataError(ValueError):
    """A file (or hub answer) is there but is not what it should be; the message gives its path and the reason."""

    def __init__(self, where: str | Path, reason: str) -> None:
        super().__init__(f"{where}: {' '.join(reason.split())}. The file is damaged or of another kind; fetch it anew")


@dataclass(frozen=True, eq=False)
class Data:
    """A data set ready for training: images float32 ``(n, c)`` or ``(n, c, h, w)``, labels int64 ``(n,)``.

    Each channel has mean 0 and deviation 1 over the whole training split. ``name`` says what the data really are and
    ``source`` where they came from and which bits they were; both belong in every recorded result.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    source: str


@dataclass(frozen=True, eq=False)
class Raw:
    """What a loader gives: pairs of images ``(n, c, ...)`` with values from 0 to ``peak`` and int64 labels ``(n,)``."""

    name: str
    source: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    peak: float = 255.0
    classes: int = CLASSES


def load(
    name: str, data_root: str | Path | None = None, *, train_limit: int | None = None, test_limit: int | None = None
) -> Data:
    """The data set ``name``, scaled to 0..1, then standardized channel by channel.

    ``name`` is a key of ``DATASETS``, or a folder of one's own images, arranged as ``folder`` says.

    Mean and deviation (in units of the 0..1 scale) are those of the whole training split, so that ``train_limit`` and
    ``test_limit``, which keep the first so many images, do not change how an image is seen.

    Raises ``ValueError`` for an unknown name or a limit out of range, ``FileNotFoundError`` for files that are not
    there, ``DataError`` for damaged ones and ``ImportError`` for a package that is not installed.

    >>> load("digits").train_x.shape
    torch.Size([1437, 1, 8, 8])
    """
    own = name not in DATASETS and Path(name).expanduser().is_dir()
    if name not in DATASETS and not own:
        near = difflib.get_close_matches(str(name).lower(), DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown data set {name!r}; known are {', '.join(sorted(DATASETS))} and folders of images.{hint}"
        )
    for key, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"{key} must be a positive int or None for all images, got {limit!r}")
    root = data_root if data_root is not None else os.environ.get(ENVIRONMENT) or None
    if own:
        raw = _load_own(Path(name).expanduser())
    else:
        raw = DATASETS[name](None if root is None else Path(root).expanduser())
    mean, std = _statistics(raw)
    train_x, train_y = _first(raw.train, train_limit, f"train_limit of {raw.name}")
    test_x, test_y = _first(raw.test, test_limit, f"test_limit of {raw.name}")
    train_x, test_x = (_standardize(x, raw.peak, mean, std) for x in (train_x, test_x))
    return Data(raw.name, train_x, train_y, test_x, test_y, raw.classes, raw.source)


def load_digits(root: Path | None) -> Raw:
    """The 1,797 scanned digits ``(1, 8, 8)``, values 0..16, that come with scikit-learn; ``root`` is not used.

    They are shuffled by a generator of fixed seed (the file has its writers in blocks); the first 1,437 train and the
    other 360 test, always the same ones.
    """
    bunch = _optional("sklearn.datasets").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(DIGITS_SEED))
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)[order]
    y = torch.from_numpy(bunch.target).to(torch.int64)[order]
    source = f"scikit-learn {_optional('sklearn').__version__} load_digits, split seed {DIGITS_SEED}, {_identity(x)}"
    k = DIGITS_TRAIN
    return Raw("digits", source, (x[:k], y[:k]), (x[k:], y[k:]), peak=16.0)


def load_mnist(root: Path | None) -> Raw:
    """MNIST ``(1, 28, 28)`` from its four idx files, gzipped or not, in ``root/mnist`` or ``root``; else the hub.

    The identity in ``source`` is of the uncompressed bytes: the same bits are met under several compressions.
    """
    if root is None:
        return _load_hub("mnist", "ylecun/mnist", "image", (1, 28, 28))
    paths = [found[0] for found in _find("mnist", root)]
    contents = [read_gzip(path, LARGEST_IDX) for path in paths]
    pairs = []
    for i in (0, 2):
        x = _parse_idx(contents[i], IDX_IMAGES, paths[i])
        if x.shape[1:] != (28, 28):
            raise DataError(paths[i], f"images are {x.shape[1]}x{x.shape[2]} instead of 28x28")
        y = _parse_idx(contents[i + 1], IDX_LABELS, paths[i + 1]).to(torch.int64)
        pairs.append((x.unsqueeze(1), _checked_labels(y, len(x), paths[i + 1])))
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    return Raw(_title("mnist", "mnist", *pairs), _file_source(paths, digests, "uncompressed sha256"), *pairs)


def load_cifar10(root: Path | None) -> Raw:
    """CIFAR-10 ``(3, 32, 32)`` from train and test parquet files in ``root/cifar10`` or ``root``; else the hub.

    Files of JPEGs are not the original pixels, and the name says so.
    """
    if root is None:
        return _load_hub("cifar10", "uoft-cs/cifar10", "img", (3, 32, 32))
    splits = _find("cifar10", root)
    paths = [path for split in splits for path in split]
    contents = {path: path.read_bytes() for path in paths}
    digests = [hashlib.sha256(contents[path]).hexdigest() for path in paths]

    def decode() -> dict[str, Any]:
        (train, jpeg), (test, jpeg_too) = (_decode_parquets({p: contents[p] for p in split}) for split in splits)
        return {"train": train, "test": test, "jpeg": jpeg or jpeg_too}

    key = hashlib.sha256("\n".join(["cifar10 v1", str(len(splits[0])), *digests]).encode()).hexdigest()
    kept = _cached(f"cifar10-{key[:32]}.safetensors", decode)
    base = "cifar10 (JPEG mirror)" if kept["jpeg"] else "cifar10"
    name = _title("cifar10", base, kept["train"], kept["test"])
    return Raw(name, _file_source(paths, digests, "sha256"), kept["train"], kept["test"])


def _load_own(folder: Path) -> Raw:
    """One's own images, called after their folder."""
    source, train, test, classes = read_folder(folder)
    return Raw(folder.resolve().name, source, train, test, classes=classes)


DATASETS: dict[str, Callable[[Path | None], Raw]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
}
"""Name -> loader. A loader takes the data folder (None: none was given) and returns a ``Raw``."""


def _statistics(raw: Raw) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(c,)`` of the training images on the 0..1 scale, in float64, one channel at a time."""
    channels = (channel.to(torch.float64).div_(raw.peak) for channel in raw.train[0].unbind(1))
    std, mean = torch.stack([torch.stack(torch.std_mean(channel, correction=0)) for channel in channels], dim=1)
    if not (std > 0).all():
        raise DataError(raw.source, f"a channel is the same in all training images (deviations {std.tolist()})")
    return mean, std


def _standardize(x: Tensor, peak: float, mean: Tensor, std: Tensor) -> Tensor:
    """``(x / peak - mean) / std`` as a new float32 tensor, shaped like ``x (n, c, ...)``."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    out = x.to(torch.float32, copy=True).div_(peak)
    return out.sub_(mean.to(torch.float32).view(shape)).div_(std.to(torch.float32).view(shape))


def _first(pair: tuple[Tensor, Tensor], limit: int | None, what: str) -> tuple[Tensor, Tensor]:
    """The first ``limit`` images and labels; ``ValueError`` where there are not so many."""
    if limit is None:
        return pair
    if limit > len(pair[0]):
        raise ValueError(f"{what} is {limit}, but there are only {len(pair[0])} images; lower it or leave it out")
    return pair[0][:limit], pair[1][:limit]


def _optional(module: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set needs {module.partition('.')[0]}, which does not import ({error}); "
            "install it by: pip install 'streamnorm[cli]'"
        ) from error


def _title(key: str, base: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> str:
    """``base``, with the counts behind it where they are not the published ones: no result may hide a partial set."""
    counts = len(train[0]), len(test[0])
    return base if counts == PUBLISHED[key] else f"{base} [partial: {counts[0]} train, {counts[1]} test]"


def _identity(x: Tensor) -> str:
    return f"pixels sha256 {hashlib.sha256(x.contiguous().numpy().data).hexdigest()[:16]}"


def _file_source(paths: Sequence[Path], digests: Sequence[str], what: str) -> str:
    parts = (f"{path.name} {digest[:16]}" for path, digest in zip(paths, digests, strict=True))
    return f"folder {paths[0].parent.resolve().name} ({what}: {', '.join(parts)})"


def _how_to_give(name: str) -> str:
    return (
        f"Put {', '.join(patterns[-1] for patterns in FILES[name])} into FOLDER/{name} or FOLDER"
        f" and set {ENVIRONMENT}=FOLDER or pass --data-root FOLDER (data_root=FOLDER in Python)"
    )


def _find(name: str, root: Path) -> list[list[Path]]:
    """For each entry of ``FILES[name]`` the files that match, in the order of their names, all of one folder."""
    missing = []
    for folder in (root / name, root):
        found = [next(filter(None, (sorted(folder.glob(p)) for p in patterns)), []) for patterns in FILES[name]]
        lacks = [" or ".join(patterns) for patterns, paths in zip(FILES[name], found, strict=True) if not paths]
        lacks += [gap for paths in found for gap in _shard_gaps(paths)]
        if not lacks:
            return found
        missing.append(f"{folder} {'lacks ' + ', '.join(lacks) if folder.is_dir() else 'is not a folder'}")
    raise FileNotFoundError(f"{name}: files not found: {'; '.join(missing)}. {_how_to_give(name)}")


def _shard_gaps(paths: Sequence[Path]) -> list[str]:
    """What is missing of files numbered ``-I-of-N``: a lost shard would otherwise train on less without a word."""
    names = {path.name for path in paths}
    numbered = [match for name in names if (match := re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)", name))]
    whole = {f"{m[1]}-{i:0{len(m[2])}}-of-{m[2]}{m[3]}" for m in numbered for i in range(int(m[2]))}
    return sorted(whole - names)


def read_gzip(path: Path, most: int = 1 << 30) -> bytes:
    """The bytes of a file, unpacked if they are gzipped (by content: browsers unpack and keep the ``.gz`` name).

    Raises:
        DataError: for a file that does not unpack, or to more than ``most`` bytes.
    """
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(most + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(path, f"gzip data does not unpack ({error})") from error
    if len(unpacked) > most:
        raise DataError(path, f"unpacks to more than {most:,} bytes")
    return unpacked


def _parse_idx(content: bytes, magic: int, path: Path) -> Tensor:
    """A uint8 tensor from idx bytes: big-endian magic (its last byte is the rank), sizes, then values."""
    rank = magic & 0xFF
    start = 4 * (1 + rank)
    if len(content) < start:
        raise DataError(path, f"has {len(content)} bytes, fewer than the {start} of an idx header")
    got, *sizes = struct.unpack(f">{1 + rank}I", content[:start])
    if got != magic:
        raise DataError(path, f"begins with magic number {got} instead of {magic}")
    expected = start + torch.Size(sizes).numel()
    if len(content) != expected or expected == start:
        raise DataError(path, f"has {len(content)} bytes, but its header says {sizes}, that is {expected} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def _checked_labels(y: Tensor, images: int, where: str | Path) -> Tensor:
    if len(y) != images:
        raise DataError(where, f"has {len(y)} labels for {images} images")
    if y.min() < 0 or y.max() >= CLASSES:
        raise DataError(where, f"labels run from {y.min()} to {y.max()}, not within 0 to {CLASSES - 1}")
    return y


def _decode_parquets(contents: dict[Path, bytes]) -> tuple[tuple[Tensor, Tensor], bool]:
    """Images, labels, and whether any image is a JPEG, of the files of one split."""
    # Not datasets.load_dataset("parquet"): it would write an Arrow copy of every file into its own cache, which we
    # would have to aim elsewhere and remove, only to be read once. pyarrow reads the same columns from memory.
    pyarrow, parquet = _optional("pyarrow"), _optional("pyarrow.parquet")
    pairs, jpegs = [], []
    for path, content in contents.items():
        try:
            table = parquet.read_table(pyarrow.BufferReader(content))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(path, f"is not a readable parquet file ({error})") from error
        if not {"img", "label"} <= set(table.column_names):
            raise DataError(path, f"has columns {table.column_names}, needs img and label")
        pair, jpeg = _decode(table.column("img").to_pylist(), table.column("label").to_pylist(), (3, 32, 32), path)
        pairs.append(pair)
        jpegs.append(jpeg)
    images, labels = zip(*pairs, strict=True)
    return (torch.cat(images), torch.cat(labels)), any(jpegs)


def _decode(
    rows: list[Any], labels: list[Any], shape: tuple[int, int, int], where: str | Path
) -> tuple[tuple[Tensor, Tensor], bool]:
    """Images uint8 ``(n, *shape)`` and labels from rows, and whether any is a JPEG.

    A row is ``{"bytes": ...}``, as the hub has it, or the bytes alone.
    """
    image = _optional("PIL.Image")
    c, h, w = shape
    if not rows:
        raise DataError(where, "has no rows")
    pixels, jpeg = bytearray(), False
    for i, row in enumerate(rows):
        content = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(content, bytes) or not content.startswith((JPEG, PNG)):
            raise DataError(where, f"image {i} is neither a JPEG nor a PNG: {content!r:.40}")
        jpeg = jpeg or content.startswith(JPEG)
        try:
            packed = image.open(io.BytesIO(content))
            size = packed.size  # its header says it: no other image is decoded
            decoded = packed.convert("RGB" if c == 3 else "L") if size == (w, h) else None
        except Exception as error:  # pillow's decoders share no base class: OSError, SyntaxError, struct.error, ...
            raise DataError(where, f"image {i} does not decode ({error})") from error
        if decoded is None:
            raise DataError(where, f"image {i} is {size[0]}x{size[1]} instead of {w}x{h}")
        pixels += decoded.tobytes()
    if not all(isinstance(label, int) for label in labels):
        raise DataError(where, "a label is not an integer")
    if not 0 <= min(labels) <= max(labels) < CLASSES:  # before int64, which may not hold them
        raise DataError(where, f"labels run from {min(labels)} to {max(labels)}, not within 0 to {CLASSES - 1}")
    x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, h, w, c).permute(0, 3, 1, 2).contiguous()
    return (x, _checked_labels(torch.tensor(labels, dtype=torch.int64), len(x), where)), jpeg


def _load_hub(name: str, repo: str, column: str, shape: tuple[int, int, int]) -> Raw:
    """A data set from the Hugging Face hub, or from that library's own cache of an earlier visit."""
    datasets = _optional("datasets")
    try:
        with at_once_or_never():
            loaded = datasets.load_dataset(repo)
        raw_image = datasets.Image(decode=False)
        tables = [loaded[split].cast_column(column, raw_image)[:] for split in ("train", "test")]
        urls = loaded["train"].info.download_checksums or {}
    except Exception as error:  # whatever the network stack below raises, the way out for the user is one
        raise FileNotFoundError(
            f"{name}: no data folder was given, and the Hugging Face hub did not deliver {repo!r} "
            f"({type(error).__name__}: {error}). {_how_to_give(name)}"
        ) from error
    pairs, jpegs = zip(*(_decode(table[column], table["label"], shape, repo) for table in tables), strict=True)
    revision = next((match[1] for url in urls if (match := re.search(r"@([0-9a-f]{40})/", url))), "unknown")
    base = f"{name} (JPEG mirror)" if any(jpegs) else name
    source = f"Hugging Face hub {repo}, revision {revision}, train {_identity(pairs[0][0])}"
    return Raw(_title(name, base, *pairs), source, *pairs)


DECODED = {"train": [Tensor, Tensor], "test": [Tensor, Tensor], "jpeg": bool}
"""The shape of what the cache holds: images and labels, and whether any image was a JPEG."""


def _cached(name: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``build`` returns, kept as ``name`` in the user's cache folder; a cache that cannot be written only warns.

    It is a file like a checkpoint, which nothing is unpickled from, and one that is damaged is made again.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamnorm" / name
    with suppress(OSError, checkpoint.CheckpointError):
        kept = checkpoint.load(path)
        checkpoint.expect(kept, DECODED)
        return {**kept, "train": tuple(kept["train"]), "test": tuple(kept["test"])}
    built = build()
    try:
        checkpoint.save(path, built)
    except OSError as error:
        warnings.warn(f"decoded images are not kept for next time: {error}", stacklevel=2)
    return built
