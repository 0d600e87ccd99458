"""Tests that Triton's interpreter runs, in a process of their own: kernels are compiled where they are imported."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import triton

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"


def _version(module) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


def run_interpreted(file: str) -> None:
    """Run the tests of ``file`` with the interpreter; every one must pass."""
    if _version(triton) < (3, 8) and _version(numpy) >= (2, 4):
        # It takes int() of an array with a dimension, which NumPy refuses from 2.4 on.
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy<2.4, got {numpy.__version__}")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
