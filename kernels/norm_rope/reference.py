"""The readable oracle of norm + RoPE-2D: any floating dtype, any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope(
    x: Tensor,  # [B, H, N, D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    positions: Tensor | None,  # [1 or B, N, 2] int: y, x
    frequencies: Tensor | None,  # [D / 4], radians for one position
    norm: bool,
    eps: float,
) -> Tensor:
    """``[B, H, N, D]`` in x's dtype, computed in at least fp32.

    The first half of a head turns by y, the second by x; inside a half features ``i`` and ``i + D / 4`` are the two
    coordinates that turn by ``position * frequencies[i]``.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    y = x.to(work)
    if norm:
        centred = y - y.mean(-1, keepdim=True)
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight.to(work)
        y = y if bias is None else y + bias.to(work)
    if positions is None:
        return y.to(x.dtype)
    assert frequencies is not None, "positions come with frequencies"
    turned = []
    for axis, half in enumerate(y.chunk(2, dim=-1)):
        first, second = half.chunk(2, dim=-1)  # [B, H, N, D / 4]
        angle = positions[:, None, :, axis, None].to(work) * frequencies.to(work)  # [1 or B, 1, N, D / 4]
        cos, sin = angle.cos(), angle.sin()
        turned += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned, dim=-1).to(x.dtype)
