"""The programs of the gallery: short, run in seconds, draw their picture, and show what its page says."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "examples/gallery").glob("*.py"))
PAGE = (ROOT / "docs/gallery/README.md").read_text()


def run(name: str, folder: Path, **smaller: Any) -> Any:
    """What the program returns; it draws into the folder."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/gallery/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(folder / "picture.png", **smaller)
    assert (folder / "picture.png").read_bytes()[:4] == b"\x89PNG"
    return found


def test_there_are_ten_each_short_with_its_picture_on_the_page() -> None:
    assert len(PROGRAMS) == 10
    for program in PROGRAMS:
        assert len(program.read_text().splitlines()) < 60, program.name
        assert f"(../../examples/gallery/{program.name})" in PAGE
        assert f"({program.stem}.png)" in PAGE
        assert (ROOT / f"docs/gallery/{program.stem}.png").is_file()


def test_drift(tmp_path: Path) -> None:
    accuracy = run("drift", tmp_path, seeds=1, count=1000)
    assert accuracy["StreamingNorm"] > accuracy["nn.LayerNorm"] + 0.05


def test_tiles(tmp_path: Path) -> None:
    seams = run("tiles", tmp_path, steps=10)
    assert seams["StreamingNorm"] < 1e-5  # sums of at most 217 products in float32
    assert min(seams["group"], seams["instance"]) > 0.01


def test_accumulation(tmp_path: Path) -> None:
    errors = run("accumulation", tmp_path, seeds=2, epochs=1)
    assert errors["StreamingNorm"][0] < errors["nn.BatchNorm1d"][0] - 3


def test_text(tmp_path: Path) -> None:
    losses = run("text", tmp_path, updates=30)
    assert max(losses.values()) < 3.3  # that of the frequencies of characters alone


def test_agent(tmp_path: Path) -> None:
    assert run("agent", tmp_path, seeds=1, decisions=1200)["StreamingNorm"] > 0.2  # by chance 0.1


def test_averaging(tmp_path: Path) -> None:
    for _, (_, before), (_, after) in run("averaging", tmp_path, seeds=2, epochs=1).values():
        assert after < 1e-5 < before  # in float32, beside sums over 1,437 x 64 values


def test_neighbors(tmp_path: Path) -> None:
    shares = run("neighbors", tmp_path, epochs=1)
    assert shares["StreamingNorm"] > shares["chance"] + 0.05


def test_pretrained(tmp_path: Path) -> None:
    last = run("pretrained", tmp_path, seeds=2, parts=2)
    assert last["convert"] < last["convert, freeze"]  # whose statistics are those of other images


def test_processes(tmp_path: Path) -> None:
    code = "import processes; from pathlib import Path; print(processes.main(Path('picture.png'), updates=8))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "examples/gallery")))  # its processes import it, so not by ``run``
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    apart = ast.literal_eval(done.stdout.splitlines()[-1])
    assert apart["merged at each update"] == 0.0 < apart["each for itself"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter about torch
def test_onnx_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    furthest, folded = run("onnx_export", tmp_path)
    assert furthest < 1e-4
    assert len(folded) == 3, "two matrices and a ReLU"
