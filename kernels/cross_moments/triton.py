"""Cross moments in Triton: a tile of products at a time, of which only a mean and a sum of squares a row remain.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._operands import expect
from .._triton.configurations import config
from .._triton.primitives import merge_moments
from .._triton.runtime import capability, dot_precision, launch, processors

_LARGEST_HALF = 2.0**14  # magnitude that half-precision columns are brought to: far from both ends of their range


@triton.jit
def cross_kernel(
    X, Y, LOW, CENTRE, MEAN, M2,
    batch, num_rows, num_columns, features, columns_per_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tile of rows, batch), flattened, and a part of the columns, a multiple of BLOCK_N each.

    Y is centred, and with SPLIT given as the sum of
    two 16-bit tensors; the products with CENTRE, the same in every column, join the mean at the end.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    b, m0 = (pid // row_tiles).to(tl.int64), (pid % row_tiles) * BLOCK_M
    lane_m, lane_n, lane_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_m = m0 + lane_m < num_rows
    first = part * columns_per_part
    last = tl.minimum(first + columns_per_part, num_columns)
    p_x = X + (b * num_rows + m0) * features + lane_m[:, None].to(tl.int64) * features + lane_k[None, :]
    offs_y = lane_n[:, None].to(tl.int64) * features + lane_k[None, :]

    count = 0.0
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(first, last, BLOCK_N):
        left = last - n0
        inside_n = lane_n < left
        p_y = (b * num_columns + n0) * features + offs_y
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, features, BLOCK_K):
            inside_k = (lane_k < features - k0)[None, :]
            x = tl.load(p_x + k0, mask=inside_m[:, None] & inside_k, other=0.0)  # [BLOCK_M, BLOCK_K]
            y = tl.load(Y + p_y + k0, mask=inside_n[:, None] & inside_k, other=0.0)  # [BLOCK_N, BLOCK_K]
            s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
            if SPLIT:
                low = tl.load(LOW + p_y + k0, mask=inside_n[:, None] & inside_k, other=0.0)
                s = tl.dot(x, tl.trans(low), s)
        count, mean, m2 = merge_moments(count, mean, m2, s, left, lane_n, BLOCK_N)

    offset = tl.zeros([BLOCK_M], tl.float32)
    for k0 in range(0, features, BLOCK_K):
        inside_k = lane_k < features - k0
        centre = tl.load(CENTRE + b * features + k0 + lane_k, mask=inside_k, other=0.0)
        x = tl.load(p_x + k0, mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        offset += tl.sum(x.to(tl.float32) * centre[None, :], 1)
    out = (part.to(tl.int64) * batch + b) * num_rows + m0 + lane_m
    tl.store(MEAN + out, mean + offset, mask=inside_m)
    tl.store(M2 + out, m2, mask=inside_m)


def cross_moments(
    x: Sequence[Tensor],  # [B, H, Nx, D] each
    y: Tensor,  # [B, Ny, F] fp32
    centre: Tensor,  # [B, F] fp32
) -> tuple[Tensor, Tensor]:
    """``gate4d::cross_moments``: mean and squared deviations over the rows of y of ``x_i . y_j``, fp32 ``[B, Nx]``.

    The features of x are those of its parts and of their heads one after another. Where x has 16 bits, centred y is
    the sum of two 16-bit tensors, so that matrix instructions lose nothing of x and 2**-17 of y at most.
    """
    if not x or y.dim() != 3 or y.shape[1] == 0:
        raise RuntimeError(f"gate4d: x must have a part and y rows [B, Ny, F], got {len(x)} parts and {list(y.shape)}.")
    for part in x:
        expect("each part of x", part, x[0].dtype, (len(y), None, x[0].shape[2], None), y.device)
    expect("y", y, torch.float32, (len(y), None, sum(part.shape[1] * part.shape[3] for part in x)), y.device)
    expect("centre", centre, torch.float32, (len(y), y.shape[2]), y.device)
    # A copy of x: its own heads lie apart, and every program reads its rows once for each tile of columns.
    rows = torch.cat([part.transpose(1, 2).flatten(2) for part in x], 2)  # [B, Nx, F]
    (batch, num_rows, features), num_columns = rows.shape, y.shape[1]
    if rows.dtype != y.dtype:
        high, low, unit = _split(y - centre[:, None], rows.dtype)
    else:
        high, low, unit = y - centre[:, None], None, None
    c = config("cross", capability(y.device), rows.dtype, 64)
    row_tiles, column_tiles = triton.cdiv(num_rows, c.block_m) * batch, triton.cdiv(num_columns, c.block_n)
    # A frame has few tiles of rows: columns are cut too, until every processor has two programs.
    wanted = min(column_tiles, max(1, triton.cdiv(2 * processors(y.device), max(1, row_tiles))))
    per_part = c.block_n * triton.cdiv(column_tiles, wanted)
    parts = triton.cdiv(num_columns, per_part)
    mean = y.new_empty(parts, batch, num_rows)
    m2 = torch.empty_like(mean)
    args = {
        "X": rows, "Y": high, "LOW": low, "CENTRE": centre.contiguous() if unit is None else centre / unit,
        "MEAN": mean, "M2": m2, "batch": batch,
        "num_rows": num_rows, "num_columns": num_columns, "features": features, "columns_per_part": per_part,
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": 32 if low is None else 64,
        "SPLIT": low is not None, "PRECISION": dot_precision(rows.dtype),
    }  # fmt: skip
    launch(cross_kernel, (row_tiles, parts), args, **c.options)
    if parts > 1:
        sizes = (num_columns - per_part * torch.arange(parts, device=y.device)).clamp(max=per_part)
        share = (sizes / num_columns)[:, None, None]
        total = (share * mean).sum(0)
        mean, m2 = total, m2.sum(0) + num_columns * (share * (mean - total).square()).sum(0)
    else:
        mean, m2 = mean[0], m2[0]
    return (mean, m2) if unit is None else (mean * unit, m2 * unit.square())


def _split(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``(high, low, unit)`` with ``y = unit * (high + low)``; ``unit [B, 1]`` is a power of two.

    A sum over frames may leave the range of fp16: the largest entry of a batch item becomes 2**14.
    """
    largest = y.abs().amax((1, 2)) if y.numel() else y.new_ones(len(y))
    exponent = torch.frexp(largest / _LARGEST_HALF).exponent.clamp(min=-126)  # no subnormal
    unit = torch.ldexp(torch.ones_like(largest), exponent)[:, None]  # [B, 1]
    y = y / unit[:, :, None]
    high = y.to(dtype)
    return high, (y - high.float()).to(dtype), unit
