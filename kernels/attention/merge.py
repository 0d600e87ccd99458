"""Attention over parts of the keys, merged: exact, because a part's lse says how much of the softmax it holds."""

from __future__ import annotations

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]  # out [B, H, Nq, Dv], lse [B, H, Nq]


def merge(a: Partial | None, b: Partial) -> Partial:
    """Softmax-weighted mean of two attention results over different keys; None stands for no keys.

    A row that sees nothing in either part keeps out = 0 and lse = -inf.
    """
    if a is None:
        return b
    lse = torch.logaddexp(a[1], b[1])
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(b[1] - lse))  # both empty: -inf minus -inf
    return torch.lerp(a[0], b[0], weight[..., None].to(a[0].dtype)), lse
