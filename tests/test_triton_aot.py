"""Kernels compiled for architectures that are not present, and what the machine code must and must not contain.

A covering subset: every tile width and type, the variants that need the most registers, on three architectures.
``python -m gate4d.kernels.cubin_table`` compiles all of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from gate4d.kernels.attention import triton_configs
from gate4d.kernels.cubin import SHARED_LIMIT, Cubin, compile_launch
from gate4d.kernels.cubin_table import VARIANTS, Variant, launches

BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
PLAIN, PAIRWISE, KEYS, HALF_POWER, ANY_POWER, UNNORMALISED, STATS = VARIANTS
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


def compiled(capability: tuple[int, int], dtype: torch.dtype, dim: int, variant: Variant) -> list[Cubin]:
    return [compile_launch(x, capability) for x in launches(capability, dtype, dim, variant)]


CASES = [
    (HOPPER, BF16, 64, HALF_POWER),
    (HOPPER, HALF, 64, UNNORMALISED),
    (HOPPER, BF16, 48, ANY_POWER),
    (HOPPER, HALF, 72, HALF_POWER),
    (HOPPER, BF16, 80, UNNORMALISED),
    (HOPPER, BF16, 128, HALF_POWER),
    (HOPPER, BF16, 256, UNNORMALISED),
    (HOPPER, HALF, 64, STATS),
    (HOPPER, HALF, 128, STATS),
    (HOPPER, SINGLE, 64, KEYS),
    (HOPPER, SINGLE, 128, replace(KEYS, tf32=True)),
    (AMPERE, BF16, 64, UNNORMALISED),
    (AMPERE, HALF, 72, HALF_POWER),
    (AMPERE, BF16, 256, KEYS),
    (AMPERE, SINGLE, 96, ANY_POWER),
    (BLACKWELL, BF16, 32, KEYS),
    (BLACKWELL, HALF, 128, KEYS),
]


@pytest.mark.parametrize(("capability", "dtype", "dim", "variant"), CASES, ids=str)
def test_no_local_memory_and_within_limits(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, variant: Variant
) -> None:
    cubins = compiled(capability, dtype, dim, variant)
    assert len(cubins) == (1 if variant.row_stats else 4)
    for c in cubins:
        assert (c.stack, c.local, c.count("LDL"), c.count("STL")) == (0, 0, 0, 0), f"{c.kernel} spills: {c.stack} bytes"
        assert 0 < c.shared <= SHARED_LIMIT[capability], f"{c.kernel}: {c.shared} bytes of shared memory"
        assert c.registers <= 255
        assert c.count("MUFU.EX2") > 0
        # At 256, and with rows loaded element by element, the tiles of the last pass that Hopper's instruction needs
        # do not fit the registers.
        if dtype != SINGLE and not ((dim == 256 or dim % 16) and c.kernel == "grad_key_kernel"):
            matrix = {AMPERE: "HMMA", HOPPER: "HGMMA", BLACKWELL: "UTCHMMA"}[capability]
            assert c.count(matrix) > 0, f"{c.kernel} does not use {matrix}: {sorted(c.opcodes)}"


@pytest.mark.parametrize("dim", [64, 128])
def test_gate_costs_no_transcendental(dim: int) -> None:
    plain = compiled(HOPPER, BF16, dim, PLAIN)
    gated = compiled(HOPPER, BF16, dim, PAIRWISE)
    for without, with_gate in zip(plain, gated, strict=True):
        assert with_gate.count("MUFU.EX2") == without.count("MUFU.EX2") > 0, with_gate.kernel
        assert with_gate.count("MUFU.LG2") == without.count("MUFU.LG2"), with_gate.kernel
        assert with_gate.count("HGMMA") == without.count("HGMMA"), with_gate.kernel
    square = compiled(HOPPER, BF16, dim, replace(PAIRWISE, strength=2.0))
    assert [c.count("MUFU.EX2") for c in square] == [c.count("MUFU.EX2") for c in plain]


def test_a_gate_on_keys_is_loaded_once_a_tile() -> None:
    """A row of scores must not be loaded again by every thread for each of its columns."""
    plain, gated = (compiled(HOPPER, BF16, 64, v)[0] for v in (PLAIN, replace(KEYS, bounds=False)))
    assert gated.count("LDG") <= plain.count("LDG") + 12  # LDGSTS, the asynchronous load, included


@pytest.mark.parametrize("persistent", [False, True])
def test_descriptors_use_the_copy_engine(persistent: bool) -> None:
    base = triton_configs.config("forward", HOPPER, BF16, 64)
    with triton_configs.override("forward", base, descriptors=True, persistent=persistent, num_stages=2):
        (launch,) = launches(HOPPER, BF16, 64, PAIRWISE, ("forward_kernel",))
    c = compile_launch(launch, HOPPER)
    assert c.count("UTMALDG") > 0
    assert c.count("HGMMA") > 0
    assert c.stack == 0
