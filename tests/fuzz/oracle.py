"""Gated attention and its statistics in numpy float64, written from the formulas and not from the package's reference.

Every result comes as three arrays: the exact value, how far a correct kernel may be from it, and what is known of the
entry (see ``EXACT``, ``FREE``, ``NAN``). The allowed distance is computed along with the value, as a running error
analysis: each step adds the rounding errors of the data that it has, so that no tolerance is chosen for a case.

- A sum of ``n`` rounded terms is off by ``gamma(n) u sum |term|`` with ``gamma(n) = min(n, 8 sqrt(n)) + 4``: the second
  form fails with a probability below 1e-13 for roundings of either sign (Higham and Mary, "A new approach to
  probabilistic rounding error analysis", SIAM J. Sci. Comput. 2019, theorem 2.4).
- ``u`` is the unit roundoff of the kernels' arithmetic, fp32 (float64 for float64 inputs); ``ud`` that of the inputs'
  dtype, to which outputs, probabilities and the logits' gradient are rounded before they are multiplied.
- Numbers below the smallest normal one may be flushed to 0: ``tiny``, and ``tiny_d`` for the inputs' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EXACT, FREE, NAN = 0, 1, 2  # within the allowed distance; anything; not a number
_FAINT = 2.0**-100  # a probability that some kernel may have flushed to 0
_LARGEST_EXPONENT = 600.0  # exponentials beyond are infinite in every dtype of the kernels


class Expected(NamedTuple):
    value: Array
    allowed: Array
    status: NDArray[np.int8]


class Precision(NamedTuple):
    """Unit roundoffs and smallest numbers: of the arithmetic, and of the inputs' dtype."""

    u: float
    ud: float
    tiny: float
    tiny_d: float
    largest: float  # finite number of the inputs' dtype


PRECISIONS = {
    "float32": Precision(2**-24, 2**-24, 2.0**-126, 2.0**-126, 3.4028234663852886e38),
    "bfloat16": Precision(2**-24, 2**-8, 2.0**-126, 2.0**-126, 3.3895313892515355e38),
    "float16": Precision(2**-24, 2**-11, 2.0**-126, 2.0**-24, 65504.0),
    "float64": Precision(2**-53, 2**-53, 2.0**-1022, 2.0**-1022, 1.7976931348623157e308),
}


@dataclass
class Problem:
    """One call. Arrays are float64 copies of what the kernels get, with its NaN and infinities."""

    q: Array  # [B, H, Nq, D]
    k: Array  # [B, H, Nk, D]
    v: Array  # [B, H, Nk, Dv]
    sees: NDArray[np.bool_]  # [1 or B, Nq, Nk]
    scale: float
    precision: Precision
    query_score: Array | None = None  # a [B, Nq]
    key_score: Array | None = None  # b [B, Nk]
    output_scale: Array | None = None  # c [B, Nq]
    dropped: NDArray[np.bool_] | None = None  # [B, Nk]
    strength: float = 1.0
    renormalize: bool = True
    fused: bool = True  # 1 - a b is rounded once; else the product is rounded too


def gamma(n: int) -> float:
    return min(n, 8 * n**0.5) + 4


def known(x: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """``x`` with 0 for what is not finite, where it is NaN, and where it is infinite."""
    return np.where(np.isfinite(x), x, 0.0), np.isnan(x), np.isinf(x)


def status(must: NDArray, may: NDArray) -> NDArray[np.int8]:
    return np.where(must, NAN, np.where(may, FREE, EXACT)).astype(np.int8)


def _exp(x: Array) -> Array:
    return np.exp(np.minimum(x, _LARGEST_EXPONENT))


def _grown(relative: Array) -> Array:
    """Relative distance of ``exp(x)`` whose exponent is off by ``relative``."""
    return np.expm1(np.minimum(relative, _LARGEST_EXPONENT))


class Attention:
    """Forward pass of a problem: ``values`` by name; then :meth:`backward`."""

    def __init__(self, p: Problem):
        self.p = p
        u, eps = p.precision.u, p.precision
        (self.q, q_nan, q_inf), (self.k, k_nan, k_inf), (self.v, self.v_nan, self.v_inf) = map(known, (p.q, p.k, p.v))
        num_queries, dim = self.q.shape[2:]
        num_keys = self.k.shape[2]
        shape = (*self.q.shape[:3], num_keys)
        seen = np.broadcast_to(p.sees[:, None], (len(p.q), 1, num_queries, num_keys))
        if p.dropped is not None:
            seen = seen & ~p.dropped[:, None, None]
        self.seen = np.broadcast_to(seen, shape)

        # The gate, as the logarithm of its weight.
        self.gated = p.key_score is not None
        if self.gated:
            a = np.ones(p.q.shape[0:3:2]) if p.query_score is None else p.query_score
            self.a, self.b = a[:, None, :, None], p.key_score[:, None, None, :]
            self.base = 1 - self.a * self.b
            with np.errstate(divide="ignore"):
                log_weight = p.strength * np.log(self.base) if p.strength else np.zeros_like(self.base)
            weight_error = p.strength * 4 * u + u * (2 * np.abs(np.where(self.base > 0, log_weight, 0)) + 4)
            if not p.fused:
                weight_error = weight_error + p.strength * 2 * u / np.where(self.base > 0, self.base, 1.0)
            log_weight, weight_error = np.broadcast_to(log_weight, shape), np.broadcast_to(weight_error, shape)
        else:
            log_weight, weight_error = np.zeros(shape), np.zeros(shape)
        self.positive = log_weight > -np.inf

        # Logits, and how far off their exponentials are.
        s = p.scale * (self.q @ self.k.swapaxes(2, 3))
        rounded = abs(p.scale) * (np.abs(self.q) @ np.abs(self.k).swapaxes(2, 3)) * gamma(dim) * u
        self.s, size = s, np.where(self.seen, np.abs(s), 0.0)
        row_size = size.max(3, keepdims=True, initial=0.0)
        self.exponent_error = rounded + 4 * u * (size + row_size) + 8 * u
        self.weight_error = weight_error
        top_error = self.exponent_error + weight_error  # of the numerator

        top = np.where(self.seen & self.positive, s + log_weight, -np.inf)  # log of the numerator
        bottom = top if p.renormalize else np.where(self.seen, s, -np.inf)
        bottom_error = top_error if p.renormalize else self.exponent_error
        m = bottom.max(3, keepdims=True, initial=-np.inf)
        self.alive = m > -np.inf
        m = np.where(self.alive, m, 0.0)
        share = _exp(bottom - m)
        total = share.sum(3, keepdims=True)
        log_total = np.log(np.where(self.alive, total, 1.0))
        lse = m + log_total
        share = share / np.where(self.alive, total, 1.0)
        total_error = (share * np.minimum(_grown(bottom_error), 1e300)).sum(3, keepdims=True) + gamma(num_keys) * u
        total_error = total_error + eps.tiny * num_keys
        lse_error = np.minimum(total_error, row_size + np.abs(lse)) + 4 * u * (np.abs(m) + row_size + log_total) + 8 * u

        self.prob = np.where(self.alive, _exp(top - lse), 0.0)
        self.plain = np.where(self.seen & self.alive, _exp(s - lse), 0.0)
        relative = top_error + total_error + 4 * u
        prob_error = np.minimum(self.prob * _grown(relative), 1.0) + eps.tiny * (self.prob > 0)
        self.lse, self.lse_error = lse, lse_error
        rounding = 0.0 if eps.ud == u else eps.ud
        self.rounding = rounding
        largest = self.prob.max(3, keepdims=True, initial=0.0)
        # 16-bit probabilities relative to the largest one of the row lose what lies below their smallest number.
        spread = largest * eps.tiny_d if rounding else largest * eps.tiny

        size_v = np.abs(self.v)
        out = self.prob @ self.v
        inner = prob_error + (rounding + gamma(num_keys) * u) * self.prob + np.where(self.seen, spread, 0.0)
        out_error = inner @ size_v + eps.ud * np.abs(out) + eps.tiny_d
        self.inner_out, self.inner_out_error = out, out_error

        # What is not a number: seen with a weight for sure, seen with a weight of 0 perhaps.
        strict = self.seen & (self.positive | (not p.renormalize))
        bad, odd = q_nan.any(3), q_inf.any(3)
        bad_key, odd_key = k_nan.any(3), k_inf.any(3)
        self.strict = strict
        self.row_must = ((bad[..., None] | bad_key[:, :, None]) & strict).any(3)
        self.row_may = ((bad | odd)[..., None] | (bad_key | odd_key)[:, :, None]) & self.seen
        self.row_may = self.row_may.any(3)
        # Where a probability is 0 by underflow it is open whether a NaN of its value arrives.
        self.counts = self.seen & self.positive & (self.prob > _FAINT)
        weighed = self.counts.astype(float)
        sees = self.seen.astype(float)
        out_must = self.row_must[..., None] | (weighed @ self.v_nan.astype(float) > 0)
        out_may = self.row_may[..., None] | (sees @ (self.v_nan | self.v_inf).astype(float) > 0)
        row_status = status(self.row_must, self.row_may)

        log_prob = np.where(self.prob > 0, top - lse, 0.0)
        entropy = -(self.prob * log_prob).sum(3)
        reach = np.abs(np.where(self.prob > 0, top - m, 0.0)) + np.abs(log_total)
        entropy_error = (prob_error * (1 + reach) + self.prob * top_error).sum(3) + 4 * u
        entropy_error += (total_error + 4 * u * np.abs(log_total))[..., 0]
        entropy_error += gamma(num_keys) * u * (self.prob * reach).sum(3)
        square = (self.prob**2).sum(3)
        square_error = (2 * self.prob * prob_error + prob_error**2).sum(3) + (gamma(num_keys) + 4) * u * square
        c = p.output_scale
        if c is not None:
            c = c[:, None, :, None]
            out_error = out_error * np.abs(c) + 4 * eps.ud * np.abs(out * c) + eps.tiny_d * (1 + np.abs(out))
            out = out * c
        dead = ~self.alive[..., 0]
        with np.errstate(invalid="ignore"):
            self.values = {
                "out": Expected(out, out_error, status(out_must, out_may)),
                "lse": Expected(np.where(dead, -np.inf, lse[..., 0]), lse_error[..., 0], row_status),
                "entropy": Expected(entropy, entropy_error, row_status),
                "max_prob": Expected(
                    largest[..., 0], prob_error.max(3, initial=0.0) + 2 * u * largest[..., 0], row_status
                ),
                "sum_sq": Expected(square, square_error + eps.tiny * num_keys, row_status),
            }

    def backward(self, grad_out: Array, grad_lse: Array) -> dict[str, Expected]:
        """Gradients of q, k, v and the scores a, b, c, given those of out and lse."""
        p, eps, u = self.p, self.p.precision, self.p.precision.u
        grad_out, g_nan, g_inf = known(grad_out)
        grad_lse, l_nan, l_inf = known(grad_lse)
        num_queries, num_keys = self.s.shape[2:]
        value_dim = self.v.shape[3]
        given, g_error = grad_out, np.zeros_like(grad_out)
        if p.output_scale is not None:  # the gradient that reaches the softmax has been rounded
            grad_out = grad_out * p.output_scale[:, None, :, None]
            g_error = 4 * eps.ud * np.abs(grad_out) + eps.tiny_d * (1 + np.abs(given))
        size_g, size_v = np.abs(grad_out), np.abs(self.v)

        total_slack = self.exponent_error + self.lse_error + 4 * u * (np.abs(self.s) + np.abs(self.lse))
        plain_error = self.plain * _grown(total_slack) + eps.tiny * (self.plain > 0)
        prob_error = self.prob * _grown(total_slack + self.weight_error) + eps.tiny * (self.prob > 0)
        prob_error = np.minimum(prob_error, 1.0)

        dp = grad_out @ self.v.swapaxes(2, 3)
        g_error_and_sum = g_error + gamma(value_dim) * u * size_g
        dp_error = g_error_and_sum @ size_v.swapaxes(2, 3)
        out, out_error = self.inner_out, self.inner_out_error
        delta = (grad_out * out).sum(3, keepdims=True) - grad_lse[..., None]
        delta_error = (size_g * out_error + g_error_and_sum * (np.abs(out) + out_error)).sum(3, keepdims=True)
        delta_error += 2 * u * np.abs(grad_lse)[..., None]
        delta, delta_error = np.where(self.alive, delta, 0.0), np.where(self.alive, delta_error, 0.0)

        def spread(x: Array, x_error: Array, minus: Array, minus_error: Array) -> tuple[Array, Array]:
            """``x dp - minus delta`` and its distance."""
            error = x_error * (np.abs(dp) + dp_error) + x * dp_error
            error = error + minus_error * (np.abs(delta) + delta_error) + minus * delta_error
            return x * dp - minus * delta, error + 2 * u * (x * np.abs(dp) + minus * np.abs(delta))

        if p.renormalize or not self.gated:
            ds = self.prob * (dp - delta)
            ds_error = prob_error * (np.abs(dp - delta) + dp_error + delta_error) + self.prob * (dp_error + delta_error)
            ds_error += 2 * u * self.prob * (np.abs(dp) + np.abs(delta))
        else:
            ds, ds_error = spread(self.prob, prob_error, self.plain, plain_error)
        shown = self.seen & self.alive
        ds, ds_error = np.where(shown, ds, 0.0), np.where(shown, ds_error, 0.0)
        rounding = self.rounding
        if rounding:
            ds_error = ds_error + rounding * (np.abs(ds) + ds_error) + np.where(shown, eps.tiny_d, 0.0)
        scale = abs(p.scale)
        grads = {}
        size_ds, size_q, size_k = np.abs(ds), np.abs(self.q), np.abs(self.k)

        row_grad_must = (g_nan.any(3) | l_nan) | self.row_must
        row_grad_may = (g_nan | g_inf).any(3) | l_nan | l_inf | self.row_may
        v_must, v_may = self.v_nan.any(3)[:, :, None], (self.v_nan | self.v_inf).any(3)[:, :, None]
        row_grad_must = self.row_must | (row_grad_must & self.counts.any(3)) | (v_must & self.counts).any(3)
        row_grad_may = (row_grad_may & self.seen.any(3)) | (v_may & self.seen).any(3)

        def down(flags: NDArray, sight: NDArray) -> NDArray:
            """Keys that a flagged row sees."""
            return (flags[..., None] & sight).any(2)

        def finish(x: Array, error: Array, must: NDArray, may: NDArray) -> Expected:
            return Expected(x, error + eps.ud * np.abs(x) + eps.tiny_d, status(must, may))

        dq = p.scale * (ds @ self.k)
        dq_error = scale * ((ds_error + gamma(num_keys) * u * size_ds) @ size_k)
        grads["q"] = finish(
            dq, dq_error, *(np.broadcast_to(f[..., None], dq.shape) for f in (row_grad_must, row_grad_may))
        )
        dk = p.scale * (ds.swapaxes(2, 3) @ self.q)
        dk_error = scale * ((ds_error + gamma(num_queries) * u * size_ds).swapaxes(2, 3) @ size_q)
        key_must = down(self.row_must, self.strict) | down(row_grad_must, self.counts)
        key_flags = key_must, down(row_grad_may, self.seen)
        grads["k"] = finish(dk, dk_error, *(np.broadcast_to(f[..., None], dk.shape) for f in key_flags))
        dv = self.prob.swapaxes(2, 3) @ grad_out
        flushed = np.where(shown, eps.tiny_d if rounding else eps.tiny, 0.0)
        moved = prob_error + (rounding + gamma(num_queries) * u) * self.prob + flushed
        dv_error = moved.swapaxes(2, 3) @ (size_g + g_error) + self.prob.swapaxes(2, 3) @ g_error
        must = down(self.row_must, self.strict)[..., None]
        weighed = self.counts.swapaxes(2, 3).astype(float)
        must = must | (weighed @ g_nan.astype(float) > 0)
        may = down(self.row_may, self.seen)[..., None]
        may = may | (self.seen.swapaxes(2, 3).astype(float) @ (g_nan | g_inf).astype(float) > 0)
        grads["v"] = finish(dv, dv_error, must, may)

        never = np.zeros((), bool)
        if self.gated:
            with np.errstate(divide="ignore", invalid="ignore"):
                if p.strength == 1:
                    slope, slope_error = self.plain, plain_error
                else:
                    ratio = p.strength / np.where(self.base > 0, self.base, np.inf)
                    slope = ratio * self.prob
                    once = 1.0 if p.fused else 1 / np.where(self.base > 0, self.base, 1.0)
                    slope_error = ratio * (prob_error + 4 * u * once * self.prob)
            if p.renormalize:
                inner, inner_error = dp - delta, dp_error + delta_error
            else:
                inner, inner_error = dp, dp_error
            dw = np.where(shown, -slope * inner, 0.0)  # of the product a b
            dw_error = slope_error * (np.abs(inner) + inner_error) + slope * inner_error
            dw_error = np.where(shown, dw_error + 2 * u * slope * (np.abs(dp) + np.abs(delta)), 0.0)
            heads = self.s.shape[1]
            row_flag, key_flag = row_grad_may.any(1), down(row_grad_may, self.seen).any(1)
            # An exponential of a seen key without weight may leave every range.
            wild = (shown & ((self.s - self.lse) > 60)).any((1, 3)), (shown & ((self.s - self.lse) > 60)).any((1, 2))

            def score(other: Array, axis: int, n: int, flag: NDArray) -> Expected:
                x = (dw * other).sum((1, axis))
                error = ((dw_error + gamma(n * heads) * u * np.abs(dw)) * np.abs(other)).sum((1, axis))
                return Expected(x, error + 2 * u * np.abs(x) + eps.tiny, status(never & flag, flag))

            if p.query_score is not None:
                grads["query_score"] = score(self.b, 3, num_keys, row_flag | wild[0])
            grads["key_score"] = score(self.a, 2, num_queries, key_flag | wild[1])
        if p.output_scale is not None:
            x = (given * out).sum((1, 3))
            size = np.abs(given) * (out_error + (eps.ud + gamma(p.q.shape[1] * value_dim) * u) * np.abs(out))
            flag = row_grad_may.any(1) | (g_nan | g_inf).any((1, 3))
            grads["output_scale"] = Expected(
                x, size.sum((1, 3)) + 2 * eps.ud * np.abs(x) + eps.tiny_d, status(never & flag, flag)
            )
        return grads


def received(p: Problem, lse: Array) -> dict[str, Expected]:
    """Mean and squared deviations over all (head, query) pairs of ``p_ij = w_ij exp(s_ij - lse_i)``, ``[B, Nk]``."""
    u, eps = p.precision.u, p.precision
    a = Attention(p)
    rows = np.where(np.isfinite(lse), lse, 0.0)[..., None]
    shown = a.seen & a.positive & (lse[..., None] != -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weight = p.strength * np.log(a.base) if a.gated and p.strength else np.zeros(())
    prob = np.where(shown, _exp(np.where(shown, a.s + log_weight - rows, 0.0)), 0.0)
    relative = a.exponent_error + a.weight_error + 4 * u * (np.abs(a.s) + np.abs(rows)) + 8 * u
    error = prob * _grown(relative) + eps.tiny * (prob > 0)
    count = prob.shape[1] * prob.shape[2]
    mean = prob.mean((1, 2)) if count else np.zeros(prob.shape[0:4:3])
    mean_error = (error.mean((1, 2)) if count else 0 * mean) + gamma(count) * u * mean + eps.tiny
    deviation = prob - mean[:, None, None]
    off = error + mean_error[:, None, None] + 2 * u * np.abs(prob)
    m2 = (deviation**2).sum((1, 2))
    m2_error = (2 * np.abs(deviation) * off + off**2).sum((1, 2)) + gamma(count) * u * m2 + eps.tiny * count
    # A row whose lse is no number spoils the keys that it sees.
    bad = np.isnan(lse) | a.row_must | (lse == np.inf)
    must = (bad[..., None] & a.seen & a.positive).any((1, 2))
    may = ((bad | a.row_may)[..., None] & a.seen).any((1, 2))
    return {"mean": Expected(mean, mean_error, status(must, may)), "m2": Expected(m2, m2_error, status(must, may))}


def cross(x: Array, y: Array, scale: float, eps: Precision) -> dict[str, Expected]:
    """Moments ``[B, Nx]`` over the rows j of ``y [B, H, Ny, D]`` of ``scale * mean_heads x_i . y_j``."""
    u, factor = eps.u, scale / x.shape[1]
    z = factor * np.einsum("bhid,bhjd->bij", x, y)
    features, columns = x.shape[1] * x.shape[3], y.shape[2]
    mean = z.mean(2)
    centre = y.mean(2, keepdims=True)
    size = abs(factor) * np.einsum("bhid,bhjd->bij", np.abs(x), np.abs(y))
    mean_error = (gamma(features) + gamma(columns)) * u * size.mean(2) + 4 * u * np.abs(mean)
    rest = abs(factor) * np.einsum("bhid,bhjd->bij", np.abs(x), np.abs(y - centre))
    off = gamma(features) * u * rest + 4 * u * size
    # The centre is rounded: every deviation moves alike, by as much as the mean may.
    off = off + mean_error[..., None]
    deviation = z - mean[..., None]
    m2 = (deviation**2).sum(2)
    m2_error = (2 * np.abs(deviation) * off + off**2).sum(2) + gamma(columns) * u * m2 + eps.tiny * columns
    return {"mean": _free(mean, mean_error + eps.tiny), "m2": _free(m2, m2_error)}


def logits(p: Problem, over: tuple[str, ...]) -> dict[str, Expected]:
    """Moments of the seen logits over the named axes, which are dropped. The gate does not count."""
    u, fine = p.precision.u, 2**-53
    s = p.scale * (p.q @ p.k.swapaxes(2, 3))
    size = abs(p.scale) * (np.abs(p.q) @ np.abs(p.k).swapaxes(2, 3))
    seen = np.broadcast_to(p.sees[:, None], s.shape)
    axes = tuple(i for i, name in ((1, "heads"), (2, "queries"), (3, "keys")) if name in over)
    n = seen.sum(axes)
    some = np.maximum(n, 1)
    mean = np.where(seen, s, 0).sum(axes) / some
    wide = np.expand_dims(mean, axes)
    deviation = np.where(seen, s - wide, 0.0)
    m2 = (deviation**2).sum(axes)
    # Closed forms in float64: they cancel, by the size of the terms instead of that of the result.
    terms = np.where(seen, size, 0.0)
    step = gamma(max(p.q.shape[2], p.k.shape[2]) * p.q.shape[3]) * fine
    largest = size.max((1, 2, 3), initial=0.0)
    largest = largest.reshape(-1, *(1,) * (mean.ndim - 1))
    mean_error = step * (terms.sum(axes) / some + largest) + 2 * u * np.abs(mean) + p.precision.tiny
    m2_error = step * (n * largest**2) + 2 * u * m2 + p.precision.tiny
    return {
        "count": _free(n.astype(float), np.zeros(n.shape)),
        "mean": _free(mean, mean_error), "m2": _free(m2, m2_error),
    }  # fmt: skip


def _free(value: Array, allowed: Array) -> Expected:
    return Expected(value, allowed, np.zeros(value.shape, np.int8))
