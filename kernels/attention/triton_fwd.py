"""Forward of gated attention in Triton: one pass over the visible tiles of keys per tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton.primitives import (
    gate_base,
    gate_weight,
    load_row,
    reach,
    row_bounds,
    seen_by_all,
    seen_by_any,
    sees,
    tile_range,
    to_natural,
)


@triton.jit
def forward_kernel(
    Q, K, V, A, B, BOUNDS, KEY_COUNT, KEY_MAX, OUT, LSE, STATS,
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
        first, sink_tiles, steps = tile_range(start_min, end_max, sink_max, BLOCK_N)
    else:
        steps = tl.cdiv(count, BLOCK_N)

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

    for step in range(0, steps):
        tile = step
        if HAS_BOUNDS:
            tile = tl.where(step < sink_tiles, step, step - sink_tiles + first)
        n0 = tile * BLOCK_N
        inside_n = n0 + lane_n < count
        if HAS_BOUNDS:
            inside_n = inside_n & seen_by_any(n0 + lane_n, start_min, end_max, sink_max)
        if DESCRIPTORS:
            k = K.load([b, bh % heads, n0, 0]).reshape([BLOCK_N, BLOCK_D])
        else:
            inside_k = inside_n[:, None]
            if D != BLOCK_D:
                inside_k = inside_k & (offs_d < D)[None, :]
            k = tl.load(p_k + n0.to(tl.int64) * stride_kn, mask=inside_k, other=0.0)  # [BLOCK_N, BLOCK_D]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

        if GATE != 0:
            key_score = load_row(B + b64 * num_keys + n0, count - n0, BLOCK_N, THREADS)  # [BLOCK_N]
        # Only tiles on a boundary pay for a mask, and tiles with a score of 1, known beforehand: there a key may have
        # weight 0, and must not raise the maximum.
        partial = n0 + BLOCK_N > count
        if HAS_BOUNDS:
            partial = partial | (not seen_by_all(n0, start_max, end_min, sink_min, BLOCK_N))
        if MULTIPLY and RENORM:
            partial = partial | (tl.load(KEY_MAX + b * tl.cdiv(num_keys, BLOCK_N) + tile) >= 1.0)
        if partial:
            offs_n = n0 + lane_n
            if HAS_BOUNDS:
                column = offs_n[None, :]
                seen = sees(column, start[:, None], end[:, None], sink[:, None])
            else:
                seen = (offs_n < count)[None, :]
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
            log_sum = rescale * (log_sum + gated_total * moved) + tl.sum(tl.where(p > 0.0, p * exponent, 0.0), 1)
            gated_total = gated_total * rescale + mass
            squares = squares * (rescale * rescale) + tl.sum(p * p, 1)
        row_max = new_max

        acc = acc * rescale[:, None]
        if DESCRIPTORS:
            v = V.load([b, bh % heads, n0, 0]).reshape([BLOCK_N, BLOCK_DV])
        else:
            inside_v = inside_n[:, None]
            if DV != BLOCK_DV:
                inside_v = inside_v & (offs_dv < DV)[None, :]
            v = tl.load(p_v + n0.to(tl.int64) * stride_vn, mask=inside_v, other=0.0)  # [BLOCK_N, BLOCK_DV]
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
