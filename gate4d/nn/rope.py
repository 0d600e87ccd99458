"""Two-dimensional rotary position embeddings, in the two conventions of 3D reconstruction transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RoPE2D(nn.Module):
    """RoPE of the CroCo and VGGT families.

    The head dimension is split in two halves, the first rotated by y, the second by x; inside a half of D/2 features
    the pairs are ``(i, i + D/4)``, turned by ``position * scale * base ** (-4 i / D)``. Positions may be negative:
    CUT3R puts its pose token at -1. Angles are computed, not looked up, so that no position has to be read back
    from the device. There are no parameters, buffers or caches.

    Args:
        base: base of the frequencies.
        scale: factor of the frequencies (CroCo's ``F0``).
        exact: True computes in at least fp32 and rounds once, as CroCo's compiled extension does. False computes
            angles and rotation in the tokens' dtype, as the Python versions of CroCo, VGGT and Pi3 do, which
            quantises the angles of 16-bit tokens; in fp32 the two agree to rounding.
    """

    def __init__(self, base: float = 100.0, scale: float = 1.0, exact: bool = True):
        super().__init__()
        self.base = float(base)
        self.scale = float(scale)
        self.exact = bool(exact)

    def extra_repr(self) -> str:
        return f"base={self.base:g}, scale={self.scale:g}, exact={self.exact}"

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotates ``tokens [B, H, N, D]`` by ``positions [B or 1, N, 2]`` (y, x; integers); same shape and dtype.

        Raises:
            ValueError: D is no multiple of 4, or ``positions`` does not fit the tokens.
        """
        return _turn(tokens, *self.rotation(tokens, positions))

    def pair(self, q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None):
        """Rotates queries and keys; None leaves a side as it is. Angles are shared where the positions are."""
        shared = q_positions is k_positions and q.shape[-2:] == k.shape[-2:] and q.dtype == k.dtype
        if shared and q_positions is not None:
            rotation = self.rotation(q, q_positions)
            return _turn(q, *rotation), _turn(k, *rotation)
        q = q if q_positions is None else self(q, q_positions)
        return q, k if k_positions is None else self(k, k_positions)

    def rotation(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine ``[B or 1, 1, N, D]`` for tokens ``[B, H, N, D]`` at positions ``[B or 1, N, 2]``."""
        dim = tokens.shape[-1]
        if tokens.dim() != 4 or dim % 4:
            raise ValueError(f"tokens must have shape [B, H, N, D] with D a multiple of 4, got {list(tokens.shape)}.")
        batch, _, count, _ = tokens.shape
        if positions.dim() != 3 or positions.shape[0] not in (1, batch) or positions.shape[1:] != (count, 2):
            raise ValueError(f"positions must have shape [{batch}, {count}, 2], got {list(positions.shape)}.")
        work = torch.promote_types(tokens.dtype, torch.float32)
        exponent = torch.arange(0, dim // 2, 2, device=tokens.device, dtype=work) / (dim // 2)
        angles = positions[:, None, :, :, None].to(work) * (self.scale / self.base**exponent)  # [B, 1, N, 2, D/4]
        if not self.exact:
            angles = angles.to(tokens.dtype)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).flatten(-2), torch.cat((-sin, sin), dim=-1).flatten(-2)


def _turn(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = tokens.to(cos.dtype)
    a, b, c, d = x.chunk(4, dim=-1)
    other = torch.cat((b, a, d, c), dim=-1)
    if cos.dtype.itemsize < 4:  # in 16 bits addcmul rounds once, the models' own rotation rounds each product
        return x * cos + other * sin
    return torch.addcmul(x * cos, other, sin).to(tokens.dtype)


def rotate_last(tokens: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """RoPE of VGGT-Omega (DINOv3): given angles, pairs ``(i, i + D/2)``, leading special tokens not rotated.

    Args:
        tokens: ``[B, H, N, D]``; the last ``HW`` of the N tokens are rotated, in the dtype of ``sin``.
        sin, cos: ``[HW, D]`` or ``[B, HW, D]`` (a batch gets its head axis here).

    Raises:
        ValueError: there are more angles than tokens.
    """
    prefix = tokens.shape[-2] - sin.shape[-2]
    if prefix < 0:
        raise ValueError(f"sin and cos must cover at most the {tokens.shape[-2]} tokens, got {sin.shape[-2]} rows.")
    if sin.dim() == 3:
        sin, cos = sin[:, None], cos[:, None]
    special, patches = tokens.split((prefix, sin.shape[-2]), dim=-2)
    first, second = patches.to(sin.dtype).chunk(2, dim=-1)
    turned = patches.to(sin.dtype) * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((special, turned.to(tokens.dtype)), dim=-2)
