"""What a benchmark ran on, in words for its record."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from streamnorm.lab.bench.device import CPU
from streamnorm.lab.runs.underway import machine, versions
from streamnorm.ops import library

FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16")
FLAGS += ("amx_bf16", "asimd", "sve", "bf16")


def name(device: str = CPU) -> str:
    """A name for files: the processor's or the device's, in small letters."""
    full = str(machine()["cpu"]) if device == CPU else torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", full.lower()).strip("-") or "unknown"


def facts(device: str = CPU) -> dict[str, str]:
    """Device, processor, memory, instruction sets, versions and the compiled kernels."""
    found = {
        **({} if device == CPU else _device(device)),
        "processor": f"{machine()['cpu']}, {os.cpu_count()} cores",
        "caches": _caches(),
        "memory": _memory(),
        "instruction sets": ", ".join(flag for flag in FLAGS if flag in _flags()) or platform.machine(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'libc unknown'}",
        **versions(),
        "torch computes with": torch.backends.cpu.get_cpu_capability(),
        # Passive threads sleep between regions, and waking them costs small operations several times what they do.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    # Of a path its name: where a record was made is nobody's business.
    words = {key: Path(value).name if value.startswith("/") else value for key, value in library.status().items()}
    return found | {f"kernels: {key}": value for key, value in words.items()}


def second_cache(device: str) -> int:
    """Bytes of the second cache, of one core or of a whole device; 1 MB where nobody tells."""
    if device == CPU:
        return cache(2) or 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 20


def cache(level: int) -> int | None:
    """Bytes of the data cache of that level, of one core or of all that share it; None if the system does not tell."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        told = {name: (folder / name).read_text().strip() for name in ("level", "type", "size")}
        if told["level"] == str(level) and told["type"] != "Instruction" and told["size"].endswith("K"):
            return int(told["size"][:-1]) << 10
    return None


def _device(device: str) -> dict[str, str]:
    """Of a device that torch calls CUDA."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GB",
        "driver": _driver(),
        "CUDA": torch.version.cuda or f"HIP {torch.version.hip}",
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _caches() -> str:
    sizes = {level: cache(level) for level in (1, 2, 3)}
    return ", ".join(f"L{level} {size >> 10:,} KB" for level, size in sizes.items() if size) or "unknown"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB"
    except (ValueError, OSError):
        return "unknown"


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
