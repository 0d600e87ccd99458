"""What setup.py compiles, what it leaves out, and that the reason reaches ``gate4d info``."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gate4d.kernels import _library

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate4d_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(home: Path, release: str, known: str = "") -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V{release}.1" || printf "{known}"\n')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


def test_an_unknown_build_is_an_error(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in setup_file.CHOICES:
        monkeypatch.setenv("GATE4D_BUILD", value)
        assert setup_file.wanted_build() == value
    monkeypatch.setenv("GATE4D_BUILD", "")
    assert setup_file.wanted_build() == "auto"
    env = {**os.environ, "GATE4D_BUILD": "gpu"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "GATE4D_BUILD must be one of auto, cpu, none, cuda, got 'gpu'" in result.stderr


@pytest.mark.parametrize("wanted", ["auto", "cpu", "cuda"])
def test_no_compiler_is_a_reason(setup_file: ModuleType, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nonexistent -O2")
    assert setup_file.skip_reason(wanted) == "no C++ compiler: 'nonexistent -O2' was not found"
    monkeypatch.setenv("CXX", "false")
    assert setup_file.skip_reason(wanted) == "no C++ compiler: 'false' does not run"


def test_why_cuda_is_left_out(setup_file: ModuleType, tmp_path: Path) -> None:
    why = setup_file.cuda_skip_reason
    assert why("2.13.0+cpu", None, "/usr/local/cuda") == "torch 2.13.0+cpu is no CUDA build"
    assert why("2.14.1+cu130", "13.0", None) == "nvcc was not found (CUDA_HOME: not set)"
    assert why("2.14.1+cu130", "13.0", str(tmp_path)) == f"nvcc was not found (CUDA_HOME: {tmp_path})"
    fake_nvcc(tmp_path / "old", "12.8")
    assert why("2.14.1+cu130", "13.0", str(tmp_path / "old")) == (
        "nvcc is 12.8, but torch 2.14.1+cu130 is built with CUDA 13.0"
    )
    fake_nvcc(tmp_path / "newer", "13.2")
    assert why("2.14.1+cu130", "13.0", str(tmp_path / "newer")) is None


def test_the_default_architectures_need_no_gpu(setup_file: ModuleType, tmp_path: Path) -> None:
    known = "compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n"
    assert setup_file.architectures(fake_nvcc(tmp_path, "12.4", known)) == "8.0;8.6;8.9;9.0+PTX"


class Base:
    """Stands for torch's build command: one library compiles, the other does not."""

    def __init__(self, build_lib: Path, *names: str):
        self.build_lib, self.compiler = str(build_lib), SimpleNamespace(compile="original")
        self.extensions = [SimpleNamespace(name=name) for name in names]

    def build_extensions(self) -> None:
        assert self.compiler.compile == "original"
        self.compiler.compile = "replaced"
        (extension,) = self.extensions
        if "broken" in extension.name or extension.name == "gate4d._CUDA":
            raise RuntimeError("Error compiling\n  objects for extension")


def test_a_cuda_build_that_fails_leaves_the_rest(
    setup_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU library stays, the reason is in the report beside the sources and in the one that is packed."""
    package, built = tmp_path / "source", tmp_path / "build" / "gate4d"
    package.mkdir()
    built.mkdir(parents=True)
    (built / "_CUDA.so").write_text("of an earlier build")
    monkeypatch.setattr(setup_file, "REPORT", package / "_build_report.json")
    command = setup_file.builder(Base)(built.parent, "gate4d._C", "gate4d._CUDA")
    command.build_extensions()
    assert [e.name for e in command.extensions] == ["gate4d._C"]
    assert not (built / "_CUDA.so").exists()
    for folder in (package, built):
        report = json.loads((folder / "_build_report.json").read_text())
        assert report == {"cuda": "the build failed: RuntimeError: Error compiling objects for extension"}
    monkeypatch.setattr(_library, "_PACKAGE", package)
    _library.cuda_library_error.cache_clear()
    try:
        assert "not installed (the build failed: RuntimeError" in _library.cuda_library_error()
    finally:
        _library.cuda_library_error.cache_clear()


def test_a_cpu_build_that_fails_is_an_error(setup_file: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Error compiling"):
        setup_file.builder(Base)(tmp_path, "gate4d._C_broken").build_extensions()


@pytest.mark.parametrize(
    ("report", "why"), [({"skipped": "no C++ compiler"}, "no C++ compiler"), ({}, "was not built")]
)
def test_a_package_without_libraries_imports_and_says_why(report: dict, why: str, tmp_path: Path) -> None:
    """The loader runs on import; here in a package of its own that holds nothing but a report."""
    package = tmp_path / "pure"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernels" / "__init__.py").touch()
    (package / "kernels" / "_library.py").write_text((ROOT / "kernels" / "_library.py").read_text())
    if report:
        (package / "_build_report.json").write_text(json.dumps(report))
    code = "from pure.kernels._library import *; print(library_error(), cuda_library_error(), sep='|')"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    cpu, cuda = said.split("|")
    assert why in cpu
    assert "GATE4D_BUILD=cuda" in cuda
