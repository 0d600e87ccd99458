"""Self- and cross-attention modules with a motion gate, visibility and statistics taps.

They have the parameters (and so the state_dict) of the modules they stand for: ``qkv, proj`` and optional
``q_norm, k_norm`` for self-attention, ``projq, projk, projv, proj`` for cross-attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..visibility import Visibility
from .cache import FrameKVCache, Slot, capturing
from .control import AttentionControl, Gate
from .norm_rope import apply_fused, fuses
from .rope import RoPE2D


def split_qkv(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, N, 3 * H * D]`` to views q, k, v of ``[B, H, N, D]``, read in place by the kernels."""
    return packed.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H * D]`` to a view ``[B, H, N, D]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def fused_heads(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    norms: tuple[nn.Module, nn.Module],
    rope: RoPE2D | None,
    positions: tuple[Tensor | None, Tensor | None],
    cache: FrameKVCache | None = None,
) -> tuple[Tensor, Tensor, Tensor, FrameKVCache | Slot | None]:
    """q and k after norm and RoPE by one kernel each, where it :func:`fuses`, v, and where the frame goes.

    Without gradients, where the cache stores this dtype and no CUDA graph is captured, keys and values are written into
    its next slot, which is returned in the place of the cache; what is returned for k and v is that memory.
    """
    q = apply_fused(q, norms[0], rope, positions[0])
    if cache is None or cache.frozen or torch.is_grad_enabled() or cache.stores(v.dtype) != k.dtype or capturing(k):
        return q, apply_fused(k, norms[1], rope, positions[1]), v, cache
    slot = cache.claim(k, v)
    return q, apply_fused(k, norms[1], rope, positions[1], out=slot.k), slot.v.copy_(v), slot


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads={num_heads}, got {dim}.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.rope = rope
        self.control = AttentionControl()


class SelfAttention(_Attention):
    """Self-attention with packed projections: qkv, optional q/k-norm, RoPE, attention, proj.

    On a GPU norm and RoPE are one kernel each for q and k, which writes keys straight into the cache if there is one.
    That kernel has not run on a GPU yet.

    Args:
        dim: features C of a token.
        num_heads: heads H; ``dim`` is a multiple of it.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: LayerNorm over the head dimension of q and k, before RoPE.
        rope: a :class:`RoPE2D` (or a module called in the same way), or None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        rope: RoPE2D | None = None,
    ):
        super().__init__(dim, num_heads, rope)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        *,
        gate: Gate = None,
        visible: Visibility | None = None,
        cache: FrameKVCache | None = None,
    ) -> Tensor:
        """``x [B, N, C]`` and positions ``[B, N, 2]`` to ``[B, N, C]``; see :meth:`AttentionControl.attend`."""
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        pos = None if self.rope is None else pos
        if fuses(q, self.q_norm, self.rope) and fuses(k, self.k_norm, self.rope):
            q, k, v, cache = fused_heads(q, k, v, (self.q_norm, self.k_norm), self.rope, (pos, pos), cache)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
            if pos is not None:
                q, k = self.rope.pair(q, k, pos, pos)
        return self.proj(self.control.attend(q, k, v, scale=self.scale, gate=gate, visible=visible, cache=cache))


class CrossAttention(_Attention):
    """Cross-attention with separate projections: projq, projk, projv, RoPE on either side, attention, proj.

    Args:
        dim: features C of a token.
        num_heads: heads H; ``dim`` is a multiple of it.
        qkv_bias: whether projq, projk and projv have a bias.
        rope: a :class:`RoPE2D`, or None.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, rope: RoPE2D | None = None):
        super().__init__(dim, num_heads, rope)
        self.projq = nn.Linear(dim, dim, bias=qkv_bias)
        self.projk = nn.Linear(dim, dim, bias=qkv_bias)
        self.projv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        qpos: Tensor | None = None,
        kpos: Tensor | None = None,
        *,
        gate: Gate = None,
        visible: Visibility | None = None,
    ) -> Tensor:
        """``query [B, Nq, C]``, ``key``, ``value [B, Nk, C]`` and their positions ``[B, N, 2]`` to ``[B, Nq, C]``."""
        q = split_heads(self.projq(query), self.num_heads)
        k = split_heads(self.projk(key), self.num_heads)
        v = split_heads(self.projv(value), self.num_heads)
        if self.rope is not None:
            q, k = self.rope.pair(q, k, qpos, kpos)
        return self.proj(self.control.attend(q, k, v, scale=self.scale, gate=gate, visible=visible))
