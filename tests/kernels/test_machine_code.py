"""What the compiler makes of the Triton kernels on the hot path, for GPUs that are not here: bounds that may only fall.

Counts say nothing about time. They say when a change lets a mask, a repeated load or a serialised product back. A
bound is what was counted with Triton 3.6 or 3.8, whichever is more, and 1 to 4 % for the next.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from gate4d.kernels._triton.configurations import Config, override
from gate4d.kernels._triton.cubin import SHARED_LIMIT, Cubin, compile_launch
from gate4d.kernels._triton.cubin_table import MAIN, VARIANTS, Variant, launches
from gate4d.kernels._triton.hot_path import hot_path
from gate4d.kernels._triton.runtime import AMD

BF16 = torch.bfloat16
PLAIN, PAIRWISE, KEYS, HALF_POWER, ANY_POWER, UNNORMALISED, STATS, BOUNDED, DROPPED = VARIANTS
FORWARD, QUERY, KEY, RECEIVED, _ = MAIN
AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


@cache
def compiled(capability: tuple[int, int], dim: int, variant: Variant, kernel: str) -> Cubin:
    (launch,) = launches(capability, BF16, dim, variant, (kernel,))
    return compile_launch(launch, capability)


def hot(c: Cubin, *opcodes: str) -> int:
    """Instructions of the hot path whose opcode starts with one of these."""
    return sum(n for op, n in c.hot.items() if op.startswith(opcodes))


# Hot instructions for the tile that is selected, asynchronous loads of the whole kernel.
@pytest.mark.parametrize(
    ("capability", "dim", "variant", "kernel", "instructions", "loads"),
    [
        (HOPPER, 64, PLAIN, FORWARD, 475, 48),  # 128 x 128
        (HOPPER, 64, PAIRWISE, FORWARD, 650, 56),
        (HOPPER, 64, KEYS, FORWARD, 645, 56),
        (HOPPER, 128, PLAIN, FORWARD, 365, 48),  # 128 x 64
        (HOPPER, 128, PAIRWISE, FORWARD, 455, 56),
        (HOPPER, 64, STATS, FORWARD, 900, 14),  # 128 x 32
        (HOPPER, 64, PAIRWISE, QUERY, 515, 10),  # 128 x 64
        (HOPPER, 64, PAIRWISE, KEY, 371, 10),  # 32 x 128
        (HOPPER, 64, KEYS, KEY, 413, 14),
        (HOPPER, 64, PAIRWISE, RECEIVED, 450, 8),  # 64 x 128
        (HOPPER, 128, KEYS, RECEIVED, 375, 16),  # 64 x 64
        (AMPERE, 64, PAIRWISE, FORWARD, 457, 30),  # 128 x 64
        (CONSUMER, 128, PAIRWISE, FORWARD, 370, 20),  # 128 x 32
        (ADA, 64, PAIRWISE, QUERY, 347, 6),  # 128 x 32
    ],
    ids=str,
)
def test_hot_path(capability, dim, variant, kernel, instructions, loads) -> None:
    c = compiled(capability, dim, variant, kernel)
    assert not c.serialized, "the assembler waits for every matrix product"
    assert c.spills == 0
    assert 0 < c.hot_instructions <= instructions, c.hot
    assert c.count("LDGSTS") <= loads, "a row of scores is loaded once a column"
    tile = launches(capability, BF16, dim, variant, (kernel,))[0].args
    scores = tile["BLOCK_M"] * tile["BLOCK_N"] // tile["THREADS"]
    assert scores <= hot(c, "MUFU") <= scores + 4 or variant == STATS
    if kernel == RECEIVED:  # a row of lse is looked at once a column, which is less than once a score
        assert hot(c, "FSEL") < scores
    if kernel == FORWARD:  # no mask: a select a score would be there with one; the two are the rows' maxima
        assert variant == STATS or hot(c, "FSEL") <= 4
        assert hot(c, "BAR") <= 3


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", [HALF_POWER, UNNORMALISED, STATS], ids=str)
def test_no_product_is_serialized(dim: int, variant: Variant) -> None:
    """C7515: where the loop over full tiles may be left out, its zeros must not meet a product under way."""
    for kernel in (FORWARD,) if variant.row_stats else (FORWARD, QUERY, KEY):
        c = compiled(HOPPER, dim, variant, kernel)
        assert c.count("HGMMA") > 0, kernel
        assert not c.serialized, kernel


def test_ampere_keeps_probabilities_in_registers() -> None:
    """A warp holds whole rows: they are an operand of the second product without a way through shared memory."""
    for capability in (AMPERE, CONSUMER):
        for dim in (64, 128):
            c = compiled(capability, dim, PAIRWISE, FORWARD)
            assert hot(c, "STS") == 0, (capability, dim)
            assert hot(c, "BAR") <= 3, (capability, dim)


@pytest.mark.parametrize("kernel", [FORWARD, QUERY, KEY, RECEIVED])
def test_amd_fits(kernel: str) -> None:
    for dim in (64, 128):
        c = compiled(AMD, dim, replace(HALF_POWER, dropped=False), kernel)
        assert c.shared <= SHARED_LIMIT[AMD]
        assert c.spills == 0
        assert c.count("v_mfma") > 0


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", [FORWARD, QUERY, KEY, RECEIVED])
def test_the_assembler_serialises_no_product(kernel: str, dim: int) -> None:
    c = compiled(HOPPER, dim, PAIRWISE, kernel)
    assert not c.serialized
    assert c.count("HGMMA") > 0


def test_a_serialised_product_is_noticed() -> None:
    """These tiles have one: what the tests above rely on."""
    with override("grad_query", Config(64, 64, 8, 2)):
        assert compile_launch(*launches(HOPPER, BF16, 64, PAIRWISE, (QUERY,)), HOPPER).serialized


@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
@pytest.mark.parametrize(("kernel", "dim"), [(KEY, 64), (QUERY, 128), (FORWARD, 128)])
def test_rows_are_loaded_once_a_tile(capability: tuple[int, int], kernel: str, dim: int) -> None:
    """A row of lse, delta or scores, loaded element by element, would be one instruction for each of its columns."""
    loops = 2 if kernel == FORWARD else 1
    most = 16 if capability == AMPERE else 48  # newer tiles are larger, and so what fills the pipeline before the loop
    assert compiled(capability, dim, PAIRWISE, kernel).count("LDGSTS") <= loops * most


def test_the_gradient_of_q_waits_seldom() -> None:
    for dim in (64, 128):
        assert hot(compiled(HOPPER, dim, PAIRWISE, QUERY), "BAR") <= 6


def test_the_hot_path_leaves_out_rare_branches_and_follows_the_loop() -> None:
    sass = """
        /*0000*/ MOV R1, c[0x0];
        /*0010*/ HGMMA.64x64 R2;
        /*0020*/ @P0 BRA 0x50;
        /*0030*/ FSEL R3, R4;
        /*0040*/ FSEL R3, R4;
        /*0050*/ @!P1 BRA 0x70;
        /*0060*/ MUFU.EX2 R5, R6;
        /*0070*/ @P2 BRA 0x10;
        /*0080*/ EXIT;
    """
    assert [text.split()[0] for text in hot_path(sass)] == ["HGMMA.64x64", "@P0", "@!P1", "MUFU.EX2", "@P2"]


def _sass(*lines: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))


def test_hot_path_of_a_known_loop() -> None:
    """A rare branch is passed over, selects and the branch of an exponential are counted, a retried wait is no loop."""
    body = ["HMMA.16816.F32 R0", "@P0 BRA 0x80", "FSEL R1", "FSEL R2", "MUFU.EX2 R3"]
    filler = ["FADD R4"] * 70
    code = ["MOV R1, R2", "MOV R1, R2", "MOV R1, R2", *body, *filler, "@P1 BRA 0x30", "EXIT", "WAIT", "BRA 0x10"]
    # 0x30 HMMA, 0x40 BRA over 0x50 and 0x60 (FSEL) and MUFU at 0x70: not rare, since it passes an exponential
    path = hot_path(_sass(*code))
    assert path[0].startswith("HMMA")
    assert sum(x.startswith("FSEL") for x in path) == 2
    assert len(path) == len(body) + len(filler) + 1
    code[4] = "@P0 BRA 0x70"  # over the selects alone
    path = hot_path(_sass(*code))
    assert not any(x.startswith("FSEL") for x in path)
    assert len(path) == len(body) - 2 + len(filler) + 1
    assert hot_path(_sass("MOV R1, R2", "EXIT")) == []
