"""Builds the C++ kernels against torch's stable ABI; everything else is in pyproject.toml.

``GATE4D_BUILD=none`` skips compilation and gives a pure-Python install. A missing compiler does the same, with the
reason kept for ``gate4d info``; a compiler that fails on our sources is an error.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPORT = ROOT / "gate4d" / "_build_report.json"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs on every torch from 2.10 on


def skip_reason() -> str | None:
    if os.environ.get("GATE4D_BUILD", "auto") == "none":
        return "GATE4D_BUILD=none was set"
    if sys.platform == "win32":
        return "the C++ sources are written for GCC and Clang; no Windows build is supported yet"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not installed at build time; install it first and pass --no-build-isolation"
    return None


def build_options() -> dict:
    from torch.utils import cpp_extension

    def sources(folder: str, *patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc" / folder).glob(pattern))

    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", STABLE_ABI]
    link = []
    if sanitizers := os.environ.get("GATE4D_SANITIZE"):  # for example address,undefined
        flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
        cxx += flags
        link += flags
    compile_args = {"cxx": cxx}
    extension, files = cpp_extension.CppExtension, sources(".", "*.cpp") + sources("cpu", "*.cpp")
    cuda_sources = sources("cuda", "*.cu")
    if cuda_sources and _has_cuda(cpp_extension):
        extension = cpp_extension.CUDAExtension
        files += cuda_sources
        compile_args = {"cxx": [*cxx, "-DGATE4D_CUDA"], "nvcc": ["-O3", "-std=c++17", STABLE_ABI]}
    library = extension("gate4d._C", files, extra_compile_args=compile_args, extra_link_args=link, py_limited_api=True)
    use_ninja = cpp_extension.is_ninja_available()
    build = cpp_extension.BuildExtension.with_options(use_ninja=use_ninja, no_python_abi_suffix=True)
    # The library uses neither Python's nor torch's unstable ABI: one wheel a platform serves every version.
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def _has_cuda(cpp_extension) -> bool:
    import torch

    return torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None


reason = skip_reason()
REPORT.unlink(missing_ok=True)
if reason is not None:
    REPORT.write_text(json.dumps({"skipped": reason}))

# Top-level folders that are installed only as subpackages: the names alone belong to other wheels.
mapped = {f"gate4d.{folder}": folder for folder in ("kernels", "benchmarks")}
nested = [f"{name}.{p}" for name, folder in mapped.items() for p in find_packages(folder)]
setup(
    packages=[*find_packages(include=["gate4d", "gate4d.*"]), *mapped, *nested],
    package_dir={"gate4d": "gate4d", **mapped},
    package_data={
        "gate4d": ["py.typed", "_build_report.json"],
        "gate4d.kernels._triton": ["triton_tuned.json"],
        "gate4d.kernels.attention": ["auto_order.json"],
        "gate4d.models": ["weights/*"],
    },
    **({} if reason else build_options()),
)
