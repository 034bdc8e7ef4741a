"""The compiled kernels are built, shipped and opened where that can be done, and done without where it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from close import assert_close

from streamnorm import StreamingNorm
from streamnorm.lab import doctor
from streamnorm.ops import library

ROOT = Path(__file__).parents[2]
NATIVE = Path("streamnorm/csrc")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
compiles = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")

PROBE = """
#include "parallel.h"
SN_EXPORT(void, probe)(int64_t *thread, int64_t tasks) {
    parallel(tasks, 2, [&](int64_t t) { thread[t] = sn_parallel_ ? sn_thread_() : -1; });
}
"""
"""A kernel that notes which thread did which task; -1 without a runtime."""


def run(*command: str | Path, cwd: Path, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in an environment that says nothing of streamnorm but what is given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMNORM_")}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=120,
    )


def build_wheel(tree: Path, **environment: str | Path) -> tuple[Path, str]:
    """The wheel of a source tree, and what the build said."""
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out", cwd=tree, **environment)
    assert done.returncode == 0, done.stderr
    return max((tree / "out").glob("*.whl"), key=lambda path: path.stat().st_mtime_ns), done.stderr


def load(file: Path) -> ModuleType:
    """A module of its own, made from a file."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_by_itself", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree like ours, with one small kernel."""
    root = tmp_path / "tree"
    (root / NATIVE).mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root)
    for name in ("abi.cpp", "isa.h", "parallel.cpp", "parallel.h", "stub.c"):
        shutil.copy(ROOT / NATIVE / name, root / NATIVE)
    (root / NATIVE / "probe.cpp").write_text(PROBE)
    (root / "streamnorm/__init__.py").touch()
    return root


@pytest.fixture
def hook() -> ModuleType:
    """The module ``hatch_build``, which is in no package."""
    return load(ROOT / "hatch_build.py")


COMPUTE = """
import sys, warnings, torch, streamnorm
from streamnorm.ops import library
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layer = streamnorm.StreamingNorm(7, affine=False)
    x = torch.linspace(-1, 2, 11 * 7, dtype=torch.float64).sin().reshape(11, 7).requires_grad_()
    y = layer(x)
    (y * x.detach()).sum().backward()
    torch.save([y.detach(), x.grad], "got.pt")
    library.library(), library.library()
print(streamnorm.__file__, library.library(), len(said), *[w.message for w in said])
"""


def compute() -> list[torch.Tensor]:
    """What ``COMPUTE`` saves, by the package under test."""
    x = torch.linspace(-1, 2, 11 * 7, dtype=torch.float64).sin().reshape(11, 7).requires_grad_()
    y = StreamingNorm(7, affine=False)(x)
    (y * x.detach()).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def check_computed(folder: Path) -> None:
    for name, got, want in zip(("y", "dx"), torch.load(folder / "got.pt"), compute(), strict=True):
        assert_close(name, got, want, terms=11)


def test_without_a_compiler_the_package_is_pure_warns_once_and_computes_the_same(tree: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("_native.*", "__pycache__")
    shutil.copytree(ROOT / "streamnorm", tree / "streamnorm", ignore=ignored, dirs_exist_ok=True)
    wheel, said = build_wheel(tree, PATH=tree / "nowhere")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "without its compiled kernels" in said
    assert "no C++ compiler (c++, g++ or clang++) found" in said
    zipfile.ZipFile(wheel).extractall(tree / "installed")
    done = run(sys.executable, "-c", COMPUTE, cwd=tmp_path, PYTHONPATH=tree / "installed")
    assert done.stdout.startswith(f"{tree / 'installed'}/streamnorm/__init__.py None 1 streamnorm runs without "), done
    assert "install a C++ compiler" in done.stdout
    assert "streamnorm doctor" in done.stdout
    check_computed(tmp_path)


def test_the_wheel_holds_every_module_and_every_folder_of_them_is_a_package(tree: Path) -> None:
    modules = {path.relative_to(ROOT) for path in (ROOT / "streamnorm").rglob("*.py")}
    for module in modules:
        (tree / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / module, tree / module)
    wheel, _ = build_wheel(tree, PATH=tree / "nowhere")
    with zipfile.ZipFile(wheel) as files:
        assert not {str(module) for module in modules} - set(files.namelist()), "does .gitignore leave them out?"
    assert not {module.parent / "__init__.py" for module in modules} - modules


@compiles
def test_with_a_compiler_the_wheel_holds_a_library_for_every_python(tree: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(tree)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl" if os.uname().machine == "x86_64" else ".whl")
    assert "warning" not in said.lower()
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        assert {"streamnorm/ops/_native.so", "streamnorm/csrc/abi.cpp"} <= names
        assert not any("build/" in name for name in names)
        files.extractall(tmp_path / "installed")
        tags = next(files.read(name).decode() for name in names if name.endswith("/WHEEL"))
    assert "Root-Is-Purelib: false" in tags
    built = tmp_path / "installed/streamnorm/ops/_native.so"
    needed = built.read_bytes()
    assert not [name for name in (b"libstdc++", b"libgomp", b"libomp", b"libpython", b"libtorch") if name in needed]
    done = run(
        sys.executable,
        "-c",
        "from streamnorm.lab.doctor import report; print(report())",
        cwd=ROOT,
        STREAMNORM_LIBRARY=built,
    )
    assert f"\n  library  {built}\n  abi      {library.ABI}\n  isa      " in done.stdout, done


@compiles
def test_what_is_up_to_date_is_left_alone(tree: Path, hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    built = hook.build(tree)
    assert built == tree / "streamnorm/ops/_native.so"
    first, objects = built.stat().st_mtime_ns, {path: path.stat().st_mtime_ns for path in tree.glob("build/*/*/*.o")}
    assert len(objects) == 3 * len(hook.ISAS)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert hook.build(tree).stat().st_mtime_ns == first, "built again with nothing changed"
    monkeypatch.delenv("CXX")
    (tree / NATIVE / "probe.cpp").touch()
    second = hook.build(tree).stat().st_mtime_ns
    assert second > first
    assert {path.stem for path, time in objects.items() if path.stat().st_mtime_ns > time} == {"probe"}
    for changed in (tree / NATIVE / "isa.h", tree / "hatch_build.py"):
        changed.touch()
        assert hook.build(tree).stat().st_mtime_ns > second, f"not built again after a change of {changed.name}"
        assert all(path.stat().st_mtime_ns > second for path in objects)
    (tree / NATIVE / "probe.cpp").unlink()
    hook.build(tree)
    assert b"probe_base" not in built.read_bytes(), "a removed source is still there"
    assert not [path for path in tree.rglob("*") if path.suffix.strip(".").isdigit()], "temporary files are left"


@compiles
def test_what_does_not_compile_is_left_out_unless_it_is_required(tree: Path) -> None:
    stale = tree / "streamnorm/ops/_native.so"
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    os.utime(stale, (0, 0))
    (tree / NATIVE / "probe.cpp").write_text("int probe() { return of_what; }")
    build = (sys.executable, "-m", "hatchling", "build", "-t", "wheel")
    required = run(*build, cwd=tree, STREAMNORM_NATIVE="require")
    assert required.returncode
    assert "of_what" in required.stderr
    assert run(sys.executable, "hatch_build.py", cwd=tree).returncode == 1
    wheel, said = build_wheel(tree)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "of_what" in said
    assert not stale.exists(), "a library of other sources would be opened"
    unwanted, said = build_wheel(tree, STREAMNORM_NATIVE="off")
    assert unwanted.name.endswith("-py3-none-any.whl")
    assert "of_what" not in said


@compiles
def test_the_command_says_what_it_compiles(tree: Path, hook: ModuleType) -> None:
    command = (sys.executable, "hatch_build.py")
    done = run(*command, cwd=tree)
    count = 3 * len(hook.ISAS)
    assert done.stderr.startswith(f"compiling {count} of {count} kernels (base"), done
    assert done.stdout == f"{tree / 'streamnorm/ops/_native.so'}\n"
    assert run(*command, cwd=tree).stderr == "", "nothing was left to do"
    (tree / NATIVE / "probe.cpp").touch()
    assert f"compiling {len(hook.ISAS)} of {count} kernels" in run(*command, cwd=tree).stderr


def test_without_a_compiler_the_command_fails_only_if_it_must_not(tree: Path) -> None:
    command = (sys.executable, "hatch_build.py")
    done = run(*command, cwd=tree, CXX="/nonexistent")
    assert (done.returncode, done.stderr) == (0, "no compiled kernels: no compiler at CXX=/nonexistent\n")
    assert run(*command, cwd=tree, CXX="/nonexistent", STREAMNORM_NATIVE="require").returncode == 1
    assert run(*command, cwd=tree, CXX="/nonexistent", STREAMNORM_NATIVE="off").stderr == ""


def test_the_source_distribution_can_build_the_library(tree: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", "out", cwd=tree, CXX="/nonexistent")
    assert (done.returncode, done.stderr.count("compiled kernels")) == (0, 0), done.stderr
    with tarfile.open(next((tree / "out").glob("*.tar.gz"))) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"hatch_build.py", "pyproject.toml", *(f"{NATIVE}/{name}" for name in ("abi.cpp", "isa.h"))} <= names


PROBED = """
noted = (ctypes.c_int64 * 8)()
def compute():
    library.function("probe", [ctypes.c_void_p, ctypes.c_int64])(noted, 8)
    return sorted(set(noted))
"""

LAYER = """
x, dy = torch.randn(2, 4096, 64).unbind()  # enough for several threads
x.requires_grad_()
layer = StreamingNorm(64, affine=False)
def compute():
    return torch.autograd.grad(layer(x), x, dy)[0].shape
"""

FORK = """
import ctypes, os, signal, torch
from streamnorm import StreamingNorm
from streamnorm.ops import library
torch.set_num_threads(2)
{compute}
if {early}:
    print("parent", compute(), flush=True)
else:
    torch.ones(1 << 20).sum()
child = os.fork()
if not child:
    signal.alarm(30)  # the end of it, should it hang
    print("child", compute(), flush=True)
    os._exit(0)
print("status", os.waitpid(child, 0)[1])
"""


@compiles
@pytest.mark.parametrize("early", [True, False], ids=["opened before", "opened after"])
def test_a_forked_child_computes_on_one_thread(tree: Path, hook: ModuleType, early: bool) -> None:
    """It has none of its parent's threads, and a runtime that waits for them hangs."""
    code = FORK.format(compute=PROBED, early=early)
    done = run(sys.executable, "-c", code, cwd=ROOT, STREAMNORM_LIBRARY=hook.build(tree), OMP_NUM_THREADS="2")
    assert done.stdout.splitlines() == [*(["parent [0, 1]"] if early else []), "child [-1]", "status 0"], done


@pytest.mark.skipif(not library.path().exists(), reason="torch itself does not survive such a fork")
def test_a_layer_goes_on_in_a_forked_child() -> None:
    code = FORK.format(compute=LAYER, early=True)
    done = run(sys.executable, "-c", code, cwd=ROOT, OMP_NUM_THREADS="2")
    shape = "torch.Size([4096, 64])"
    assert done.stdout.splitlines() == [f"parent {shape}", f"child {shape}", "status 0"], done


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``streamnorm.ops.library`` as it is before its first use, in an environment that asks for nothing."""
    for name in ("STREAMNORM_BACKEND", "STREAMNORM_LIBRARY", "STREAMNORM_ISA"):
        monkeypatch.delenv(name, raising=False)
    return load(Path(library.__file__))


def test_eager_is_a_choice_and_no_reason_to_warn(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMNORM_BACKEND", "eager")
    monkeypatch.setenv("STREAMNORM_LIBRARY", "/nonexistent")
    assert loader.library() is None
    assert loader.isa() is None
    assert loader.status() == {"library": "/nonexistent", "reason": "STREAMNORM_BACKEND=eager"}
    with pytest.raises(RuntimeError, match="no compiled kernels to take 'forward' from"):
        loader.function("forward", [])


def test_the_doctor_says_why_there_is_no_library(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "library", loader)
    monkeypatch.setenv("STREAMNORM_LIBRARY", "/nonexistent")
    said = doctor.report()
    assert "  not used      there is no /nonexistent\n" in said
    assert f"  to mend that  {loader.MEND}\n" in said
    monkeypatch.setenv("STREAMNORM_BACKEND", "eager")
    assert "  not used  STREAMNORM_BACKEND=eager\n\n" in doctor.report()


def test_eager_computes_the_same(tmp_path: Path) -> None:
    done = run(sys.executable, "-c", COMPUTE, cwd=tmp_path, STREAMNORM_BACKEND="eager", PYTHONPATH=ROOT)
    assert done.stdout.endswith(" None 0\n"), done
    check_computed(tmp_path)


@pytest.mark.parametrize(("content", "reason"), [(None, "there is no "), ("no library", "cannot be used")])
def test_a_file_that_is_no_library_is_named(
    content: str | None, reason: str, loader: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_native.so"
    if content:
        file.write_text(content)
    monkeypatch.setenv("STREAMNORM_LIBRARY", str(file))
    with pytest.warns(RuntimeWarning, match=f"without its compiled kernels: .*{file}") as said:
        assert [loader.library(), loader.library()] == [None, None]
    assert len(said) == 1
    assert reason in loader.status()["reason"]


@compiles
def test_a_library_of_another_version_is_refused(
    tree: Path, hook: ModuleType, loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree / NATIVE / "abi.cpp"
    here = f"{{ return {library.ABI}; }}"
    assert here in source.read_text()
    source.write_text(source.read_text().replace(here, f"{{ return {library.ABI + 1}; }}"))
    monkeypatch.setenv("STREAMNORM_LIBRARY", str(hook.build(tree)))
    with pytest.warns(RuntimeWarning, match=f"ABI version {library.ABI + 1}, and this streamnorm needs {library.ABI}"):
        assert loader.library() is None


@compiles
def test_a_lower_instruction_set_can_be_asked_for(
    tree: Path, hook: ModuleType, loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMNORM_LIBRARY", str(hook.build(tree)))
    assert set(hook.ISAS) <= set(loader.ISAS)
    monkeypatch.setenv("STREAMNORM_ISA", "v5")
    with pytest.raises(ValueError, match=r"STREAMNORM_ISA is one of \['base'.*, got 'v5'"):
        loader.isa()
    monkeypatch.setenv("STREAMNORM_ISA", "base")
    assert loader.isa() == "base"
    assert loader.function("probe", []).__name__ == "probe_base"
    monkeypatch.setenv("STREAMNORM_BACKEND", "eagre")
    with pytest.raises(ValueError, match=r"STREAMNORM_BACKEND is 'native' .* or 'eager', got 'eagre'"):
        loader.wanted()


def test_import_does_not_open_the_library() -> None:
    code = "import streamnorm; from streamnorm.ops import library; print(library._open.cache_info().currsize)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout == "0\n", done
