"""The Triton kernel of norm + RoPE-2D compiled for GPUs that are not present, and what its machine code must be."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from gate4d.kernels._triton.cubin import SHARED_LIMIT, compile_launch
from gate4d.kernels._triton.cubin_table import NORM_ROPE, VARIANTS, launches
from gate4d.kernels._triton.runtime import AMD, record
from gate4d.kernels.norm_rope import triton as kernels

BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        ((8, 0), BF16, 64),
        ((8, 0), SINGLE, 256),
        ((9, 0), BF16, 64),
        ((9, 0), HALF, 48),
        ((9, 0), SINGLE, 128),
        ((10, 0), BF16, 128),
        ((12, 0), HALF, 80),
    ],
    ids=str,
)
def test_no_local_memory_and_whole_loads(capability, dtype, dim) -> None:
    forward, backward = (
        compile_launch(x, capability) for x in launches(capability, dtype, dim, VARIANTS[0], NORM_ROPE)
    )
    for c in (forward, backward):
        assert (c.stack, c.local, c.count("LDL"), c.count("STL")) == (0, 0, 0, 0), c.kernel
        assert c.registers <= 255
        assert c.shared <= 4096
    if dim % 16 == 0 and dim & (dim - 1) == 0:  # packed keys in, heads last out: 16 bytes a lane
        assert forward.count("LDG.E.128") > 0
        assert forward.count("STG.E.128") == sum(n for op, n in forward.opcodes.items() if op.startswith("STG"))
        assert forward.count("BAR") == 0  # a row stays inside a warp


@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (HALF, 48), (SINGLE, 256)], ids=str)
def test_compiles_for_amd(dtype, dim) -> None:
    for launch in launches(AMD, dtype, dim, VARIANTS[0], NORM_ROPE):
        c = compile_launch(launch, AMD)
        assert c.spills == 0, c
        assert c.shared <= SHARED_LIMIT[AMD], c


def test_launch_arithmetic_of_huge_calls() -> None:
    """The grid has one dimension, whose limit is 2**31 - 1; offsets are made in 64 bits inside."""
    x = torch.empty(70_000, 32, 1041, 64, dtype=BF16, device="meta")
    positions, frequencies = torch.empty(1, 1041, 2, dtype=torch.int64, device="meta"), torch.empty(16, device="meta")
    with record((9, 0)) as recording:
        kernels.forward(x, torch.empty_like(x), None, None, positions, frequencies, True, 1e-5)
        kernels.backward(x, x, None, positions, frequencies, True, 1e-5, False)
    for launch in recording.launches:
        (programs,) = launch.grid
        assert programs == 70_000 * 17 * 8 < 2**31
        assert programs * launch.args["HEADS"] * launch.args["BLOCK_N"] >= 70_000 * 32 * 1041
