"""The kernels again with the instruction set capped, in processes of their own: the library chooses once, at load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_backend

# Every length, head dimension and dtype, every memory layout, the extremes; gates and visibilities go round in them.
COVERING = "cpu and (sizes or layouts or logit or nothing or capped or determin) or pairwise_1.7 and cpu"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_kernels_with_fewer_instructions(isa):
    require_backend("cpu")
    if isa.startswith("avx512") and not torch.ops.gate4d.cpu_isa().startswith("avx512"):
        pytest.skip(f"this process already runs the {torch.ops.gate4d.cpu_isa()} kernels")
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "test_attention.py", "-k", COVERING],
        cwd=tests, env=os.environ | {"GATE4D_CPU_ISA": isa}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    summary = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary
    assert "skipped" not in summary
