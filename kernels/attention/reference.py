"""The readable oracle of gated attention: materialises everything, any floating dtype, any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._reference import gate_log_weight, gate_weight, seen


def _over_seen(weights: Tensor, seen: Tensor, x: Tensor) -> Tensor:
    """``weights [..., n, m] @ x [..., m, d]`` of the pairs ``seen``; the weights of the others are 0.

    A plain product would carry a NaN or an infinity of x into every row, as 0 times it.
    """
    bad = ~x.isfinite()
    if _is_readable(x) and not bad.any():
        return weights @ x
    touched = (seen.to(x.dtype) @ bad.to(x.dtype)) > 0
    return torch.where(touched, torch.nan, weights @ x.masked_fill(bad, 0.0))


def _is_readable(x: Tensor) -> bool:
    """Whether a value may decide what is computed: not in a graph or a transform, not where it would wait for a GPU."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x)


class _Scores(torch.autograd.Function):
    """``q @ k^T``, whose gradients know which pairs are seen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, k, seen = ctx.saved_tensors
        return _over_seen(grad, seen, k), _over_seen(grad.mT, seen.mT, q), None


class _Values(torch.autograd.Function):
    """``p @ v`` over the pairs seen; p is 0 at the others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return _over_seen(p, seen, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        p, v, seen = ctx.saved_tensors
        return torch.where(seen, grad @ v.mT, 0.0), _over_seen(p.mT, seen.mT, grad), None


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    query_score: Tensor | None,  # [B, Nq]
    key_score: Tensor | None,  # [B, Nk]
    dropped_keys: Tensor | None,  # [B, Nk] bool
    bounds: Tensor | None,  # [1 or B, 3, Nq] int: start, end, sink_end
    scale: float,
    strength: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``out [B, H, Nq, Dv]`` in q's dtype, ``lse [B, H, Nq]`` and ``stats [3, B, H, Nq]``
    (entropy, largest probability, sum of squared probabilities; not differentiable) in at least fp32.

    A row with nothing visible, or only zero weights, gives ``out = 0``, ``lse = -inf``, statistics 0, zero gradients.
    A NaN reaches the rows that see it, and no other.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    visible = torch.ones((q.shape[0], 1, q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device)
    if bounds is not None:
        visible = visible & seen(bounds, k.shape[2])[:, None]
    if dropped_keys is not None:
        # A dropped key leaves the denominator too: it is as if the key were not there.
        visible = visible & ~dropped_keys[:, None, None, :]
    logits = scale * _Scores.apply(q.to(work), k.to(work), visible)  # [B, H, Nq, Nk]
    weight, counted = None, visible
    if key_score is not None and strength != 0:
        scores = None if query_score is None else query_score.to(work), key_score.to(work)
        if renormalize and strength != 1:
            # As a bias: a power that underflows would lose the row, though only ratios of weights count.
            logits = logits + gate_log_weight(*scores, strength)[:, None]
        else:
            weight = gate_weight(*scores, strength)[:, None]  # [B, 1, Nq or 1, Nk]
            # The row maximum only rescales; with renormalisation it skips keys of weight 0, so that a large logit
            # which does not count cannot push those that do below the smallest number. A NaN is seen all the same.
            counted = visible & ((weight > 0) | logits.isnan()) if renormalize else visible
            weight = torch.where(visible, weight, 0.0)

    masked = logits.masked_fill(~counted, -torch.inf)
    row_max = masked.detach().amax(-1, keepdim=True) if k.shape[2] else logits.new_full((*q.shape[:3], 1), -torch.inf)
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    # Zero weights stay in the graph where they are visible: the gradient of a score at 1 is not 0.
    exponent = torch.where(visible, logits - row_max, -torch.inf)
    limit = _headroom(work)  # by a comparison that lets NaN and its gradient pass, as clamp does not
    exponential = torch.exp(torch.where(~counted & (exponent > limit), limit, exponent))
    numerator = exponential if weight is None else weight * exponential
    total = (numerator if renormalize else exponential).sum(-1, keepdim=True)
    alive = total != 0  # also where it is NaN
    safe_total = torch.where(alive, total, 1.0)
    probability = torch.where(alive & visible, numerator / safe_total, 0.0)

    out = _Values.apply(probability, v.to(work), visible)
    lse = torch.where(alive, torch.log(safe_total) + row_max, -torch.inf).squeeze(-1)
    p = probability.detach()
    stats = torch.stack((-torch.special.xlogy(p, p).sum(-1), _row_max(p), p.square().sum(-1)))
    return out.to(q.dtype), lse, stats


def _headroom(dtype: torch.dtype) -> float:
    """Largest exponent kept for a visible key of weight 0, whose exponential multiplies that 0."""
    return 80.0 if dtype == torch.float32 else 600.0


def _row_max(p: Tensor) -> Tensor:
    return p.amax(-1) if p.shape[-1] else p.new_zeros(p.shape[:-1])
