"""Builds the compiled kernels: a hatchling hook for wheels and editable installs, and a command for who works on them.

Every ``streamnorm/csrc/*.cpp`` is compiled once per instruction set, and all objects become one shared
library, ``streamnorm/ops/_native.so``. No header or library of Python or torch is needed, so one wheel serves all
versions of both: what it takes of torch's C shim is bound when it is opened, and ``csrc/stub.c`` stands in for it
here. An install never fails for want of a compiler: the package is pure Python then, and says so when used.

    python hatch_build.py               in place, if anything changed
    python hatch_build.py --sanitize    build/sanitize/_native.so, which stops at wrong addresses and arithmetic

Environment: ``CXX``, the compiler; ``STREAMNORM_NATIVE=require``, fail where a warning would do, or ``=off``, no build.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

ISAS: dict[str, list[str]] = {"base": []}
"""Instruction sets and their flags. The base comes first: where two objects hold the same inline function the linker
keeps the first one, and that one has to run on every machine."""
if sysconfig.get_platform().endswith("x86_64"):
    ISAS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

COMPILE = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"),
    *("-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi"),
    *("-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"),  # GCC's own header of AVX-512 falls under it
]
OPTIMIZE = ["-O2"]  # the vectors are written out: -O3 takes twice as long for the same speed
SANITIZE = [
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
]
LINK: dict[str, list[str]] = {
    "linux": ["-shared", "-nodefaultlibs", "-Wl,-z,defs", "-lm", "-lgcc", "-lc"],
    "darwin": ["-shared", "-nodefaultlibs", "-lSystem", "-Wl,-undefined,dynamic_lookup"],
}
"""By platform. The C++ and OpenMP libraries stay out, and what would need them does not link: threads come from the
runtime that torch has loaded, handed over as pointers."""

TORCH = "libtorch_cpu.so"
STUB = ["-x", "c", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{TORCH}"]
"""Makes the stand-in for torch's library that the kernels are linked against."""


class BuildError(Exception):
    """Why there is no library, in words for whoever installs."""


class NoCompilerError(BuildError):
    """Nothing here can compile: that is no fault of the sources."""


def library_path(root: Path) -> Path:
    """Where the library lies in a source tree."""
    return root / "streamnorm" / "ops" / ("_native.dylib" if sys.platform == "darwin" else "_native.so")


def build(root: Path, sanitize: bool = False) -> Path:
    """Compile and link what is older than its sources, and say so on the error stream; returns the library.

    Raises:
        NoCompilerError: without a compiler, or for a platform that has no build.
        BuildError: with the compiler's message.
    """
    started = time.time_ns()  # outputs get this time, so that an edit during the build counts as newer
    native, folder = root / "streamnorm" / "csrc", root / "build" / ("sanitize" if sanitize else "native")
    library = folder / library_path(root).name if sanitize else library_path(root)
    sources = sorted(native.glob("*.cpp"))
    common = [*native.glob("*.h"), native / "stub.c", root / "hatch_build.py"]
    if _is_newer(library, [*sources, *common, native]):  # the folder, for a source that was removed
        return library
    if sys.platform not in LINK:
        raise NoCompilerError(f"there is no build for {sys.platform} yet")
    cxx, mode = _compiler(), SANITIZE if sanitize else OPTIMIZE
    isas = {"base": ISAS["base"]} if sanitize else ISAS  # one is enough to find what all do wrong

    def make(output: Path, command: list[str]) -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{output.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            partial.unlink(missing_ok=True)
            raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")
        sys.stderr.write(done.stderr)  # warnings
        os.utime(partial, ns=(started, started))
        return partial.replace(output)

    def is_old(isa: str, source: Path) -> bool:
        return not _is_newer(folder / isa / f"{source.stem}.o", [source, *common])

    def compile_one(isa: str, source: Path) -> Path:
        output = folder / isa / f"{source.stem}.o"
        if not is_old(isa, source):
            return output
        return make(output, [*cxx, *COMPILE, *mode, f"-DSN_ISA={isa}", *ISAS[isa], "-c", str(source)])

    each = [(isa, source) for isa in isas for source in sources]
    count = sum(is_old(*one) for one in each)
    sys.stderr.write(f"compiling {count} of {len(each)} kernels ({', '.join(isas)}) with {shlex.join(cxx)}\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, *zip(*each, strict=True)))
    link = ["-shared", *SANITIZE] if sanitize else LINK[sys.platform]
    if sys.platform == "linux":
        stub = make(folder / TORCH, [*cxx, *STUB, str(native / "stub.c")])
        link = [str(stub), *link]
    return make(library, [*cxx, *map(str, objects), *link])


def _is_newer(output: Path, inputs: Iterable[Path]) -> bool:
    return output.exists() and output.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in inputs)


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise NoCompilerError(f"no compiler at CXX={chosen}" if chosen else "no C++ compiler (c++, g++ or clang++) found")


class NativeKernels(BuildHookInterface):
    """Puts the library into the wheel, whose tag then names the platform; without it the wheel is for any."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root, wish = Path(self.root), os.environ.get("STREAMNORM_NATIVE")
        if wish == "off":
            return
        try:
            library = build(root)
        except (BuildError, OSError) as error:
            if wish == "require":
                raise
            library_path(root).unlink(missing_ok=True)  # made from other sources
            self.app.display_warning(f"streamnorm is installed without its compiled kernels, and is slower: {error}")
            return
        # A manylinux tag promises more than was checked here: auditwheel gives it.
        platform = next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
        build_data["artifacts"].append(f"/{library.relative_to(root).as_posix()}")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")


def main() -> int:
    """Entry point of the command. The status is 1 if the sources do not compile, or if nothing can and it must."""
    parser = argparse.ArgumentParser(description="Build the compiled kernels in place.")
    parser.add_argument("--sanitize", action="store_true", help="build build/sanitize/_native.so instead")
    sanitize, wish = parser.parse_args().sanitize, os.environ.get("STREAMNORM_NATIVE")
    if wish == "off":
        return 0
    try:
        print(build(Path(__file__).resolve().parent, sanitize))
    except (BuildError, OSError) as error:
        print(f"no compiled kernels: {error}", file=sys.stderr)
        return int(wish == "require" or not isinstance(error, NoCompilerError))
    return 0


if __name__ == "__main__":
    sys.exit(main())
