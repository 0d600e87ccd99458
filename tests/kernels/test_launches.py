"""What the launchers would launch, on tensors without memory: grids, AMD's tiles, the precision of products."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from gate4d.kernels._triton.cubin import SHARED_LIMIT, compile_launch
from gate4d.kernels._triton.cubin_table import DTYPES, HEAD_DIMS, MAIN, VARIANTS, launches
from gate4d.kernels._triton.runtime import AMD, LARGEST_GRID, dot_precision, launch, record
from gate4d.kernels.attention.triton_launch import backward, forward
from gate4d.kernels.cross_moments.triton import cross_moments
from gate4d.kernels.received_attention.triton import received_attention

BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
PLAIN, PAIRWISE, KEYS, HALF_POWER, ANY_POWER, UNNORMALISED, STATS, BOUNDED, DROPPED = VARIANTS


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(70_000, 2, 111), (1, 2, 9_000_000), (2, 70_000, 100)])
def test_grids_of_huge_calls(batch: int, heads: int, tokens: int) -> None:
    """vmap folds into the batch, which the second dimension of a grid (65,535) need not hold."""
    q = torch.empty(batch, heads, tokens, 64, dtype=BF16, device="meta")
    scores = torch.empty(2, batch, tokens, device="meta").unbind(0)
    bounds = torch.empty(batch, 3, tokens, dtype=torch.int32, device="meta")
    with record((9, 0)) as recording:
        gate = (*scores, None, bounds, 0.125, 1.0, True)
        out, lse, _ = forward(q, q, q, *gate, False)
        backward(out, lse, q, q, q, out, lse, *gate, True)
        received_attention(q, q, lse, *scores, bounds, 0.125, 1.0)
        columns = torch.empty(batch, tokens, heads * 64, device="meta")
        cross_moments([q], columns, columns[:, 0])
    assert {x.kernel.__name__ for x in recording.launches} >= {*MAIN, "reach_kernel", "delta_kernel"}
    for x in recording.launches:
        assert all(0 < n <= most for n, most in zip(x.grid, LARGEST_GRID, strict=False)), (x.kernel.__name__, x.grid)


def test_a_grid_that_is_too_large_is_an_error() -> None:
    def kernel() -> None: ...

    with pytest.raises(ValueError, match=r"the grid \(1, 65536\) of kernel is larger than \(2147483647, 65535\)"):
        launch(kernel, (1, 65536), {})


def test_amd_gets_no_option_of_nvidia() -> None:
    """Every type, head dimension and pass has a tile, and Triton's AMD backend knows every option."""
    for dtype, dim, variant in product(DTYPES, HEAD_DIMS, (PLAIN, HALF_POWER, STATS)):
        for x in launches(AMD, dtype, dim, variant):
            assert x.options.keys() <= {"num_warps", "num_stages"}, x.kernel.__name__


@pytest.mark.parametrize(
    ("dtype", "dim", "variant", "kernel"),
    [
        (BF16, 64, HALF_POWER, MAIN[0]),
        (BF16, 128, STATS, MAIN[0]),
        (HALF, 256, HALF_POWER, MAIN[1]),
        (BF16, 256, HALF_POWER, MAIN[2]),
        (SINGLE, 256, HALF_POWER, MAIN[3]),
        (HALF, 64, PLAIN, MAIN[4]),
    ],
    ids=str,
)
def test_amd_has_64_kib_of_shared_memory(dtype, dim, variant, kernel) -> None:
    (x,) = launches(AMD, dtype, dim, variant, (kernel,))
    c = compile_launch(x, AMD)
    assert c.shared <= SHARED_LIMIT[AMD], c
    assert c.spills == 0, c


@pytest.mark.parametrize("way", ["fp32_precision", "allow_tf32"])
def test_tf32_by_either_setting(way: str) -> None:
    """torch refuses to read the older setting after the newer was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for on, value in ((True, "tf32"), (False, "ieee")):
            setattr(matmul, way, value if way == "fp32_precision" else on)
            assert dot_precision(SINGLE) == value
            assert dot_precision(BF16) == "ieee"
    finally:
        matmul.fp32_precision = before
