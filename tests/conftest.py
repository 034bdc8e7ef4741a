"""What every test stands on: seeds, shape checks at run time, what several files ask for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
pytest.register_assert_rewrite("images", "nets", "passes", "toy", "twins")  # what they assert is shown as a test's own

torch.set_num_threads(1)  # the tensors of a test are small, and workers share the cores


@pytest.fixture(autouse=True, scope="session")
def _shapes() -> Iterator[None]:
    """Shapes are checked where rooms meet, in every test."""
    import shapes

    with pytest.MonkeyPatch.context() as patch:
        shapes.install(patch)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["base", "v3", "v4"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine has."""
    from streamnorm.ops import cpu, library

    loaded = library.library()
    if loaded is None or library.ISAS[request.param] > loaded.streamnorm_isa():
        pytest.skip(f"there are no kernels for {request.param}, or this machine has less")

    def take() -> None:
        for forget in (library.isa, cpu.kernel, library.operators):
            forget.cache_clear()
        library.operators()

    monkeypatch.setenv("STREAMNORM_ISA", request.param)
    take()
    yield request.param
    monkeypatch.undo()
    take()


@pytest.fixture
def compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a compiled online step is expected and an ordinary one is taken."""
    from streamnorm import OnlineTrainer
    from streamnorm.ops import library
    from streamnorm.stream import Pooled

    if library.library() is None:
        pytest.skip("there are no compiled kernels")

    ordinary = OnlineTrainer._ordinary

    def never(self: OnlineTrainer, *sample: Any) -> Any:
        memories = [norm.H1 for norm in self._norms]
        pooled = [memory for memory in memories if memory is not None and isinstance(memory.rule, Pooled)]
        assert any(not memory.count and not memory.held for memory in pooled), (
            "an ordinary step"
        )  # it pools all features
        return ordinary(self, *sample)

    monkeypatch.setattr(OnlineTrainer, "_ordinary", never)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is, for a test that is to see neither the user's cache nor the user's data folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("STREAMNORM_DATA", raising=False)
    return tmp_path / "xdg" / "streamnorm"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of time steps was a compiled one."""
    from streamnorm.nn.recurrent import fused

    seen: list[bool] = []
    run = fused.run

    def watched(cell: Any, data: Any, steps: int, h0: Any, inputs: Any = None) -> Any:
        rows = run(cell, data, steps, h0, inputs)
        if rows is not None or inputs is not None:  # the last word
            seen.append(rows is not None)
        return rows

    monkeypatch.setattr(fused, "run", watched)
    return seen
