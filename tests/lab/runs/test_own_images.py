"""One's own images: a folder with a folder for each class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streamnorm.lab.cli import main
from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.runs.classifier.folder import read_folder

SIZE = 9, 7
"""Width and height of the pictures here."""


def picture(path: Path, seed: int, mode: str = "L", size: tuple[int, int] = SIZE) -> np.ndarray:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folder_of(root: Path, counts: dict[str, int], mode: str = "L") -> Path:
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f"{i:02}.png", 1000 * k + i, mode)
    return root


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pixels_and_labels_are_those_of_the_files(mode: str, channels: int, tmp_path: Path) -> None:
    for part in ("train", "test"):
        folder_of(tmp_path / part, {"cat": 2, "ape": 3}, mode)
    _, train, test, classes = read_folder(tmp_path)
    assert classes == 2
    assert train[0].shape == (5, channels, 7, 9)
    want = torch.from_numpy(picture(tmp_path / "other.png", 1002, mode)).reshape(7, 9, channels).permute(2, 0, 1)
    found = [int(y) for x, y in zip(*train, strict=True) if torch.equal(x, want)]
    assert found == [0], "the third ape, and ape comes before cat"
    assert sorted(train[1].tolist()) == sorted(test[1].tolist()) == [0, 0, 0, 1, 1]


def test_gray_and_colored_pictures_are_colored_together(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 5, "b": 5})
    picture(tmp_path / "a" / "01.png", 7, "RGB")
    assert load(str(tmp_path)).train_x.shape[1] == 3


def test_a_fifth_of_each_class_tests_and_it_is_the_same_each_time(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 10, "b": 23})
    one, two = load(str(tmp_path)), load(str(tmp_path))
    assert torch.bincount(one.test_y).tolist() == [2, 4]
    assert torch.bincount(one.train_y).tolist() == [8, 19]
    assert len({*one.train_y[:10].tolist()}) == 2, "classes take turns"
    assert torch.equal(one.train_x, two.train_x)
    assert one.name == tmp_path.name
    assert one.source == two.source
    picture(tmp_path / "b" / "05.png", 1)
    assert load(str(tmp_path)).source != one.source


def only(path: Path) -> Callable[[Path], object]:
    return lambda root: (root / path).write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only(Path("a", "notes.txt")), "notes.txt is no picture"),
        (only(Path("a", "00.png")), "00.png is no picture that can be read"),
        (lambda root: picture(root / "a" / "00.png", 0, size=(8, 8)), "resize all pictures to one size"),
        (lambda root: [path.unlink() for path in (root / "a").iterdir()], "own/a is empty; a class needs pictures"),
        (lambda root: (root / "a" / "00.png").unlink(), "has 4 pictures; a fifth of them tests, so it needs 5"),
        (lambda root: (root / "a").rename(root / ".a"), "has 1 folders of classes, and needs at least two"),
        (
            lambda root: folder_of(root / "train", {"a": 1, "b": 1}) and folder_of(root / "test", {"a": 1, "c": 1}),
            "only one has b, c",
        ),
    ],
)
def test_what_cannot_be_used_is_named(
    spoil: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "own", {"a": 5, "b": 5})
    spoil(tmp_path / "own")
    assert main(["train", "--data", str(tmp_path / "own"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / ".DS_Store").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    assert len(load(str(tmp_path)).train_x) == 8


def test_a_network_is_trained_on_them_and_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(folder_of(tmp_path / "own", {"a": 20, "b": 20}))
    out = str(tmp_path / "run")
    flags = ["--architecture", "B", "--width", "4", "--batches-per-update", "8", "--epochs", "1"]
    assert main(["train", "--data", own, "--out", out, *flags]) == 0
    assert main(["evaluate", out]) == 0
    assert "own" in capsys.readouterr().out
