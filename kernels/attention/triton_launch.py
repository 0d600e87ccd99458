"""The two attention operators on a CUDA device: checks of layout, compaction, launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._operands import check_attention, expect
from .._triton.configurations import Config, config
from .._triton.problem import Problem, batch_stride, problem, query_reach
from .._triton.runtime import block_dim, capability, heads_last, launch, readable, strides
from .compaction import Kept
from .triton_bwd import delta_kernel, grad_key_kernel, grad_query_kernel
from .triton_fwd import forward_kernel


def forward(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    query_score: Tensor | None,
    key_score: Tensor | None,
    dropped_keys: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    strength: float,
    renormalize: bool,
    row_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gate4d::attention_forward``: ``out [B, H, Nq, Dv]``, ``lse [B, H, Nq]``, ``stats [3, B, H, Nq]`` or ``[0]``."""
    check_attention(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength)
    batch, heads, num_queries, dim = q.shape
    num_keys, value_dim = v.shape[2:]
    out = heads_last(q, batch, heads, num_queries, value_dim)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    stats = q.new_empty((3, batch, heads, num_queries) if row_stats else (0,), dtype=torch.float32)
    if num_keys == 0:
        return out.zero_(), lse.fill_(-torch.inf), stats.zero_()
    p, v, kept = _compacted(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize)
    width, aligned = max(block_dim(dim), block_dim(value_dim)), dim % 16 == value_dim % 16 == 0
    c = config("forward_stats" if row_stats else "forward", capability(q.device), q.dtype, width, aligned, p.features)
    descriptors = c.descriptors and kept is None and _describable(p.k) and _describable(v)
    args = {
        "Q": p.q,
        "K": _descriptor(p.k, c.block_n, block_dim(dim)) if descriptors else p.k,
        "V": _descriptor(v, c.block_n, block_dim(value_dim)) if descriptors else v,
        "OUT": out, "LSE": lse, "STATS": stats if row_stats else None,
        **strides("q", p.q), **strides("k", p.k), **strides("v", v), **strides("o", out),
        "batch": batch,
        "D": dim, "DV": value_dim, "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(value_dim),
        **_blocks(c), "ROW_STATS": row_stats,
        # Keeps small gated probabilities inside the range of fp16. Where the logarithm of the weight joins the
        # exponent the largest is 1 anyway.
        "P_SCALE": 2**14 if p.multiplies and q.dtype == torch.float16 else 1,
        "DESCRIPTORS": descriptors, **p.shared,
    }  # fmt: skip
    launch(forward_kernel, (triton.cdiv(num_queries, c.block_m) * batch * heads,), args, **c.options)
    return out, lse, stats


def backward(
    grad_out: Tensor,  # [B, H, Nq, Dv]
    grad_lse: Tensor | None,  # [B, H, Nq]
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    out: Tensor,  # [B, H, Nq, Dv]
    lse: Tensor,  # [B, H, Nq]
    query_score: Tensor | None,
    key_score: Tensor | None,
    dropped_keys: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    strength: float,
    renormalize: bool,
    score_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``gate4d::attention_backward``: gradients of q, k, v and, with ``score_grads``, of the gate's scores."""
    check_attention(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength)
    batch, heads, num_queries, dim = q.shape
    num_keys, value_dim = v.shape[2:]
    for name, x in (("grad_out", grad_out), ("out", out)):
        expect(name, x, q.dtype, (batch, heads, num_queries, value_dim), q.device)
    for name, row in (("lse", lse), ("grad_lse", grad_lse)):
        expect(name, row, torch.float32, (batch, heads, num_queries), q.device)
    grad_q, grad_k, grad_v = (heads_last(x, *x.shape) for x in (q, k, v))
    p, v, kept = _compacted(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize)
    grad_out, out = readable(grad_out), readable(out)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    block_dv = block_dim(value_dim)
    rows = 64
    args = {
        "GRAD_OUT": grad_out, "OUT": out, "GRAD_LSE": None if grad_lse is None else grad_lse.float().contiguous(),
        "DELTA": delta, **strides("g", grad_out), **strides("o", out), "heads": heads, "num_queries": num_queries,
        "DV": value_dim, "BLOCK_DV": block_dv, "BLOCK_M": rows, "HAS_GRAD_LSE": grad_lse is not None,
    }  # fmt: skip
    launch(delta_kernel, (triton.cdiv(num_queries, rows) * batch * heads,), args, num_warps=4)

    def per_head(x: Tensor | None) -> Tensor | None:
        return q.new_empty(batch, heads, x.shape[1], dtype=torch.float32) if score_grads and x is not None else None

    grad_a, grad_b = per_head(p.query_score), per_head(p.key_score)
    width, aligned = max(block_dim(dim), block_dv), dim % 16 == value_dim % 16 == 0
    shared = {
        "GRAD_OUT": grad_out, "Q": p.q, "K": p.k, "V": v, "LSE": lse.contiguous(), "DELTA": delta,
        **strides("g", grad_out), **strides("q", p.q), **strides("k", p.k), **strides("v", v), "scale": p.scale,
        "D": dim, "DV": value_dim, "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dv, "SCORE_GRADS": score_grads,
        **p.shared,
    }  # fmt: skip

    c = config("grad_query", capability(q.device), q.dtype, width, aligned, p.features)
    args = {**shared, **_blocks(c), "GRAD_Q": grad_q, "GRAD_A": grad_a, **strides("x", grad_q)}
    launch(grad_query_kernel, (triton.cdiv(num_queries, c.block_m) * batch * heads,), args, **c.options)
    if p.sign != 1:
        grad_q *= p.sign

    c = config("grad_key", capability(q.device), q.dtype, width, aligned, p.features)
    reach = query_reach(p, c.block_m)
    args = {
        **shared, **_blocks(c), "REACH": reach, "reach_stride_b": batch_stride(reach),
        "ORDER": None if kept is None else kept.order,
        "GRAD_K": grad_k, "GRAD_V": grad_v, "GRAD_B": grad_b, **strides("x", grad_k), **strides("y", grad_v),
    }  # fmt: skip
    launch(grad_key_kernel, (triton.cdiv(num_keys, c.block_n) * batch * heads,), args, **c.options)

    def over_heads(x: Tensor | None, score: Tensor | None) -> Tensor:
        if score is None or not score_grads:
            return q.new_empty(0, dtype=torch.float32)
        # None: strength 0, or a query score without a key score.
        return torch.zeros_like(score, dtype=torch.float32) if x is None else x.sum(1)

    return grad_q, grad_k, grad_v, over_heads(grad_a, query_score), over_heads(grad_b, key_score)


def _compacted(
    q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize
) -> tuple[Problem, Tensor, Kept | None]:
    """The problem over the kept keys, their values, and how they were chosen."""
    kept = None if dropped_keys is None else Kept.of(dropped_keys)
    if kept is not None:
        k, v = kept.gather(readable(k)), kept.gather(v)
        key_score = None if key_score is None else kept.gather(key_score)
        bounds = None if bounds is None else kept.bounds(bounds)
    count = None if kept is None else kept.number
    p = problem(q, k, query_score, key_score, bounds, scale, strength, renormalize, count)
    return p, readable(v), kept


def _blocks(c: Config) -> dict[str, int]:
    return {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "THREADS": 32 * c.num_warps}


def _describable(x: Tensor) -> bool:
    """The copy engine wants 16-byte aligned rows."""
    item = x.element_size()
    return (x.is_meta or x.data_ptr() % 16 == 0) and all(s * item % 16 == 0 and s > 0 for s in x.stride()[:3])


def _descriptor(x: Tensor, rows: int, width: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width])
