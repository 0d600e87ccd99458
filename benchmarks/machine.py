"""The machine that something runs on and the versions of what runs there: the one description that is printed and
kept with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import gate4d

# Names as Linux spells them; None elsewhere, where only torch's own summary is known.
FEATURES = {"AVX2": "avx2", "FMA": "fma", "AVX-512F": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX-BF16": "amx_bf16"}
_NVIDIA_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
_VARIABLES = ("OMP_", "KMP_", "MKL_", "GATE4D_")  # of the environment, by the beginnings of their names


def hardware() -> dict:
    """The processor and what it can do, cores that this process may use, bytes of memory, GPUs and their clocks."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "features": features(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "gpu": gpus,
        "nvidia_smi": gpu_clocks() if gpus else None,
    }


def versions() -> dict[str, str | None]:
    """Of gate4d, what it computes with, and the system; None for what is not installed."""
    packages = {name: _version(name) for name in ("triton", "numpy", "flash-attn", "rich")}
    return {
        "gate4d": gate4d.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **packages,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def environment() -> dict[str, str]:
    """Variables that change how fast something is."""
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def processor() -> str:
    """Name, family and model; virtual machines often hide the part of the name that tells the microarchitecture."""
    cpu = cpuinfo()
    if "model name" not in cpu:
        return platform.processor() or platform.machine()
    family = f" (family {cpu['cpu family']}, model {cpu['model']})" if "cpu family" in cpu and "model" in cpu else ""
    return cpu["model name"] + family


def features() -> dict[str, bool] | None:
    """Which of :data:`FEATURES` the processor has; None where the system does not tell."""
    flags = cpuinfo().get("flags")
    return None if flags is None else {name: flag in flags.split() for name, flag in FEATURES.items()}


def cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    entries = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in entries}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_clocks() -> str:
    """One line of nvidia-smi a GPU, or why there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return f"not available: {e}"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
