"""What the readable oracles share: the gate's weight and which keys an interval shows."""

from __future__ import annotations

import torch
from torch import Tensor


def _gate_base(query_score: Tensor | None, key_score: Tensor) -> Tensor:
    """``1 - a_i b_j``, ``[B, Nq or 1, Nk]``."""
    product = key_score[:, None, :]  # [B, 1, Nk]
    return 1 - (product if query_score is None else query_score[:, :, None] * product)


def gate_weight(query_score: Tensor | None, key_score: Tensor, strength: float) -> Tensor:
    """``(1 - a_i b_j) ** strength``, ``[B, Nq or 1, Nk]``.

    The derivative at a weight of 0 is taken as 0 unless ``strength`` is 1: for ``strength < 1`` it is infinite.
    """
    weight = _gate_base(query_score, key_score)
    if strength == 1:
        return weight
    if strength == 0:
        return torch.ones_like(weight)
    positive = weight > 0
    return torch.where(positive, torch.where(positive, weight, 1.0) ** strength, 0.0)


def gate_log_weight(query_score: Tensor | None, key_score: Tensor, strength: float) -> Tensor:
    """The logarithm of :func:`gate_weight` for a strength other than 1: -inf at a weight of 0, its derivative 0 there.
    Powers leave the range of every dtype, their logarithms do not."""
    base = _gate_base(query_score, key_score)
    positive = base > 0
    return torch.where(positive, strength * torch.log(torch.where(positive, base, 1.0)), -torch.inf)


def seen(bounds: Tensor, num_keys: int) -> Tensor:
    """Bool ``[1 or B, Nq, Nk]`` of ``bounds [1 or B, 3, Nq]``, rows start, end and sink_end."""
    start, end, sink_end = bounds[..., None].unbind(1)  # [1 or B, Nq, 1]
    j = torch.arange(num_keys, device=bounds.device)
    return (j < sink_end) | ((j >= start) & (j < end))
