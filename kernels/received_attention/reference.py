"""The readable oracle of received attention: materialises the map, any floating dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._reference import gate_log_weight, gate_weight, seen


def received_attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    lse: Tensor,  # [B, H, Nq], natural log; -inf for a row without weight
    query_score: Tensor | None,  # [B, Nq]
    key_score: Tensor | None,  # [B, Nk]
    bounds: Tensor | None,  # [1 or B, 3, Nq] int: start, end, sink_end
    scale: float,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over queries of ``p_ij = w_ij exp(s_ij - lse_i)``, each ``[B, H, Nk]``, in
    at least fp32. Pairs that are not visible count with ``p = 0``. Dropped keys are the caller's: given lse they
    concern nothing but their own entries."""
    work = torch.promote_types(q.dtype, torch.float32)
    lse = lse.to(work)[..., None]
    alive = lse != -torch.inf
    exponent = scale * (q.to(work) @ k.to(work).mT) - torch.where(alive, lse, 0.0)  # [B, H, Nq, Nk]

    counted = alive.expand_as(exponent)
    if bounds is not None:
        counted = counted & seen(bounds, k.shape[2])[:, None]
    weight = torch.ones((), dtype=work, device=q.device)
    if key_score is not None and strength != 0:
        scores = None if query_score is None else query_score.to(work), key_score.to(work)
        if strength == 1:
            weight = gate_weight(*scores, strength)[:, None]  # [B, 1, Nq or 1, Nk]
            counted = counted & (weight > 0)  # exp may overflow where the weight is 0
        else:  # a power may leave the range of the dtype
            log_weight = gate_log_weight(*scores, strength)[:, None]
            counted = counted & (log_weight > -torch.inf)
            exponent = exponent + log_weight
    p = torch.where(counted, weight * exponent.masked_fill(~counted, 0.0).exp(), 0.0)

    if not p.shape[2]:
        return p.new_zeros(p.shape[:2] + p.shape[3:]), p.new_zeros(p.shape[:2] + p.shape[3:])
    mean = p.mean(2, keepdim=True)
    deviation = p - mean
    residual = deviation.mean(2)
    m2 = deviation.square().sum(2) - p.shape[2] * residual.square()
    return mean.squeeze(2) + residual, m2.clamp_min(0)
