"""Triton building blocks that every kernel over the score matrix shares: the gate's weight, tile visibility.

Scores are handled in base 2: ``s2 = scale * log2(e) * q . k``, so that ``exp2`` needs no further multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# tl.constexpr globals can be read inside kernels; plain ones cannot.
_NONE = tl.constexpr(2**31 - 1)

NO_GATE, KEY_GATE, PAIR_GATE = 0, 1, 2


def power_code(strength: float, half_precision: bool) -> int:
    """``2 * strength`` where the weight is a product of few factors, 0 where it takes exp2 and log2.

    The smallest weight but 0 is ``2 ** -24`` to the power of strength. Its square must be in the range of fp32, and in
    half precision the weight itself in the range of fp16; the logarithmic form joins the exponent, whose maximum is
    subtracted, and needs no range.
    """
    doubled = 2 * strength
    largest = 2 if half_precision else 4
    return int(doubled) if doubled == int(doubled) and 1 <= doubled <= largest else 0


@triton.jit
def to_natural(x):
    """``x * ln 2`` with the constant in two parts: lse is converted forth and back, and a large one must not drift."""
    return x * 0.693147182464599609375 + x * -1.904654299957768e-09


@triton.jit
def to_base2(x):
    """``x * log2 e``, the inverse of :func:`to_natural`."""
    return x * 1.44269502162933349609375 + x * 1.925963033500412e-08


@triton.jit
def load_row(P, left, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """``P[0:BLOCK]`` with 0 from ``left`` on, for a vector that is broadcast along a score tile.

    A load with fewer elements than threads is taken for a cheap one and repeated in the layout of the score tile,
    which for a row means one instruction per column and thread. Padding it with masked lanes prevents that.
    """
    COPIES: tl.constexpr = 1 if THREADS <= BLOCK else THREADS // BLOCK  # up to 16: 8 warps, 16 lanes
    lane = tl.arange(0, COPIES * BLOCK)
    x = tl.load(P + lane, mask=(lane < BLOCK) & (lane < left), other=0)
    if COPIES >= 16:
        x, _ = tl.split(tl.trans(tl.reshape(x, [2, 8 * BLOCK])))
    if COPIES >= 8:
        x, _ = tl.split(tl.trans(tl.reshape(x, [2, 4 * BLOCK])))
    if COPIES >= 4:
        x, _ = tl.split(tl.trans(tl.reshape(x, [2, 2 * BLOCK])))
    if COPIES >= 2:
        x, _ = tl.split(tl.trans(tl.reshape(x, [2, BLOCK])))
    return x


@triton.jit
def load_tile(P, inside, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDARY: tl.constexpr):
    """``P [N, BLOCK_D]``, 0 past the head dimension and, on a boundary, in rows that are not ``inside [N]``."""
    if BOUNDARY:
        if D != BLOCK_D:
            return tl.load(P, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
        return tl.load(P, mask=inside[:, None], other=0.0)
    if D != BLOCK_D:
        return tl.load(P, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(P)


@triton.jit
def merge_moments(count, mean, m2, x, left, lane, WIDTH: tl.constexpr):
    """Moments ``[M]`` with the columns of a tile ``[M, WIDTH]`` merged in, by the pairwise update, so that the variance
    of nearly equal numbers does not cancel. Columns from ``left`` on are 0 and do not count."""
    number = tl.minimum(left, WIDTH).to(tl.float32)
    tile_mean = tl.sum(x, 1) / number  # [M]
    deviation = x - tile_mean[:, None]  # [M, WIDTH]
    if left < WIDTH:
        deviation = tl.where((lane < left)[None, :], deviation, 0.0)
    step = tile_mean - mean
    total = count + number
    mean += step * (number / total)
    m2 += tl.sum(deviation * deviation, 1) + step * step * (count * number / total)
    return total, mean, m2


@triton.jit
def gate_base(a, b, GATE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """``1 - a_i b_j``: ``[M, N]``, ``[N, M]`` with KEYS_FIRST, or one row (column) for a gate on keys alone."""
    if KEYS_FIRST:
        product = b[:, None]
        if GATE == 2:
            product = a[None, :] * product
    else:
        product = b[None, :]
        if GATE == 2:
            product = a[:, None] * product
    return 1.0 - product


@triton.jit
def gate_weight(base, strength, POWER: tl.constexpr):
    """``base ** strength``; POWER is :func:`power_code`."""
    if POWER == 0:
        return tl.exp2(strength * tl.log2(base))
    if POWER % 2 == 1:
        weight = tl.sqrt(base)
    else:
        weight = base
    for _ in tl.static_range((POWER - 1) // 2):
        weight = weight * base
    return weight


@triton.jit
def row_lse(lse, NATURAL: tl.constexpr):
    """lse as :func:`probability` takes it: in base 2 unless NATURAL; infinite for a row without weight, whose
    probabilities are then all 0."""
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    if not NATURAL:
        lse = to_base2(lse)
    return lse


@triton.jit
def probability(
    x, base, strength, GATE: tl.constexpr, POWER: tl.constexpr, RENORM: tl.constexpr, NATURAL: tl.constexpr
):
    """``(p, e)``: the gated probability, and ``exp(s - lse)`` without the gate (``p`` where that is not needed).

    ``x`` is ``s - lse`` in base 2, or with NATURAL (fp32) to base e: one multiplication more, after the difference
    of two large numbers and not before it. A probability is at most 1, whatever rounding makes of that difference.
    """
    if NATURAL:
        x = x * 1.4426950408889634
    if GATE == 0:
        p = tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
        return p, p
    if RENORM and POWER == 0:
        x = x + strength * tl.log2(base)
        p = tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
        return p, p
    if RENORM:
        # A key of weight 0 is not in the sum, so its logit may exceed lse without limit; its weight makes it 0, but at
        # strength 1 its score has a gradient. 80 log2(e), where the reference stops in fp32.
        x = tl.minimum(x, 115.41560327111707, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(x)
    return e * gate_weight(base, strength, POWER), e


@triton.jit
def row_bounds(BOUNDS, b, offs_m, num_queries, num_keys, bounds_stride_b):
    """``start, end, sink_end`` of the rows ``offs_m``, within the keys; rows outside see nothing."""
    inside = offs_m < num_queries
    base = BOUNDS + b.to(tl.int64) * bounds_stride_b + offs_m
    start = tl.maximum(tl.load(base, mask=inside, other=0), 0)
    end = tl.minimum(tl.load(base + num_queries, mask=inside, other=0), num_keys)
    sink = tl.maximum(tl.minimum(tl.load(base + 2 * num_queries, mask=inside, other=0), num_keys), 0)
    return start, end, sink


@triton.jit
def sees(key, start, end, sink):
    """Whether rows with these bounds see the keys: the one formula of visibility on a GPU, sink prefix included."""
    return (key < sink) | ((key >= start) & (key < end))


@triton.jit
def reach(start, end, sink, inside):
    """Of a tile of rows: smallest start, largest end, largest sink of what any row sees; largest start,
    smallest end, smallest sink of what all rows see."""
    some = inside & (end > start)
    start_min = tl.min(tl.where(some, start, _NONE), 0)
    end_max = tl.max(tl.where(some, end, 0), 0)
    sink_max = tl.max(tl.where(inside, sink, 0), 0)
    start_max = tl.max(tl.where(inside, start, 0), 0)
    end_min = tl.min(tl.where(inside, end, _NONE), 0)
    sink_min = tl.min(tl.where(inside, sink, _NONE), 0)
    return start_min, end_max, sink_max, start_max, end_min, sink_min


@triton.jit
def tile_range(start_min, end_max, sink_max, BLOCK_N: tl.constexpr):
    """The tiles of keys that some row sees: from ``first`` to before ``last``, and ``sink_tiles`` leading ones."""
    first = start_min // BLOCK_N
    sink_tiles = tl.minimum(tl.cdiv(sink_max, BLOCK_N), first)
    last = tl.maximum(tl.cdiv(end_max, BLOCK_N), first)
    return first, last, sink_tiles


@triton.jit
def full_range(start_max, end_min, sink_min, first, last, sink_tiles, BLOCK_N: tl.constexpr):
    """Those of :func:`tile_range` of which every row sees every key, as a part of each of the two."""
    full_first = tl.minimum(tl.maximum(tl.cdiv(start_max, BLOCK_N), first), last)
    full_last = tl.maximum(tl.minimum(end_min // BLOCK_N, last), full_first)
    full_sinks = tl.minimum(sink_min // BLOCK_N, sink_tiles)
    return full_first, full_last, full_sinks


@triton.jit
def boundary_tile(step, first, sink_tiles, full_first, full_last, full_sinks):
    """The tile of a step over :func:`tile_range` without :func:`full_range`."""
    tile = step + full_sinks
    tile = tl.where(tile < sink_tiles, tile, tile - sink_tiles + first)
    return tl.where(tile < full_first, tile, tile + full_last - full_first)


@triton.jit
def seen_by_all(n0, start_max, end_min, sink_min, BLOCK_N: tl.constexpr):
    """Whether every row sees every key of ``[n0, n0 + BLOCK_N)``."""
    return ((n0 >= start_max) & (n0 + BLOCK_N <= end_min)) | (n0 + BLOCK_N <= sink_min)


@triton.jit
def seen_by_any(offs, start_min, end_max, sink_max):
    """Which keys the interval and the sinks of some row may hold. The others are not loaded: 0 times a NaN is NaN."""
    return ((offs >= start_min) & (offs < end_max)) | (offs < sink_max)


@triton.jit
def reach_kernel(BOUNDS, REACH, num_queries, num_keys, bounds_stride_b, tiles, BLOCK_M: tl.constexpr):
    """:func:`reach` of every tile of queries, int32 ``[1 or B, 6, tiles]``. Grid: (batch, tile), flattened, since the
    batch may be larger than the second dimension of a grid."""
    tile, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    start, end, sink = row_bounds(BOUNDS, b, offs_m, num_queries, num_keys, bounds_stride_b)
    start_min, end_max, sink_max, start_max, end_min, sink_min = reach(start, end, sink, offs_m < num_queries)
    out = REACH + b.to(tl.int64) * 6 * tiles + tile
    tl.store(out, start_min)
    tl.store(out + tiles, end_max)
    tl.store(out + 2 * tiles, sink_max)
    tl.store(out + 3 * tiles, start_max)
    tl.store(out + 4 * tiles, end_min)
    tl.store(out + 5 * tiles, sink_min)


@triton.jit
def query_tiles(REACH, n0, tiles, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """First and one past the last tile of queries of which a row sees a key of ``[n0, n0 + BLOCK_N)``."""
    first = tiles
    last = 0
    for c in range(0, tiles, CHUNK):
        index = c + tl.arange(0, CHUNK)
        inside = index < tiles
        start_min = tl.load(REACH + index, mask=inside, other=_NONE)
        end_max = tl.load(REACH + tiles + index, mask=inside, other=0)
        sink_max = tl.load(REACH + 2 * tiles + index, mask=inside, other=0)
        hit = ((start_min < n0 + BLOCK_N) & (end_max > n0)) | (sink_max > n0)
        first = tl.minimum(first, tl.min(tl.where(hit, index, tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, index + 1, 0), 0))
    return first, last
