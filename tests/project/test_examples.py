"""The examples run, and what they train gets better."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drop_in() -> None:
    assert example("drop_in").main(epochs=1) > 0.6


def test_online() -> None:
    assert example("online").main(samples=1200) < 0.4


def test_own_rules() -> None:
    first, last = example("own_rules").main()
    assert last < first / 3


def test_own_reference() -> None:
    assert example("own_reference").main() > 0.6


def test_recurrent() -> None:
    chance, loss = example("recurrent").main()
    assert loss < chance - 0.5


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
