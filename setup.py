"""Builds the C++ kernels against torch's stable ABI; everything else is in pyproject.toml.

``GATE4D_BUILD`` chooses what is compiled:

- ``auto`` (the default) or ``cpu``: the CPU kernels. GPUs are served by the Triton kernels, which are compiled where
  they run, so one wheel serves machines with and without a GPU.
- ``none``: nothing; a pure-Python install.
- ``cuda``: the CPU kernels, and the CUDA C++ kernel as a library of its own, for the architectures of
  ``TORCH_CUDA_ARCH_LIST`` or the default list below. No GPU has to be visible.

A C++ compiler that is missing or does not run gives a pure-Python install. A CUDA build that is impossible or fails
gives one without that library. The reason is kept for ``gate4d info``. A C++ compiler that fails on the CPU sources is
an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPORT = ROOT / "gate4d" / "_build_report.json"
CHOICES = ("auto", "cpu", "none", "cuda")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs on every torch from 2.10 on
CUDA_LIBRARY = "gate4d._CUDA"
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those that the nvcc at hand knows; PTX of the last


def wanted_build() -> str:
    """The value of GATE4D_BUILD."""
    wanted = os.environ.get("GATE4D_BUILD") or "auto"
    if wanted not in CHOICES:
        raise SystemExit(f"GATE4D_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}.")
    return wanted


def skip_reason(wanted: str) -> str | None:
    """Why nothing can be compiled; None if the CPU kernels can."""
    if wanted == "none":
        return "GATE4D_BUILD=none was set"
    if sys.platform == "win32":
        return "the C++ sources are written for GCC and Clang; no Windows build is supported yet"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found"
    # On macOS without the command line tools c++ is there and only says what to install.
    if subprocess.run([*compiler.split(), "--version"], check=False, capture_output=True).returncode:
        return f"no C++ compiler: {compiler!r} does not run"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not installed at build time; install it first and pass --no-build-isolation"
    return None


def cuda_skip_reason(torch_version: str, torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """Why the CUDA library cannot be compiled; None if it can be tried."""
    if torch_cuda is None:
        return f"torch {torch_version} is no CUDA build"
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if cuda_home is None or not nvcc.exists():
        return f"nvcc was not found (CUDA_HOME: {cuda_home or 'not set'})"
    found = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if found is None:
        return f"{nvcc} --version does not name a release"
    if found[1] != torch_cuda.split(".")[0]:
        return f"nvcc is {found[1]}.{found[2]}, but torch {torch_version} is built with CUDA {torch_cuda}"
    return None


def architectures(nvcc: Path) -> str:
    """The default of TORCH_CUDA_ARCH_LIST. torch's own asks the visible GPUs, and fails where there are none."""
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    return ";".join(a for a in CUDA_ARCHITECTURES if a.replace(".", "") in known) + "+PTX"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


def report(folder: Path | None = None, **facts: str) -> None:
    """Add facts to the build report in ``folder``, by default the one of the sources."""
    path = REPORT if folder is None else folder / REPORT.name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **facts}))


def builder(base: type) -> type:
    """torch's build command, in which the CUDA library may fail."""

    class Build(base):
        def build_extensions(self) -> None:
            folder = Path(self.build_lib) / "gate4d"  # may hold what an earlier build left
            for stale in (*folder.glob("_CUDA*.so"), *([] if REPORT.exists() else folder.glob(REPORT.name))):
                stale.unlink()
            # One by one: a failure must be told apart, and torch replaces methods of the compiler object each time.
            built, compiler = [], dict(vars(self.compiler))
            for extension in self.extensions:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as e:
                    if extension.name != CUDA_LIBRARY:
                        raise
                    self.without_cuda(f"the build failed: {type(e).__name__}: {str(e).strip() or 'no message'}")
                finally:
                    vars(self.compiler).clear()
                    vars(self.compiler).update(compiler)
            self.extensions = built

        def without_cuda(self, why: str) -> None:
            why = " ".join(why.split())[:500]
            print(f"gate4d: installed without the CUDA C++ kernel: {why}", file=sys.stderr)
            report(cuda=why)
            folder = Path(self.build_lib) / "gate4d"  # the package's files were copied there before
            folder.mkdir(parents=True, exist_ok=True)
            report(folder, cuda=why)

    return Build


def build_options(wanted: str) -> dict:
    import torch
    from torch.utils import cpp_extension

    def sources(folder: str, pattern: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(pattern))

    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", STABLE_ABI]
    link = []
    if sanitizers := os.environ.get("GATE4D_SANITIZE"):  # for example address,undefined
        flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
        cxx += flags
        link += flags
    libraries = [
        cpp_extension.CppExtension(
            "gate4d._C", sources(".", "*.cpp") + sources("cpu", "*.cpp"), extra_compile_args={"cxx": cxx},
            extra_link_args=link, py_limited_api=True,
        )
    ]  # fmt: skip
    for stale in REPORT.parent.glob("_CUDA*.so"):
        stale.unlink()
    if wanted == "cuda":
        home = cpp_extension.CUDA_HOME
        if (why := cuda_skip_reason(torch.__version__, torch.version.cuda, home)) is not None:
            print(f"gate4d: installed without the CUDA C++ kernel: {why}", file=sys.stderr)
            report(cuda=why)
        else:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(Path(home, "bin", "nvcc")))
            args = {"cxx": cxx, "nvcc": ["-O3", "-std=c++17", STABLE_ABI]}
            libraries.append(
                cpp_extension.CUDAExtension(
                    CUDA_LIBRARY, sources("cuda", "*.cu"), extra_compile_args=args, py_limited_api=True
                )
            )
    use_ninja = cpp_extension.is_ninja_available()
    build = builder(cpp_extension.BuildExtension).with_options(use_ninja=use_ninja, no_python_abi_suffix=True)
    # The libraries use neither Python's nor torch's unstable ABI: one wheel a platform serves every version.
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def main() -> None:
    wanted = wanted_build()
    reason = skip_reason(wanted)
    REPORT.unlink(missing_ok=True)
    if reason is not None:
        report(skipped=reason)
    options = {} if reason else build_options(wanted)
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
        **options,
    )


if __name__ == "__main__":
    main()
