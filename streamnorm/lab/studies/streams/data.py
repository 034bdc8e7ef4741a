"""Streams of rows with a class each, in the order in which they come: files, those of river, and generators that drift.

Imports the loaders of the training room. Elec2 is read from ``stream/elec2.csv.gz`` in the data folder; the others need
the package ``river``, which is imported when one of them is asked for. ``made_up`` needs neither.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamnorm.lab.runs.classifier.data import ENVIRONMENT, DataError

ELEC2 = "stream/elec2.csv.gz"
RIVER = "0.26.1"
CLIP = 10.0
GENERATED, DRIFT = 4000, 2000
"""Rows of a generator, and how many of them come before it changes."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows ``x (n, d)`` float32 and their classes ``y (n,)`` int64, in the order of arrival.

    Attributes:
        classes: how many there are.
        drift: rows before what is to be learned changes; None where nobody knows.
        source: where the rows are from.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int
    source: str
    drift: int | None = None

    def __len__(self) -> int:
        return len(self.x)


def load(name: str, data_root: Path | None = None, seed: int = 0) -> Stream:
    """The stream of that name. ``seed`` is of generators; the rows of a real stream are the same with every seed.

    Raises:
        ValueError: for a name that no stream has.
        FileNotFoundError: if Elec2 is not where it is looked for.
        ModuleNotFoundError: without river, for a stream that needs it.
    """
    if name == "Elec2":
        return _elec2(data_root)
    if name in GENERATORS:
        rows = itertools.islice(GENERATORS[name](seed), GENERATED)
        return _stream(name, rows, f"river {RIVER}, generator, seed {seed}", DRIFT)
    if name in SHIPPED:
        return _stream(name, getattr(river("datasets"), name)(), f"river {RIVER}, datasets.{name}")
    raise ValueError(f"unknown stream {name!r}; the streams are {', '.join(STREAMS)}")


def standardized(x: Tensor) -> Tensor:
    """Features as they come, less the mean of the rows so far, over their standard deviation, within -10 and 10.

    The rows so far are all up to a row and itself: its features are known before it is predicted.

    >>> standardized(torch.tensor([[1.0], [3.0], [2.0]])).flatten()
    tensor([0., 1., 0.])
    """
    values = x.double() - x[:1].double()  # about the first row: squares of large levels would cancel
    seen = torch.arange(1, len(x) + 1, dtype=torch.float64)[:, None]
    mean = values.cumsum(0) / seen
    variance = (values.square().cumsum(0) / seen - mean.square()).clamp_min(0)
    sd = torch.where(variance > 1e-12 * (1 + mean.square()), variance.sqrt(), torch.inf)
    return ((values - mean) / sd).clamp(-CLIP, CLIP).to(x.dtype)


def made_up(name: str, seed: int, rows: int) -> Stream:
    """Two classes on either side of a plane, which changes in the middle; of no file and no package."""
    generator = torch.Generator().manual_seed(100 * seed + STREAMS.index(name))
    x = torch.randn(rows, 3, generator=generator)
    plane = torch.randn(2, 3, generator=generator)
    change = rows // 2
    level = torch.cat([x[:change] @ plane[0], x[change:] @ plane[1]])
    return Stream(name, x, (level > 0).long(), 2, "made up", change if name in GENERATORS else None)


def river(module: str) -> Any:
    """A module of river.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    try:
        return importlib.import_module(f"river.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this stream comes with the package river, which is not installed ({error}); pip install river=={RIVER}"
        ) from error


def _elec2(data_root: Path | None) -> Stream:
    root = data_root or os.environ.get(ENVIRONMENT)
    path = Path(root or ".") / ELEC2
    if root is None or not path.is_file():
        raise FileNotFoundError(
            f"Elec2 is {ELEC2} in the data folder, and {path if root else 'no data folder was given'}: give it with "
            f"--data-root FOLDER or {ENVIRONMENT}=FOLDER"
        )
    content = path.read_bytes()
    try:
        lines = gzip.decompress(content).decode().splitlines()
        rows = [(dict(enumerate(map(float, line[:-1]))), int(line[-1])) for line in csv.reader(lines[1:])]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(path, f"is no table of numbers ({error})") from error
    return _stream("Elec2", rows, f"{path.name} (sha256 {hashlib.sha256(content).hexdigest()[:16]})")


def _stream(name: str, rows: Iterable[tuple[dict[Any, Any], Any]], source: str, drift: int | None = None) -> Stream:
    """A stream from rows as river has them: a dict of features and a class of any kind."""
    features, classes = zip(*rows, strict=True)
    keys = list(features[0])
    numbers = {value: i for i, value in enumerate(sorted(set(classes)))}
    x = torch.tensor([[float(row[key]) for key in keys] for row in features], dtype=torch.float32)
    return Stream(name, x, torch.tensor([numbers[value] for value in classes]), len(numbers), source, drift)


Rows = Iterator[tuple[dict[Any, Any], Any]]


def _sea(seed: int) -> Rows:
    """The threshold goes from 7 to 9.5 at once; a tenth of the labels are wrong."""
    sea = river("datasets.synth").SEA
    before, after = (sea(variant=variant, noise=0.1, seed=2 * seed + i) for i, variant in enumerate((2, 3)))
    yield from itertools.islice(before, DRIFT)
    yield from after


def _rbf(seed: int) -> Rows:
    """Fifty centers of four classes that begin to move."""
    generator = river("datasets.synth").RandomRBFDrift(seed, seed, n_classes=4, n_features=10, change_speed=0.0)
    return _begins_to_drift(generator, "change_speed", 0.001)


def _hyperplane(seed: int) -> Rows:
    """A plane in ten dimensions that begins to turn; a twentieth of the labels are wrong."""
    generator = river("datasets.synth").Hyperplane(seed, n_features=10, n_drift_features=10, mag_change=0.0)
    return _begins_to_drift(generator, "mag_change", 0.001)


def _begins_to_drift(generator: Any, speed: str, value: float) -> Rows:
    rows = iter(generator)
    yield from itertools.islice(rows, DRIFT)
    setattr(generator, speed, value)
    yield from rows


GENERATORS: dict[str, Callable[[int], Rows]] = {"SEA": _sea, "RandomRBFDrift": _rbf, "Hyperplane": _hyperplane}
SHIPPED = ("Bananas", "Phishing", "ImageSegments", "Shuttle")
REAL = ("Elec2", *SHIPPED)
STREAMS = (*REAL, *GENERATORS)
