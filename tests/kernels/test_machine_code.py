"""What the compiler makes of the Triton kernels on the hot path, for GPUs that are not here: bounds that may only fall.

Counts say nothing about time. They say when a change lets a rare branch, a repeated load or a serialised product back.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from helpers.sass import hot_path

from gate4d.kernels._triton.cubin import compile_launch, machine_code
from gate4d.kernels._triton.cubin_table import Variant, launches

BF16 = torch.bfloat16
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
PLAIN, PAIRWISE = Variant(), Variant("pairwise")
FORWARD, QUERY, KEY, RECEIVED = "forward_kernel", "grad_query_kernel", "grad_key_kernel", "received_kernel"


@cache
def code(capability: tuple[int, int], dim: int, variant: Variant, kernel: str) -> tuple[str, str]:
    (launch,) = launches(capability, BF16, dim, variant, (kernel,))
    return machine_code(launch, capability)


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
    assert hot_path(sass) == {"HGMMA": 1, "BRA": 3, "MUFU": 1}


# Instructions a thread and tile, of which a thread has `scores`: 128 x 128 and 128 x 64 over 256 threads.
@pytest.mark.parametrize(("dim", "variant", "scores", "most"), [
    (64, PLAIN, 64, 500), (64, PAIRWISE, 64, 680), (128, PLAIN, 32, 400), (128, PAIRWISE, 32, 500),
])  # fmt: skip
def test_forward_on_hopper(dim: int, variant: Variant, scores: int, most: int) -> None:
    counts = hot_path(code(HOPPER, dim, variant, FORWARD)[0])
    assert counts["HGMMA"] > 0
    assert counts["MUFU"] <= scores + 4  # one exponential a score, one a row
    assert counts["FSEL"] + counts["FSETP"] <= 16, counts  # masks stay in the rare branch
    assert counts["BAR"] <= 4
    assert counts.total() <= most, counts


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", [FORWARD, QUERY, KEY, RECEIVED])
def test_the_assembler_serialises_no_product(kernel: str, dim: int) -> None:
    sass, said = code(HOPPER, dim, PAIRWISE, kernel)
    assert "registers" in said  # it speaks
    assert not re.search("serializ", said), said
    assert "HGMMA" in sass


@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
@pytest.mark.parametrize(("kernel", "dim"), [(KEY, 64), (QUERY, 128), (FORWARD, 128)])
def test_rows_are_loaded_once_a_tile(capability: tuple[int, int], kernel: str, dim: int) -> None:
    """A row of lse, delta or scores, loaded element by element, would be one instruction for each of its columns."""
    (launch,) = launches(capability, BF16, dim, PAIRWISE, (kernel,))
    most = 16 if capability == AMPERE else 48  # newer tiles are larger, and so what fills the pipeline before the loop
    assert compile_launch(launch, capability).count("LDGSTS") <= most


def test_the_gradient_of_q_waits_seldom() -> None:
    for dim in (64, 128):
        assert hot_path(code(HOPPER, dim, PAIRWISE, QUERY)[0])["BAR"] <= 6
