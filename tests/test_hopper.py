"""The hand-written Hopper forward as far as no GPU is needed: whole blocks of it on the CPU, and its machine code.

It has not run on a GPU. tests/hopper_host.cpp stands in for the instructions of csrc/cuda/hopper_ptx.cuh; all else, the
addresses, phases of barriers, masks, gates and sums, is the kernel's own source.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.attention_cases import GATES, Case, draw, evaluate, exact
from helpers.torch_attention import torch_attention

from gate4d import MotionGate
from gate4d.benchmarks.gpu import hopper

ROOT = Path(__file__).parents[1]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    built = tmp_path_factory.mktemp("host") / "hopper.so"
    include = Path(torch.__file__).parent / "include"
    flags = "-O2", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"
    source = ROOT / "tests" / "hopper_host.cpp"
    subprocess.run(["g++", *flags, f"-I{include}", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


AT_ONCE, LATE, RANDOM = 0, 1, 7  # when copies and products happen
SMALL = {"batch": 1, "heads": 1}
CASES = [
    (Case("none", "full", BF16, queries=70, keys=300, dim=64, **SMALL), LATE),
    (Case("none", "full", FP16, queries=1, keys=1, dim=128, **SMALL), AT_ONCE),
    (Case("pairwise", "full", BF16, queries=130, keys=900, dim=64, **SMALL), LATE),
    (Case("pairwise", "full", FP16, queries=128, keys=640, dim=128, **SMALL), AT_ONCE),
    (Case("pairwise", "full", FP16, queries=64, keys=640, dim=128, **SMALL), LATE),
    (Case("pairwise", "full", BF16, queries=600, keys=600, dim=64, memory="qkv", batch=1, heads=2), RANDOM),
    (Case("keys", "intervals", FP16, queries=140, keys=500, dim=64, memory="heads_last", batch=2, heads=1), RANDOM),
    (Case("pairwise", "window", BF16, queries=400, keys=400, dim=128, **SMALL), LATE),
    (Case("pairwise", "empty", FP16, queries=260, keys=300, dim=64, **SMALL), LATE),
    (Case("none", "packed", BF16, queries=200, keys=520, dim=128, **SMALL), RANDOM),
    (Case("pairwise", "frame_causal", BF16, queries=520, keys=520, dim=64, logit_scale=8.0, **SMALL), AT_ONCE),
]


@pytest.mark.parametrize(("case", "mode"), CASES, ids=str)
def test_whole_blocks(case: Case, mode: int, host: ctypes.CDLL) -> None:
    """Output and lse as accurate as torch's, whenever copies and products happen between their start and their wait."""
    x = draw(case)
    if case.memory == "qkv":  # rows past the end of q are those of k in memory, which holds NaN beside them
        assert x.q.stride(2) == 3 * case.heads * case.dim
    out, lse = hopper.attend(
        x.q, x.k, x.v, GATES[case.gate](x.query_motion, x.key_motion, x.masks), x.visible, built=host, stream=mode
    )
    want = exact(x, case.gate)[0]
    baseline = evaluate(torch_attention, x, case.gate)[0]
    assert_accurate("out", out, want["out"], baseline["out"])
    assert_accurate("lse", lse, want["lse"], baseline["lse"], magnitude=1.0)


def test_large_logits_of_keys_without_weight(host: ctypes.CDLL) -> None:
    """They neither overflow nor push the others out, in the tile where they are and in those after it."""
    x = draw(Case("pairwise", "full", BF16, queries=64, keys=300, dim=64, **SMALL))
    key_motion = x.key_motion.clone()
    key_motion[:, [5, 200]] = 1.0
    x.k[:, :, [5, 200]] *= 300
    gate = MotionGate.pairwise(torch.zeros_like(x.query_motion), key_motion)
    out, lse = hopper.attend(x.q, x.k, x.v, gate, None, built=host, stream=LATE)
    kept = key_motion[0] < 1
    weight = (1 - key_motion[0, kept].double()).log()
    logits = x.q.double() @ x.k[:, :, kept].double().mT / 8 + weight
    assert (lse - logits.logsumexp(-1)).abs().max() < 1e-3
    error = (out.double() - logits.softmax(-1) @ x.v[:, :, kept].double()).abs().max()
    assert error < 4 * torch.finfo(BF16).eps * x.v.abs().max()


def test_what_is_not_served() -> None:
    q = torch.zeros(1, 1, 4, 64, dtype=BF16)
    for bad, gate in (
        (q.float(), None), (q[..., :32], None), (torch.zeros(1, 1, 4, 65, dtype=BF16)[..., 1:], None),
        (q, MotionGate.keys(torch.zeros(1, 4), strength=2)), (q, MotionGate.drop_keys(torch.ones(1, 4) > 0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            hopper.attend(bad, bad, bad, gate, stream=0)


def test_machine_code(tmp_path: Path) -> None:
    """No local memory, and as many instructions of the kinds that count as the source has, for all 12 kernels.

    Logits and values are multiplied at two places each (a first tile, the loop; the loop, a last tile), exponentials of
    64 scores and 2 factors are taken at two. Boxes of 64 features are copied for q, k and v.
    """
    nvcc, dump = shutil.which("nvcc"), _cuobjdump()
    if nvcc is None or dump is None:
        pytest.skip("nvcc or cuobjdump is not installed")
    source, cubin = ROOT / "csrc" / "cuda" / "hopper_forward.cu", tmp_path / "hopper.cubin"
    command = [nvcc, "-O3", "-std=c++17", "-arch=sm_90a", "-Xptxas=-v", "-cubin", str(source), "-o", str(cubin)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "serialized" not in report, report  # products that wait for each other
    spills = [line.strip() for line in report.splitlines() if "stack frame" in line]
    assert spills == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] * 12, report
    sass = subprocess.run([dump, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 12
    for kernel in kernels:
        dim = 128 if "Li128E" in kernel.split()[0] else 64
        gated = "ELi0E" not in kernel.split()[0]
        found = {name: len(re.findall(rf"\b{re.escape(name)}\b", kernel))
                 for name in ("HGMMA", "MUFU.EX2", "UTMALDG", "UBLKCP", "USETMAXREG")}  # fmt: skip
        assert found == {
            "HGMMA": 2 * dim // 16 + 2 * 8, "MUFU.EX2": 2 * (64 + 2), "UTMALDG": 3 * dim // 64, "UBLKCP": int(gated),
            "USETMAXREG": 2,
        }  # fmt: skip
        # What the warpgroups have after registers moved: code of the consumers comes first, then the producer's.
        before, after = kernel.split("USETMAXREG.DEALLOC")
        most = [max(int(r) for r in re.findall(r"\bR(\d+)\b", code)) for code in (before, after)]
        assert most[0] < 240, most
        assert most[1] < 24, most


def _cuobjdump() -> str | None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else shutil.which("cuobjdump")
