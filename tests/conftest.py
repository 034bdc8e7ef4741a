"""What every test stands on: seeds, poisoned memory, shape checks at run time, and where the real data lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)  # the tensors of a test are small, and workers share the cores
SHARED = Path(__file__).parents[2] / "shared" / "data"


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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets; what needs it is skipped without it."""
    folder = Path(os.environ.get("STREAMNORM_DATA", SHARED))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set STREAMNORM_DATA")
    return folder
