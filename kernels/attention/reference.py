"""The readable oracle of gated attention: materialises everything, any floating dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._reference import gate_weight, seen


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
    """
    work = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(work) @ k.to(work).transpose(-1, -2))  # [B, H, Nq, Nk]

    visible = torch.ones_like(logits[:, :1], dtype=torch.bool)  # [B, 1, Nq, Nk]
    if bounds is not None:
        visible = visible & seen(bounds, k.shape[2])[:, None]
    if dropped_keys is not None:
        # A dropped key leaves the denominator too: it is as if the key were not there.
        visible = visible & ~dropped_keys[:, None, None, :]
    if key_score is None:
        weight = torch.ones_like(logits[:, :1])
    else:
        query = None if query_score is None else query_score.to(work)
        weight = gate_weight(query, key_score.to(work), strength)[:, None].expand_as(visible)  # [B, 1, Nq, Nk]

    # The row maximum only rescales; with renormalisation it skips keys of weight 0, so that a large logit
    # which does not count cannot push those that do below the smallest number.
    counted = visible & (weight > 0) if renormalize else visible
    masked = logits.masked_fill(~counted, -torch.inf)
    row_max = masked.detach().amax(-1, keepdim=True) if k.shape[2] else logits.new_full((*q.shape[:3], 1), -torch.inf)
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    # Zero weights stay in the graph where they are visible: the gradient of a score at 1 is not 0.
    exponent = torch.where(visible, logits - row_max, -torch.inf)
    exponential = torch.exp(torch.where(counted, exponent, exponent.clamp(max=_headroom(work))))
    numerator = weight * exponential
    total = (numerator if renormalize else exponential).sum(-1, keepdim=True)
    alive = total > 0
    safe_total = torch.where(alive, total, 1.0)
    probability = torch.where(alive, numerator / safe_total, 0.0)

    out = probability @ v.to(work)
    lse = torch.where(alive, torch.log(safe_total) + row_max, -torch.inf).squeeze(-1)
    p = probability.detach()
    stats = torch.stack((-torch.special.xlogy(p, p).sum(-1), _row_max(p), p.square().sum(-1)))
    return out.to(q.dtype), lse, stats


def _headroom(dtype: torch.dtype) -> float:
    """Largest exponent kept for a visible key of weight 0, whose exponential multiplies that 0."""
    return 80.0 if dtype == torch.float32 else 600.0


def _row_max(p: Tensor) -> Tensor:
    return p.amax(-1) if p.shape[-1] else p.new_zeros(p.shape[:-1])
