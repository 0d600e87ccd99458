"""Attention received in Triton: mean and squared deviation of every key's probabilities, one pass given lse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._operands import check_attention, expect
from .._triton.configurations import config
from .._triton.primitives import (
    gate_base,
    load_row,
    load_tile,
    merge_moments,
    probability,
    query_tiles,
    row_lse,
    seen_by_all,
    sees,
)
from .._triton.problem import problem, query_reach
from .._triton.runtime import block_dim, capability, launch, strides


@triton.jit
def received_kernel(
    Q, K, LSE, A, B, BOUNDS, REACH, MEAN, M2,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    bounds_stride_b, reach_stride_b, heads, num_queries, num_keys, exponent_scale, strength,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
    GATE: tl.constexpr, POWER: tl.constexpr, HAS_BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """Grid: (tile of keys, batch, head), flattened."""
    pid = tl.program_id(0)
    key_tiles = tl.cdiv(num_keys, BLOCK_N)
    bh, n0 = pid // key_tiles, (pid % key_tiles) * BLOCK_N
    b, h = bh // heads, (bh % heads).to(tl.int64)
    b64 = b.to(tl.int64)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = n0 + lane_n
    inside_d = (offs_d < D)[None, :]
    inside_n = offs_n < num_keys
    p_k = K + b64 * stride_kb + h * stride_kh + n0.to(tl.int64) * stride_kn
    p_k += lane_n[:, None] * stride_kn + offs_d[None, :]
    k = tl.load(p_k, mask=inside_n[:, None] & inside_d, other=0.0)  # [BLOCK_N, BLOCK_D]
    if GATE != 0:
        key_score = tl.load(B + b64 * num_keys + offs_n, mask=inside_n, other=0.0)

    tiles = tl.cdiv(num_queries, BLOCK_M)
    first = 0
    last = tiles
    if HAS_BOUNDS:
        p_reach = REACH + b64 * reach_stride_b
        first, last = query_tiles(p_reach, n0, tiles, BLOCK_N, 128)

    count = 0.0
    mean = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)
    p_q = Q + b64 * stride_qb + h * stride_qh + lane_m[:, None] * stride_qn + offs_d[None, :]
    p_row = bh.to(tl.int64) * num_queries
    # Only the last tile of queries can have rows past the end: by itself it leaves the others without a mask of them.
    whole = tl.minimum(last, num_queries // BLOCK_M)
    for END in tl.static_range(2):
        if END:
            start_tile, end_tile = tl.maximum(first, whole), last
        else:
            start_tile, end_tile = first, whole
        if start_tile < end_tile:  # see forward_kernel
            for tile in range(start_tile, end_tile):
                m0 = tile * BLOCK_M
                left = num_queries - m0 if END else BLOCK_M
                inside_m = lane_m < left
                q = load_tile(
                    p_q + m0.to(tl.int64) * stride_qn, inside_m, offs_d, D, BLOCK_D, END
                )  # [BLOCK_M, BLOCK_D]
                lse = row_lse(load_row(LSE + p_row + m0, left, BLOCK_M, THREADS), NATURAL)
                x = (
                    tl.dot(k, tl.trans(q), input_precision=PRECISION) * exponent_scale - lse[None, :]
                )  # [BLOCK_N, BLOCK_M]
                if HAS_BOUNDS:
                    start_max = tl.load(p_reach + 3 * tiles + tile)
                    end_min = tl.load(p_reach + 4 * tiles + tile)
                    sink_min = tl.load(p_reach + 5 * tiles + tile)
                    if END or not seen_by_all(n0, start_max, end_min, sink_min, BLOCK_N):
                        p_bounds = BOUNDS + b64 * bounds_stride_b + m0
                        start = load_row(p_bounds, left, BLOCK_M, THREADS)[None, :]
                        end = load_row(p_bounds + num_queries, left, BLOCK_M, THREADS)[None, :]
                        sink = load_row(p_bounds + 2 * num_queries, left, BLOCK_M, THREADS)[None, :]
                        seen = inside_m[None, :] & sees(offs_n[:, None], start, end, sink)
                        x = tl.where(seen, x, -float("inf"))
                elif END:
                    x = tl.where(inside_m[None, :], x, -float("inf"))
                if GATE == 2:
                    a = load_row(A + b64 * num_queries + m0, left, BLOCK_M, THREADS)
                else:
                    a = 0.0
                if GATE != 0:
                    base = gate_base(a, key_score, GATE, True)
                else:
                    base = 1.0
                p, _ = probability(x, base, strength, GATE, POWER, True, NATURAL)  # [BLOCK_N, BLOCK_M]
                count, mean, m2 = merge_moments(count, mean, m2, p, left, lane_m, BLOCK_M)
    # The queries of the tiles that were skipped count with probability 0.
    everyone = num_queries * 1.0
    m2 += mean * mean * (count * (everyone - count) / everyone)
    mean = mean * (count / everyone)
    out = bh.to(tl.int64) * num_keys + offs_n
    tl.store(MEAN + out, mean, mask=inside_n)
    tl.store(M2 + out, m2, mask=inside_n)


def received_attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    lse: Tensor,  # [B, H, Nq]
    query_score: Tensor | None,  # [B, Nq]
    key_score: Tensor | None,  # [B, Nk]
    bounds: Tensor | None,  # [1 or B, 3, Nq] int32
    scale: float,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """``gate4d::received_attention``: mean and sum of squared deviations over all queries, fp32 ``[B, H, Nk]``."""
    check_attention(q, k, None, query_score, key_score, None, bounds, scale, strength)
    expect("lse", lse, torch.float32, q.shape[:3], q.device)
    batch, heads, num_queries, dim = q.shape
    mean = q.new_empty(batch, heads, k.shape[2], dtype=torch.float32)
    m2 = torch.empty_like(mean)
    if num_queries == 0:
        return mean.zero_(), m2.zero_()
    p = problem(q, k, query_score, key_score, bounds, scale, strength, True)
    c = config("received", capability(q.device), q.dtype, block_dim(dim), features=p.features)
    reach = query_reach(p, c.block_m)
    shared = {name: value for name, value in p.shared.items() if name not in ("KEY_COUNT", "HAS_COUNT", "RENORM")}
    args = {
        "Q": p.q, "K": p.k, "LSE": lse.float().contiguous(), "REACH": reach, "MEAN": mean, "M2": m2,
        **strides("q", p.q), **strides("k", p.k),
        "reach_stride_b": 0 if reach is None or reach.shape[0] == 1 else reach.stride(0),
        "D": dim, "BLOCK_D": block_dim(dim), "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "THREADS": 32 * c.num_warps,
        **shared,
    }  # fmt: skip
    launch(received_kernel, (triton.cdiv(k.shape[2], c.block_n) * batch * heads,), args, **c.options)
    return mean, m2
