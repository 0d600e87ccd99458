"""Norm, RoPE-2D and the store into any memory in Triton, forward and backward.

Compiled and interpreted, not yet run on a GPU. A program holds a tile of tokens and walks over a few heads, so that the
sines and cosines of a token are computed once for all of them. A row is held as its four quarters: the two features
that turn together are the same element of two tiles, and no data moves between threads for the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.runtime import heads_last, launch

FORWARD_HEADS, BACKWARD_HEADS = 4, 16  # of a program: the backward writes one row of sums for all of its heads
_ELEMENTS = 1024  # of a quarter's tile; four warps hold 8 of them a thread


@triton.jit
def _sine_cosine(angle):
    """Sine and cosine of ``angle``, below 1e5 in magnitude.

    Multiples of pi / 2 are taken off in three exact parts; polynomials on [-pi/4, pi/4] follow. The library's functions
    bring a stack for huge angles.
    """
    quarters = tl.floor(angle * 0.636619772367581343 + 0.5)
    rest = tl.fma(quarters, -1.5703125, angle)
    rest = tl.fma(quarters, -4.837512969970703125e-4, rest)
    rest = tl.fma(quarters, -7.54978995489188216e-8, rest)
    square = rest * rest
    s = tl.fma(tl.fma(square, -1.9515295891e-4, 8.3321608736e-3), square, -1.6666654611e-1)
    s = tl.fma(s * square, rest, rest)
    c = tl.fma(tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3), square, 4.166664568298827e-2)
    c = tl.fma(c * square, square, tl.fma(square, -0.5, 1.0))
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    sine = tl.where(swapped, c, s)
    cosine = tl.where(swapped, s, c)
    sine = tl.where(quadrant >= 2, -sine, sine)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def _angles(POSITIONS, FREQUENCIES, b, n, inside, stride_pb, stride_pn, stride_pa, quarter,
            AXIS: tl.constexpr, QUARTER: tl.constexpr):  # fmt: skip
    """Sine and cosine ``[BLOCK_N, QUARTER]`` of one axis."""
    at = POSITIONS + b * stride_pb + n.to(tl.int64) * stride_pn + AXIS * stride_pa
    position = tl.load(at, mask=inside, other=0).to(tl.float32)  # [BLOCK_N]
    frequency = tl.load(FREQUENCIES + quarter, mask=quarter < QUARTER, other=0.0)
    return _sine_cosine(position[:, None] * frequency[None, :])


@triton.jit
def _load(at, stride_d, mask, QUARTER: tl.constexpr):
    """The four quarters ``[BLOCK_N, BLOCK_Q]`` of the rows that begin at ``at``, in fp32; 0 outside."""
    step = tl.full((), QUARTER, tl.int64) * stride_d
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + step, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(at + 2 * step, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(at + 3 * step, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def _store(at, stride_d, mask, a, b, c, d, QUARTER: tl.constexpr):
    step = tl.full((), QUARTER, tl.int64) * stride_d
    dtype = at.dtype.element_ty
    tl.store(at, a.to(dtype), mask=mask)
    tl.store(at + step, b.to(dtype), mask=mask)
    tl.store(at + 2 * step, c.to(dtype), mask=mask)
    tl.store(at + 3 * step, d.to(dtype), mask=mask)


@triton.jit
def _affine(P, quarter, QUARTER: tl.constexpr):
    """The four quarters ``[1, BLOCK_Q]`` of a weight or bias ``[D]``."""
    mask = quarter < QUARTER
    a = tl.load(P + quarter, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(P + QUARTER + quarter, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(P + 2 * QUARTER + quarter, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(P + 3 * QUARTER + quarter, mask=mask, other=0.0).to(tl.float32)
    return a[None, :], b[None, :], c[None, :], d[None, :]


@triton.jit
def _row_mean(a, b, c, d, QUARTER: tl.constexpr):
    """Mean of each row ``[BLOCK_N, 1]``; features past the row are 0."""
    return tl.sum(a + b + c + d, 1)[:, None] / (4 * QUARTER)


@triton.jit
def _normalized(a, b, c, d, mask, eps, QUARTER: tl.constexpr):
    """``(x - mean) / std`` and ``1 / std [BLOCK_N, 1]``."""
    mean = _row_mean(a, b, c, d, QUARTER)
    a = tl.where(mask, a - mean, 0.0)
    b = tl.where(mask, b - mean, 0.0)
    c = tl.where(mask, c - mean, 0.0)
    d = tl.where(mask, d - mean, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_row_mean(a * a, b * b, c * c, d * d, QUARTER) + eps))
    return a * rstd, b * rstd, c * rstd, d * rstd, rstd


@triton.jit
def _place(tiles, groups, BLOCK_N: tl.constexpr):
    """Batch item, first token and group of heads of this program; groups are next to each other, as heads are."""
    pid = tl.program_id(0)
    group = pid % groups
    tile = (pid // groups) % tiles
    return (pid // groups // tiles).to(tl.int64), tile * BLOCK_N, group.to(tl.int64)


@triton.jit
def norm_rope_forward_kernel(
    X, OUT, WEIGHT, BIAS, POSITIONS, FREQUENCIES,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_ob, stride_oh, stride_on, stride_od,
    stride_pb, stride_pn, stride_pa, heads, tokens, tiles, groups, eps,
    QUARTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid: (batch item, tile of tokens, group of HEADS heads), flattened."""
    batch, n0, group = _place(tiles, groups, BLOCK_N)
    n, quarter = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Q)
    inside = n < tokens
    mask = inside[:, None] & (quarter < QUARTER)[None, :]
    rows, features = n.to(tl.int64)[:, None], quarter.to(tl.int64)[None, :]
    x = X + batch * stride_xb + group * HEADS * stride_xh + rows * stride_xn + features * stride_xd
    out = OUT + batch * stride_ob + group * HEADS * stride_oh + rows * stride_on + features * stride_od
    if ROTATE:
        sin_y, cos_y = _angles(POSITIONS, FREQUENCIES, batch, n, inside, stride_pb, stride_pn, stride_pa, quarter, 0,
                               QUARTER)  # fmt: skip
        sin_x, cos_x = _angles(POSITIONS, FREQUENCIES, batch, n, inside, stride_pb, stride_pn, stride_pa, quarter, 1,
                               QUARTER)  # fmt: skip
    if HAS_WEIGHT:
        weight_a, weight_b, weight_c, weight_d = _affine(WEIGHT, quarter, QUARTER)
    if HAS_BIAS:
        bias_a, bias_b, bias_c, bias_d = _affine(BIAS, quarter, QUARTER)
    for _ in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        a, b, c, d = _load(x, stride_xd, mask, QUARTER)
        if NORM:
            a, b, c, d, _ = _normalized(a, b, c, d, mask, eps, QUARTER)
        if HAS_WEIGHT:
            a, b, c, d = a * weight_a, b * weight_b, c * weight_c, d * weight_d
        if HAS_BIAS:
            a, b, c, d = a + bias_a, b + bias_b, c + bias_c, d + bias_d
        if ROTATE:
            a, b = a * cos_y - b * sin_y, b * cos_y + a * sin_y
            c, d = c * cos_x - d * sin_x, d * cos_x + c * sin_x
        _store(out, stride_od, mask, a, b, c, d, QUARTER)
        x += stride_xh
        out += stride_oh


@triton.jit
def norm_rope_backward_kernel(
    GRAD_OUT, X, GRAD_X, SUMS, WEIGHT, POSITIONS, FREQUENCIES,
    stride_gb, stride_gh, stride_gn, stride_gd, stride_xb, stride_xh, stride_xn, stride_xd,
    stride_yb, stride_yh, stride_yn, stride_yd,
    stride_pb, stride_pn, stride_pa, heads, tokens, tiles, groups, eps,
    QUARTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr, AFFINE_GRADS: tl.constexpr,
):  # fmt: skip
    """Grid as of the forward. A program writes one row of SUMS, fp32 ``[programs, 2, D]``: the gradients of weight and
    bias over its rows, so that no atomics are needed and the result is the same every time."""
    batch, n0, group = _place(tiles, groups, BLOCK_N)
    n, quarter = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Q)
    inside = n < tokens
    mask = inside[:, None] & (quarter < QUARTER)[None, :]
    rows, features = n.to(tl.int64)[:, None], quarter.to(tl.int64)[None, :]
    grad_out = GRAD_OUT + batch * stride_gb + group * HEADS * stride_gh + rows * stride_gn + features * stride_gd
    x = X + batch * stride_xb + group * HEADS * stride_xh + rows * stride_xn + features * stride_xd
    grad_x = GRAD_X + batch * stride_yb + group * HEADS * stride_yh + rows * stride_yn + features * stride_yd
    if ROTATE:
        sin_y, cos_y = _angles(POSITIONS, FREQUENCIES, batch, n, inside, stride_pb, stride_pn, stride_pa, quarter, 0,
                               QUARTER)  # fmt: skip
        sin_x, cos_x = _angles(POSITIONS, FREQUENCIES, batch, n, inside, stride_pb, stride_pn, stride_pa, quarter, 1,
                               QUARTER)  # fmt: skip
    if HAS_WEIGHT:
        weight_a, weight_b, weight_c, weight_d = _affine(WEIGHT, quarter, QUARTER)
    if AFFINE_GRADS:
        of_weight_a = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
        of_weight_b, of_weight_c, of_weight_d = of_weight_a, of_weight_a, of_weight_a
        of_bias_a, of_bias_b, of_bias_c, of_bias_d = of_weight_a, of_weight_a, of_weight_a, of_weight_a
    for _ in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        a, b, c, d = _load(grad_out, stride_gd, mask, QUARTER)
        if ROTATE:  # the other way round
            a, b = a * cos_y + b * sin_y, b * cos_y - a * sin_y
            c, d = c * cos_x + d * sin_x, d * cos_x - c * sin_x
        if NORM:
            na, nb, nc, nd = _load(x, stride_xd, mask, QUARTER)
            na, nb, nc, nd, rstd = _normalized(na, nb, nc, nd, mask, eps, QUARTER)
            if AFFINE_GRADS:
                of_weight_a += a * na
                of_weight_b += b * nb
                of_weight_c += c * nc
                of_weight_d += d * nd
                of_bias_a += a
                of_bias_b += b
                of_bias_c += c
                of_bias_d += d
            if HAS_WEIGHT:
                a, b, c, d = a * weight_a, b * weight_b, c * weight_c, d * weight_d
            mean = _row_mean(a, b, c, d, QUARTER)
            along = _row_mean(a * na, b * nb, c * nc, d * nd, QUARTER)
            a = rstd * (a - mean - na * along)
            b = rstd * (b - mean - nb * along)
            c = rstd * (c - mean - nc * along)
            d = rstd * (d - mean - nd * along)
        _store(grad_x, stride_yd, mask, a, b, c, d, QUARTER)
        grad_out += stride_gh
        x += stride_xh
        grad_x += stride_yh
    if AFFINE_GRADS:
        sums = SUMS + tl.program_id(0).to(tl.int64) * (8 * QUARTER) + quarter
        keep = quarter < QUARTER
        tl.store(sums, tl.sum(of_weight_a, 0), mask=keep)
        tl.store(sums + QUARTER, tl.sum(of_weight_b, 0), mask=keep)
        tl.store(sums + 2 * QUARTER, tl.sum(of_weight_c, 0), mask=keep)
        tl.store(sums + 3 * QUARTER, tl.sum(of_weight_d, 0), mask=keep)
        tl.store(sums + 4 * QUARTER, tl.sum(of_bias_a, 0), mask=keep)
        tl.store(sums + 5 * QUARTER, tl.sum(of_bias_b, 0), mask=keep)
        tl.store(sums + 6 * QUARTER, tl.sum(of_bias_c, 0), mask=keep)
        tl.store(sums + 7 * QUARTER, tl.sum(of_bias_d, 0), mask=keep)


def forward(
    x: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, N, D]
    weight: Tensor | None,  # [D], contiguous
    bias: Tensor | None,  # [D], contiguous
    positions: Tensor | None,  # [1 or B, N, 2] int32 or int64
    frequencies: Tensor | None,  # [D / 4] fp32
    norm: bool,
    eps: float,
) -> None:
    """``gate4d::norm_rope_forward``: x and out of any strides, weight and bias of any floating dtype."""
    grid, shared = _shared(x, weight, positions, frequencies, norm, eps, FORWARD_HEADS)
    args = {
        "X": x, "OUT": out, "BIAS": bias, **_strides("x", x), **_strides("o", out), "HAS_BIAS": bias is not None,
        **shared,
    }  # fmt: skip
    launch(norm_rope_forward_kernel, grid, args, num_warps=4)


def backward(
    grad_out: Tensor,  # [B, H, N, D]
    x: Tensor,  # [B, H, N, D]
    weight: Tensor | None,  # [D], contiguous
    positions: Tensor | None,  # [1 or B, N, 2] int32 or int64
    frequencies: Tensor | None,  # [D / 4] fp32
    norm: bool,
    eps: float,
    affine_grads: bool,
) -> tuple[Tensor, Tensor]:
    """``gate4d::norm_rope_backward``: the gradient of x, and of weight and bias fp32 ``[2, D]`` (or ``[0, D]``)."""
    grad_x = heads_last(x, *x.shape)
    grid, shared = _shared(
        x, weight, positions, frequencies, norm, eps, BACKWARD_HEADS if affine_grads else FORWARD_HEADS
    )
    sums = x.new_empty(grid[0] if affine_grads else 0, 2, x.shape[3], dtype=torch.float32)
    args = {
        "GRAD_OUT": grad_out, "X": x, "GRAD_X": grad_x, "SUMS": sums, **_strides("g", grad_out), **_strides("x", x),
        **_strides("y", grad_x), "AFFINE_GRADS": affine_grads, **shared,
    }  # fmt: skip
    launch(norm_rope_backward_kernel, grid, args, num_warps=4)
    return grad_x, sums.sum(0) if affine_grads else sums.flatten(0, 1)


def _shared(x, weight, positions, frequencies, norm, eps, heads_of_a_program) -> tuple[tuple[int], dict]:
    """The grid, and the arguments that both kernels have."""
    batch, heads, tokens, dim = x.shape
    quarter = dim // 4
    block_q = triton.next_power_of_2(quarter)
    block_n = max(1, _ELEMENTS // max(16, block_q))
    tiles, groups = triton.cdiv(tokens, block_n), triton.cdiv(heads, heads_of_a_program)
    at = (0, 0, 0) if positions is None else positions.stride()
    return (batch * tiles * groups,), {
        "WEIGHT": weight, "POSITIONS": positions, "FREQUENCIES": frequencies,
        "stride_pb": 0 if positions is None or len(positions) == 1 else at[0], "stride_pn": at[1], "stride_pa": at[2],
        "heads": heads, "tokens": tokens, "tiles": tiles, "groups": groups, "eps": eps,
        "QUARTER": quarter, "BLOCK_Q": block_q, "BLOCK_N": block_n, "HEADS": heads_of_a_program,
        "NORM": norm, "HAS_WEIGHT": weight is not None, "ROTATE": positions is not None,
    }  # fmt: skip


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhnd")}
