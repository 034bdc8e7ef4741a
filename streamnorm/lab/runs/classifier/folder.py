"""One's own images: a folder with a folder for each class. Needs pillow, which comes with the extra ``cli``.

::

    FOLDER/train/CLASS/*.png    what is trained on            FOLDER/CLASS/*.png   a fifth of each class tests,
    FOLDER/test/CLASS/*.png     what is tested on                                  always the same files

Classes are numbered in the order of their names. Pictures are PNG, JPEG, BMP, GIF or WebP, all of one size; they are
gray if all are, otherwise red, green, blue. Hidden files are left out.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
GRAY = frozenset({"1", "L"})
ONE_IN = 5
"""Of the images of a class, how many there are for each that tests."""
Split = list[tuple[Path, int]]
"""Files and the numbers of their classes."""


def read_folder(folder: Path) -> tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Where the images came from, those to train on and those to test on with their labels, and the number of classes.

    Images are uint8 ``(n, c, h, w)`` with c = 1 or 3, labels int64 ``(n,)``.

    Raises:
        ValueError: if the folder is arranged in another way, or a picture cannot be used, with its name.
        ImportError: without pillow.
    """
    train, test, classes = _splits(folder)
    pictures = [_opened(path) for path, _ in (*train, *test)]
    gray = all(picture.mode in GRAY for picture in pictures)
    first = pictures[0].size
    digest, pixels = hashlib.sha256(), []
    for (path, _), picture in zip((*train, *test), pictures, strict=True):
        if picture.size != first:
            raise ValueError(
                f"{path} has {picture.size[0]} x {picture.size[1]} pixels, and {train[0][0]} {first[0]} x {first[1]}; "
                "resize all pictures to one size"
            )
        data = picture.convert("L" if gray else "RGB").tobytes()
        digest.update(data)
        pixels.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    channels = 1 if gray else 3
    x = torch.stack(pixels).reshape(-1, first[1], first[0], channels).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor([label for _, label in (*train, *test)])
    k = len(train)
    source = f"folder {folder.resolve().name} ({len(classes)} classes, pixels sha256 {digest.hexdigest()[:16]})"
    return source, (x[:k], y[:k]), (x[k:], y[k:]), len(classes)


def _splits(folder: Path) -> tuple[Split, Split, list[str]]:
    parts = [folder / name for name in ("train", "test")]
    if all(part.is_dir() for part in parts):
        classes = _classes(parts[0])
        if (others := _classes(parts[1])) != classes:
            odd = sorted({*classes} ^ {*others})
            raise ValueError(f"{folder}/train and {folder}/test have different classes; only one has {', '.join(odd)}")
        train, test = ([(path, i) for i, c in enumerate(classes) for path in _files(part / c)] for part in parts)
        return _mixed(train), test, classes
    classes, train, test = _classes(folder), [], []
    for i, name in enumerate(classes):
        files = _files(folder / name)
        if len(files) < ONE_IN:
            raise ValueError(f"{folder / name} has {len(files)} pictures; a fifth of them tests, so it needs {ONE_IN}")
        random.Random(0).shuffle(files)
        held = len(files) // ONE_IN
        test += [(path, i) for path in files[:held]]
        train += [(path, i) for path in files[held:]]
    return _mixed(train), test, classes


def _mixed(split: Split) -> Split:
    """In an order that is always the same, and has the classes in turns: a limit takes the first."""
    random.Random(0).shuffle(split)
    return split


def _classes(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise ValueError(
            f"{folder} has {len(found)} folders of classes, and needs at least two: FOLDER/CLASS/picture.png, or "
            "FOLDER/train/CLASS/picture.png and FOLDER/test/CLASS/picture.png"
        )
    return found


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if odd := [path for path in found if path.suffix.lower() not in SUFFIXES]:
        raise ValueError(f"{odd[0]} is no picture ({', '.join(sorted(SUFFIXES))}); move it away")
    if not found:
        raise ValueError(f"{folder} is empty; a class needs pictures")
    return found


def _opened(path: Path) -> Any:
    image: Any = _pillow()
    try:
        with image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read ({error}); move it away") from error


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError(f"pictures need pillow ({error}); pip install 'streamnorm[cli]'") from error
