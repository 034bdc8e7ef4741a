"""The public names, each at one address, and an import that loads torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import streamnorm

NAMES = {
    *("Affine", "Batch", "BatchNorm", "DAU", "DegenerateReferenceError", "Exponential", "LongShort", "Lp", "Memory"),
    *(
        "Monitor",
        "Norm",
        "NormGRU",
        "NormGRUCell",
        "NormLSTM",
        "NormLSTMCell",
        "NormRNN",
        "NormRNNCell",
        "NormRef",
        "OnlineTrainer",
        "Policy",
        "Rule",
        "Sample",
        "SampleNorm",
        "Scale",
        "Standardize",
        "Streaming",
    ),
    *("Evidence", "GradientRule", "Pooled", "Residual", "BatchRenorm", "OnlineNorm"),
    *("convert", "fold_into", "freeze", "to_torch", "torch_state_dict", "unfreeze"),
    *("StreamingNorm", "TimeSpecific", "Warmup", "attach", "loss_scale", "monitor", "recalibrate", "synchronize"),
    "vectorized",
    *(f"SP{i}" for i in range(1, 6)),
    *(f"BA{i}" for i in range(1, 7)),
}


def seen_by_type_checkers() -> dict[str, str]:
    """The public names and the modules that they are imported from."""
    tree = ast.parse(Path(streamnorm.__file__).read_text())
    ours = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("streamnorm."))
    return {str(alias.asname): str(node.module) for node in ours for alias in node.names}


def test_public_names_are_pinned() -> None:
    assert seen_by_type_checkers().keys() == NAMES == set(streamnorm.__all__)
    assert set(dir(streamnorm)) >= NAMES
    assert len(set(map(id, (getattr(streamnorm, n) for n in NAMES)))) == len(NAMES), "a name stands for another"


def test_names_are_loaded_from_where_a_type_checker_sees_them() -> None:
    for name, module in seen_by_type_checkers().items():
        assert f"streamnorm.{streamnorm._MODULE_OF[name]}" == module


def test_the_import_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, streamnorm\nassert 'torch' not in sys.modules\nassert streamnorm.calibration.gap\n"
        "assert 'torch' in sys.modules\nfrom streamnorm import *\nassert StreamingNorm\n"
        "try: streamnorm.StreamNorm\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no attribute 'StreamNorm'" in done.stdout


def test_no_module_hides_behind_a_public_name() -> None:
    assert not NAMES & {path.stem for path in Path(streamnorm.__file__).parent.iterdir()}


def test_public_objects_say_what_they_are() -> None:
    for name in NAMES:
        thing = getattr(streamnorm, name)
        if callable(thing):
            assert thing.__doc__, name


def test_import_loads_torch_alone() -> None:
    heavy = ["triton", "matplotlib", "datasets", "sklearn", "tyro", "rich", "safetensors", "PIL", "pandas"]
    code = (
        "import sys, torch; before = set(sys.modules); import streamnorm;"
        f"print(*[m for m in {heavy} if m in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False"]
