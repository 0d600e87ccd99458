"""Forward of gated attention in Triton: one pass over the visible tiles of keys per tile of queries.

First the tiles of which every query sees every key, without a mask or a branch, then those on a boundary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton.primitives import (
    boundary_tile,
    full_range,
    gate_base,
    gate_weight,
    load_row,
    load_tile,
    reach,
    row_bounds,
    seen_by_any,
    sees,
    tile_range,
    to_natural,
)


@triton.jit
def forward_kernel(
    Q, K, V, A, B, BOUNDS, KEY_COUNT, OUT, LSE, STATS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    bounds_stride_b, batch, heads, num_queries, num_keys, exponent_scale, strength,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATE: tl.constexpr, POWER: tl.constexpr, RENORM: tl.constexpr, P_SCALE: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_COUNT: tl.constexpr, ROW_STATS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr, THREADS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Output, lse and row statistics. Grid: (tile of queries, batch, head), flattened."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    FOLD: tl.constexpr = GATE != 0 and RENORM and POWER == 0  # the weight joins the exponent
    MULTIPLY: tl.constexpr = GATE != 0 and not FOLD
    # The least sum of weighted probabilities, of which the largest is 1 before its weight, that keeps all their digits.
    LEAST: tl.constexpr = 2.0**-6 if NATURAL or P_SCALE != 1 or ROW_STATS else 2.0**-24

    # 64-bit from here on: an offset in N x N or N x D passes 2**31 at a few dozen frames.
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_M)
    bh, m0 = pid // tiles, (pid % tiles) * BLOCK_M
    b = bh // heads
    h = (bh % heads).to(tl.int64)
    b64 = b.to(tl.int64)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_m = m0 + lane_m
    inside_m = offs_m < num_queries

    p_q = Q + b64 * stride_qb + h * stride_qh + m0.to(tl.int64) * stride_qn
    q = tl.load(
        p_q + lane_m[:, None] * stride_qn + offs_d[None, :],
        mask=inside_m[:, None] & (offs_d < D)[None, :], other=0.0,
    )  # [BLOCK_M, BLOCK_D]  # fmt: skip
    if GATE == 2:
        a = tl.load(A + b64 * num_queries + offs_m, mask=inside_m, other=0.0)
    else:
        a = 0.0

    if HAS_COUNT:
        count = tl.load(KEY_COUNT + b)
    else:
        count = num_keys
    if HAS_BOUNDS:
        start, end, sink = row_bounds(BOUNDS, b, offs_m, num_queries, count, bounds_stride_b)
        start_min, end_max, sink_max, start_max, end_min, sink_min = reach(start, end, sink, inside_m)
        first, last, sink_tiles = tile_range(start_min, end_max, sink_max, BLOCK_N)
        full_first, full_last, full_sinks = full_range(start_max, end_min, sink_min, first, last, sink_tiles, BLOCK_N)
    else:
        first, last, sink_tiles = 0, tl.cdiv(count, BLOCK_N), 0
        full_first, full_last, full_sinks = 0, count // BLOCK_N, 0

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)  # of the logits, in base 2 unless NATURAL
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if ROW_STATS:
        gated_total = tl.zeros([BLOCK_M], tl.float32)
        log_sum = tl.zeros([BLOCK_M], tl.float32)  # sum of p log2 p
        largest = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)

    if not DESCRIPTORS:
        p_k = K + b64 * stride_kb + h * stride_kh + lane_n[:, None] * stride_kn + offs_d[None, :]
        p_v = V + b64 * stride_vb + h * stride_vh + lane_n[:, None] * stride_vn + offs_dv[None, :]

    for BOUNDARY in tl.static_range(2):
        if BOUNDARY:
            if MULTIPLY and RENORM:
                # Keys of weight 0 raised the maximum above. Where that left too little of a row, start again with them
                # masked, as on a boundary.
                short = inside_m & (total < LEAST)
                if GATE == 2:
                    short = short & (a >= 1.0)
                again = tl.max(tl.where(short, 1, 0), 0) > 0
                full_last = tl.where(again, full_first, full_last)
                full_sinks = tl.where(again, 0, full_sinks)
                row_max = tl.where(again, -float("inf"), row_max)
                total = tl.where(again, 0.0, total)
                acc = tl.where(again, 0.0, acc)
                if ROW_STATS:
                    gated_total = tl.where(again, 0.0, gated_total)
                    log_sum = tl.where(again, 0.0, log_sum)
                    largest = tl.where(again, 0.0, largest)
                    squares = tl.where(again, 0.0, squares)
            steps = sink_tiles - full_sinks + last - first - (full_last - full_first)
        else:
            steps = full_sinks + full_last - full_first
        # Else a jump over the loop would write zeros where an asynchronous product may still write (C7515).
        if steps > 0:
            for step in range(0, steps):
                if BOUNDARY:
                    tile = boundary_tile(step, first, sink_tiles, full_first, full_last, full_sinks)
                elif HAS_BOUNDS:
                    tile = tl.where(step < full_sinks, step, step - full_sinks + full_first)
                else:
                    tile = step
                n0 = tile * BLOCK_N
                offs_n = n0 + lane_n
                if BOUNDARY:
                    inside_n = offs_n < count
                    if HAS_BOUNDS:
                        inside_n = inside_n & seen_by_any(offs_n, start_min, end_max, sink_max)
                else:
                    inside_n = True
                if DESCRIPTORS:
                    k = K.load([b, bh % heads, n0, 0]).reshape([BLOCK_N, BLOCK_D])
                else:
                    k = load_tile(p_k + n0.to(tl.int64) * stride_kn, inside_n, offs_d, D, BLOCK_D, BOUNDARY)
                qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

                if GATE != 0:
                    left = count - n0 if BOUNDARY else BLOCK_N
                    key_score = load_row(B + b64 * num_keys + n0, left, BLOCK_N, THREADS)  # [BLOCK_N]
                if BOUNDARY:
                    if HAS_BOUNDS:
                        seen = sees(offs_n[None, :], start[:, None], end[:, None], sink[:, None])
                    else:
                        seen = inside_n[None, :]
                    if MULTIPLY and RENORM:
                        seen = seen & ((gate_base(a, key_score, GATE, False) > 0.0) | (qk != qk))
                    qk = tl.where(seen, qk, -float("inf"))
                if GATE != 0:
                    base = gate_base(a, key_score, GATE, False)  # [BLOCK_M or 1, BLOCK_N]
                if MULTIPLY:
                    weight = gate_weight(base, strength, POWER)
                if FOLD:
                    bias = strength * tl.log2(base)
                    if NATURAL:
                        bias = bias * LN2
                    s = qk * exponent_scale + bias
                    new_max = tl.maximum(row_max, tl.max(s, 1))
                else:
                    new_max = tl.maximum(row_max, tl.max(qk, 1) * exponent_scale)
                offset = tl.where(new_max == -float("inf"), 0.0, new_max)
                if FOLD:
                    exponent = s - offset[:, None]
                else:
                    exponent = qk * exponent_scale - offset[:, None]
                moved = row_max - offset
                if NATURAL:
                    exponent = exponent * LOG2E
                    moved = moved * LOG2E
                p = tl.exp2(exponent)  # [BLOCK_M, BLOCK_N]
                rescale = tl.exp2(moved)
                if MULTIPLY and not RENORM:
                    total = total * rescale + tl.sum(p, 1)
                if MULTIPLY:
                    p = p * weight
                mass = tl.sum(p, 1)
                if RENORM or not MULTIPLY:
                    total = total * rescale + mass
                if ROW_STATS:
                    if MULTIPLY:
                        exponent += tl.log2(weight)
                        largest = tl.maximum(largest * rescale, tl.max(p, 1))
                    moved = tl.where(row_max == -float("inf"), 0.0, moved)
                    logs = tl.where(p > 0.0, p * exponent, 0.0)  # [BLOCK_M, BLOCK_N]
                    log_sum = rescale * (log_sum + gated_total * moved) + tl.sum(logs, 1)
                    gated_total = gated_total * rescale + mass
                    squares = squares * (rescale * rescale) + tl.sum(p * p, 1)
                row_max = new_max

                acc = acc * rescale[:, None]
                if DESCRIPTORS:
                    v = V.load([b, bh % heads, n0, 0]).reshape([BLOCK_N, BLOCK_DV])
                else:
                    v = load_tile(p_v + n0.to(tl.int64) * stride_vn, inside_n, offs_dv, DV, BLOCK_DV, BOUNDARY)
                if P_SCALE != 1:
                    p = p * P_SCALE
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    alive = total != 0.0  # also where it is NaN
    inverse = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    log_total = tl.log2(tl.where(alive, total, 1.0))
    offs_row = bh.to(tl.int64) * num_queries + offs_m
    if NATURAL:
        lse = row_max + log_total * LN2
    else:
        lse = to_natural(row_max + log_total)
    tl.store(LSE + offs_row, tl.where(alive, lse, -float("inf")), mask=inside_m)
    if ROW_STATS:
        if not MULTIPLY:
            largest = tl.where(alive, 1.0, 0.0)
        plane = tl.cast(batch * heads, tl.int64) * num_queries
        entropy = (gated_total * log_total - log_sum) * inverse * LN2
        tl.store(STATS + offs_row, entropy, mask=inside_m)
        tl.store(STATS + plane + offs_row, largest * inverse, mask=inside_m)
        tl.store(STATS + 2 * plane + offs_row, squares * inverse * inverse, mask=inside_m)
    out = acc * (inverse * (1.0 / P_SCALE))[:, None]
    p_o = OUT + b64 * stride_ob + h * stride_oh + m0.to(tl.int64) * stride_on
    tl.store(
        p_o + lane_m[:, None] * stride_on + offs_dv[None, :],
        out.to(OUT.dtype.element_ty), mask=inside_m[:, None] & (offs_dv < DV)[None, :],
    )  # fmt: skip
