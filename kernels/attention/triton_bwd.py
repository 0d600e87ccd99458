"""Backward of gated attention in Triton: two passes without atomics, so that gradients are reproducible bit by bit.

With ``D_i = sum_d dO_id O_id - dlse_i`` and ``dP_ij = dO_i . v_j``,

    dS_ij = p_ij (dP_ij - D_i)                    (renormalised)   or   p_ij dP_ij - e_ij D_i      (not renormalised)
    dw_ij = e_ij (dP_ij - D_i)                                     or   e_ij dP_ij

where ``e = exp(s - lse)`` and ``p = w e``; the score gradients follow from ``w = (1 - a b) ** strength``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton.primitives import (
    gate_base,
    load_row,
    probability,
    query_tiles,
    reach,
    row_bounds,
    row_lse,
    seen_by_all,
    seen_by_any,
    sees,
    tile_range,
)


@triton.jit
def delta_kernel(
    GRAD_OUT, OUT, GRAD_LSE, DELTA,
    stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on,
    heads, num_queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """``D_i``, fp32 ``[B, H, Nq]``."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_M)
    bh, m0 = pid // tiles, (pid % tiles) * BLOCK_M
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    inside = m0 + lane < num_queries
    mask = inside[:, None] & (offs_d < DV)[None, :]
    m64 = m0.to(tl.int64)
    p_g = GRAD_OUT + b * stride_gb + h * stride_gh + m64 * stride_gn + lane[:, None] * stride_gn + offs_d[None, :]
    p_o = OUT + b * stride_ob + h * stride_oh + m64 * stride_on + lane[:, None] * stride_on + offs_d[None, :]
    grad = tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    row = bh.to(tl.int64) * num_queries + m0 + lane
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + row, mask=inside, other=0.0)
    tl.store(DELTA + row, delta, mask=inside)


@triton.jit
def _grad_scores(p, e, dp, delta, GATE: tl.constexpr, RENORM: tl.constexpr):
    """Gradient of the logits."""
    if GATE == 0 or RENORM:
        return p * (dp - delta)
    return p * dp - e * delta


@triton.jit
def _grad_product(p, e, dp, delta, base, strength, POWER: tl.constexpr, RENORM: tl.constexpr):
    """Gradient of ``a_i b_j``. At a weight of 0 it is 0 unless the strength is 1."""
    if POWER == 2:
        slope = e
    else:
        positive = base > 0.0
        slope = tl.where(positive, strength * p / tl.where(positive, base, 1.0), 0.0)
    if RENORM:
        return slope * (delta - dp)
    return -slope * dp


@triton.jit
def grad_query_kernel(
    GRAD_OUT, Q, K, V, LSE, DELTA, A, B, BOUNDS, KEY_COUNT, GRAD_Q, GRAD_A,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_xb, stride_xh, stride_xn,
    bounds_stride_b, heads, num_queries, num_keys, scale, exponent_scale, strength,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATE: tl.constexpr, POWER: tl.constexpr, RENORM: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_COUNT: tl.constexpr, SCORE_GRADS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """``dQ`` and, per head, the gradient of the query scores. Grid: (tile of queries, batch, head), flattened."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_M)
    bh, m0 = pid // tiles, (pid % tiles) * BLOCK_M
    b, h = bh // heads, (bh % heads).to(tl.int64)
    b64, m64 = b.to(tl.int64), m0.to(tl.int64)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_m = m0 + lane_m
    inside_m = offs_m < num_queries
    inside_d, inside_dv = (offs_d < D)[None, :], (offs_dv < DV)[None, :]

    p_q = Q + b64 * stride_qb + h * stride_qh + m64 * stride_qn + lane_m[:, None] * stride_qn + offs_d[None, :]
    q = tl.load(p_q, mask=inside_m[:, None] & inside_d, other=0.0)  # [BLOCK_M, BLOCK_D]
    p_g = GRAD_OUT + b64 * stride_gb + h * stride_gh + m64 * stride_gn
    p_g += lane_m[:, None] * stride_gn + offs_dv[None, :]
    grad_out = tl.load(p_g, mask=inside_m[:, None] & inside_dv, other=0.0)  # [BLOCK_M, BLOCK_DV]
    row = bh.to(tl.int64) * num_queries + offs_m
    lse = row_lse(tl.load(LSE + row, mask=inside_m, other=0.0), NATURAL)
    delta = tl.load(DELTA + row, mask=inside_m, other=0.0)
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
        steps = sink_tiles + last - first
    else:
        steps = tl.cdiv(count, BLOCK_N)

    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_a = tl.zeros([BLOCK_M], tl.float32)
    p_k = K + b64 * stride_kb + h * stride_kh + lane_n[:, None] * stride_kn + offs_d[None, :]
    p_v = V + b64 * stride_vb + h * stride_vh + lane_n[:, None] * stride_vn + offs_dv[None, :]
    for step in range(0, steps):
        tile = step
        if HAS_BOUNDS:
            tile = tl.where(step < sink_tiles, step, step - sink_tiles + first)
        n0 = tile * BLOCK_N
        offs_n = n0 + lane_n
        inside_n = offs_n < count
        if HAS_BOUNDS:
            inside_n = inside_n & seen_by_any(offs_n, start_min, end_max, sink_max)
        inside_k, inside_v = inside_n[:, None] & inside_d, inside_n[:, None] & inside_dv
        k = tl.load(p_k + n0.to(tl.int64) * stride_kn, mask=inside_k, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(p_v + n0.to(tl.int64) * stride_vn, mask=inside_v, other=0.0)  # [BLOCK_N, BLOCK_DV]
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * exponent_scale - lse[:, None]  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        partial = n0 + BLOCK_N > count
        if HAS_BOUNDS:
            partial = partial | (not seen_by_all(n0, start_max, end_min, sink_min, BLOCK_N))
        if partial:
            if HAS_BOUNDS:
                column = offs_n[None, :]
                seen = sees(column, start[:, None], end[:, None], sink[:, None])
            else:
                seen = inside_n[None, :]
            x = tl.where(seen, x, -float("inf"))
        if GATE != 0:
            key_score = load_row(B + b64 * num_keys + n0, count - n0, BLOCK_N, THREADS)
            base = gate_base(a, key_score, GATE, False)
        else:
            base = 1.0
        p, e = probability(x, base, strength, GATE, POWER, RENORM, NATURAL)
        ds = _grad_scores(p, e, dp, delta[:, None], GATE, RENORM)  # [BLOCK_M, BLOCK_N]
        if GATE == 2 and SCORE_GRADS:
            grad_ab = _grad_product(p, e, dp, delta[:, None], base, strength, POWER, RENORM)
        if HAS_BOUNDS:
            if partial:  # 0 times a gradient that is not finite would reach the rows that do not see the key
                ds = tl.where(e == 0.0, 0.0, ds)
                if GATE == 2 and SCORE_GRADS:
                    grad_ab = tl.where(e == 0.0, 0.0, grad_ab)
        if GATE == 2 and SCORE_GRADS:
            grad_a += tl.sum(grad_ab * key_score[None, :], 1)
        grad_q = tl.dot(ds.to(k.dtype), k, grad_q, input_precision=PRECISION)

    p_x = GRAD_Q + b64 * stride_xb + h * stride_xh + m64 * stride_xn + lane_m[:, None] * stride_xn + offs_d[None, :]
    tl.store(p_x, (grad_q * scale).to(GRAD_Q.dtype.element_ty), mask=inside_m[:, None] & inside_d)
    if GATE == 2 and SCORE_GRADS:
        tl.store(GRAD_A + row, grad_a, mask=inside_m)


@triton.jit
def grad_key_kernel(
    GRAD_OUT, Q, K, V, LSE, DELTA, A, B, BOUNDS, REACH, KEY_COUNT, ORDER, GRAD_K, GRAD_V, GRAD_B,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    bounds_stride_b, reach_stride_b, heads, num_queries, num_keys, scale, exponent_scale, strength,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATE: tl.constexpr, POWER: tl.constexpr, RENORM: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_COUNT: tl.constexpr, SCORE_GRADS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """``dK``, ``dV`` and, per head, the gradient of the key scores. Grid: (tile of keys, batch, head), flattened.

    Score tiles are transposed, ``[BLOCK_N, BLOCK_M]``, so that both products into the accumulators take them as
    the left operand.
    """
    pid = tl.program_id(0)
    key_tiles = tl.cdiv(num_keys, BLOCK_N)
    bh, n0 = pid // key_tiles, (pid % key_tiles) * BLOCK_N
    b, h = bh // heads, (bh % heads).to(tl.int64)
    b64, n64 = b.to(tl.int64), n0.to(tl.int64)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = n0 + lane_n
    inside_d, inside_dv = (offs_d < D)[None, :], (offs_dv < DV)[None, :]
    if HAS_COUNT:
        count = tl.load(KEY_COUNT + b)
    else:
        count = num_keys
    inside_n = offs_n < count

    p_k = K + b64 * stride_kb + h * stride_kh + n64 * stride_kn + lane_n[:, None] * stride_kn + offs_d[None, :]
    p_v = V + b64 * stride_vb + h * stride_vh + n64 * stride_vn + lane_n[:, None] * stride_vn + offs_dv[None, :]
    k = tl.load(p_k, mask=inside_n[:, None] & inside_d, other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(p_v, mask=inside_n[:, None] & inside_dv, other=0.0)  # [BLOCK_N, BLOCK_DV]
    if GATE != 0:
        key_score = tl.load(B + b64 * num_keys + offs_n, mask=inside_n, other=0.0)

    tiles = tl.cdiv(num_queries, BLOCK_M)
    first, last = 0, tiles
    if HAS_BOUNDS:
        p_reach = REACH + b64 * reach_stride_b
        first, last = query_tiles(p_reach, n0, tiles, BLOCK_N, 128)
    if HAS_COUNT:
        last = tl.where(n0 < count, last, first)

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    grad_b = tl.zeros([BLOCK_N], tl.float32)
    p_q = Q + b64 * stride_qb + h * stride_qh + lane_m[:, None] * stride_qn + offs_d[None, :]
    p_g = GRAD_OUT + b64 * stride_gb + h * stride_gh + lane_m[:, None] * stride_gn + offs_dv[None, :]
    p_row = bh.to(tl.int64) * num_queries
    if first < last:  # else the assembler would wait for every product of the loop, see forward_kernel
        for tile in range(first, last):
            m0 = tile * BLOCK_M
            offs_m = m0 + lane_m
            inside_m = offs_m < num_queries
            inside_q, inside_g = inside_m[:, None] & inside_d, inside_m[:, None] & inside_dv
            q = tl.load(p_q + m0.to(tl.int64) * stride_qn, mask=inside_q, other=0.0)  # [BLOCK_M, BLOCK_D]
            grad_out = tl.load(p_g + m0.to(tl.int64) * stride_gn, mask=inside_g, other=0.0)  # [BLOCK_M, BLOCK_DV]
            # Rows past the end are zeros in q and grad_out, and so in every product.
            left = num_queries - m0
            lse = row_lse(load_row(LSE + p_row + m0, left, BLOCK_M, THREADS), NATURAL)  # [BLOCK_M]
            delta = load_row(DELTA + p_row + m0, left, BLOCK_M, THREADS)  # [BLOCK_M]
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * exponent_scale - lse[None, :]  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            partial = n0 + BLOCK_N > count
            if HAS_BOUNDS:
                start_max = tl.load(p_reach + 3 * tiles + tile)
                end_min = tl.load(p_reach + 4 * tiles + tile)
                sink_min = tl.load(p_reach + 5 * tiles + tile)
                partial = partial | (not seen_by_all(n0, start_max, end_min, sink_min, BLOCK_N))
            if partial:
                seen = inside_n[:, None]
                if HAS_BOUNDS:
                    p_bounds = BOUNDS + b64 * bounds_stride_b + m0
                    start = load_row(p_bounds, left, BLOCK_M, THREADS)
                    end = load_row(p_bounds + num_queries, left, BLOCK_M, THREADS)
                    sink = load_row(p_bounds + 2 * num_queries, left, BLOCK_M, THREADS)
                    key = offs_n[:, None]
                    visible = sees(key, start[None, :], end[None, :], sink[None, :])
                    seen = seen & visible
                x = tl.where(seen, x, -float("inf"))
            if GATE == 2:
                a = load_row(A + b64 * num_queries + m0, left, BLOCK_M, THREADS)
            else:
                a = 0.0
            if GATE != 0:
                base = gate_base(a, key_score, GATE, True)
            else:
                base = 1.0
            p, e = probability(x, base, strength, GATE, POWER, RENORM, NATURAL)
            ds = _grad_scores(p, e, dp, delta[None, :], GATE, RENORM)  # [BLOCK_N, BLOCK_M]
            if GATE != 0 and SCORE_GRADS:
                grad_ab = _grad_product(p, e, dp, delta[None, :], base, strength, POWER, RENORM)
            if HAS_BOUNDS:
                if partial:  # as in grad_query_kernel
                    ds = tl.where(e == 0.0, 0.0, ds)
                    if GATE != 0 and SCORE_GRADS:
                        grad_ab = tl.where(e == 0.0, 0.0, grad_ab)
            if GATE != 0 and SCORE_GRADS:
                if GATE == 2:
                    grad_ab = grad_ab * a[None, :]
                grad_b += tl.sum(grad_ab, 1)
            grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
            grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)

    store_n = offs_n < num_keys  # also the rows past KEY_COUNT, whose gradient is 0
    p_x = GRAD_K + b64 * stride_xb + h * stride_xh
    p_y = GRAD_V + b64 * stride_yb + h * stride_yh
    if HAS_COUNT:  # keys lie in the order in which they were kept: their gradients go where they came from
        row = tl.load(ORDER + b64 * num_keys + offs_n, mask=store_n, other=0)  # [BLOCK_N]
        p_x += row[:, None] * stride_xn + offs_d[None, :]
        p_y += row[:, None] * stride_yn + offs_dv[None, :]
    else:
        row = offs_n
        p_x += n64 * stride_xn + lane_n[:, None] * stride_xn + offs_d[None, :]
        p_y += n64 * stride_yn + lane_n[:, None] * stride_yn + offs_dv[None, :]
    tl.store(p_x, (grad_k * scale).to(GRAD_K.dtype.element_ty), mask=store_n[:, None] & inside_d)
    tl.store(p_y, grad_v.to(GRAD_V.dtype.element_ty), mask=store_n[:, None] & inside_dv)
    if GATE != 0 and SCORE_GRADS:
        tl.store(GRAD_B + bh.to(tl.int64) * num_keys + row, grad_b, mask=store_n)
