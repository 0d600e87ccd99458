"""Backbones with random weights on which the systems are measured: a decoder of two branches, and one of VGGT's shape.

The decoder is that of DUSt3R and CUT3R at true width: each branch attends to itself and to the other. Its attention is
an argument. The second is a whole model in VGGT's structure, which :func:`gate4d.patch` recognises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gate4d.nn import RoPE2D

# (branch, layer, "self" or "cross", q, k, v), each [B, H, N, D], to out [B, H, Nq, D]
Attend = Callable[[int, int, str, Tensor, Tensor, Tensor], Tensor]
SPECIAL = 5


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Branch(nn.Module):
    """A decoder layer: self-attention, cross-attention to the other branch, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q, self.kv, self.cross = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = _mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor, attend: Callable[[str, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = (_heads(y, self.heads) for y in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.proj(attend("self", q, k, v).transpose(1, 2).flatten(2))
        k, v = (_heads(y, self.heads) for y in self.kv(self.norms[2](other)).chunk(2, -1))
        q = _heads(self.q(self.norms[1](x)), self.heads)
        x = x + self.cross(attend("cross", q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[3](x))


class Decoder(nn.Module):
    """Two branches of ``depth`` layers; every layer sees the other branch's tokens of the layer before.

    Args:
        heads: of the two branches.
        width, depth: of both.
    """

    def __init__(self, heads: tuple[int, int], width: int, depth: int):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.ModuleList(Branch(width, h) for _ in range(depth)) for h in heads)

    def forward(self, x: Tensor, y: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        for layer, (one, two) in enumerate(zip(*self.branches, strict=True)):
            x, y = (
                branch(a, b, lambda *call, n=n, layer=layer: attend(n, layer, *call))
                for n, branch, a, b in ((0, one, x, y), (1, two, y, x))
            )
        return x, y


class Attention(nn.Module):
    """VGGT's: packed projection, LayerNorm on q and k, RoPE, SDPA."""

    def __init__(self, width: int, heads: int, rope: nn.Module):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.rope = rope

    def features(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k after norm and RoPE, and v."""
        q, k, v = (_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        return self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos), v

    def finish(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.finish(F.scaled_dot_product_attention(*self.features(x, pos)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rope: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), _mlp(width)
        self.attn = Attention(width, heads, rope)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), pos=pos)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """The patch encoder: a convolution and two blocks (VGGT: 24)."""

    def __init__(self, width: int, heads: int, patch: int, rope: nn.Module):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads, rope) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.proj(images)
        pos = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in x.shape[2:])).expand(len(x), -1, 2)
        x = x.flatten(2).mT
        for block in self.blocks:
            x = block(x, pos)
        return x, pos


class Aggregator(nn.Module):
    """Alternating frame and global blocks; keeps the tokens of every pair of blocks, as VGGT does."""

    def __init__(self, width: int, heads: int, depth: int, patch: int):
        super().__init__()
        self.patch_start_idx, self.patch_size = SPECIAL, patch
        rope = RoPE2D()
        self.patch_embed = Patches(width, heads, patch, rope)
        self.frame_blocks = nn.ModuleList(Block(width, heads, rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(width, heads, rope) for _ in range(depth))
        self.special = nn.Parameter(torch.randn(1, SPECIAL, width))

    def forward(self, images: Tensor) -> list[Tensor]:
        batch, frames = images.shape[:2]
        x, pos = self.patch_embed(images.flatten(0, 1))
        pos = torch.cat((torch.zeros_like(pos[:, :1]).expand(-1, SPECIAL, -1), pos + 1), dim=1)
        x = torch.cat((self.special.expand(len(x), -1, -1), x), dim=1)
        size, everywhere, outputs = x.shape[1], pos.reshape(batch, -1, 2), []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            inside = x = frame_block(x, pos=pos)
            x = global_block(x.reshape(batch, frames * size, -1), pos=everywhere).view_as(x)
            outputs.append(torch.cat((inside, x), -1).unflatten(0, (batch, frames)))  # [B, T, P, 2 C]
        return outputs


class Vggt(nn.Module):
    """VGGT's structure and its predictions: a pose encoding a frame, depth, points and confidences a pixel.

    Args:
        width, heads, depth: VGGT has 1024, 16 and 24.
        patch: side in pixels; VGGT's 14 at a width of 1024 is about ``0.44 sqrt(width)``.
    """

    def __init__(self, width: int, heads: int, depth: int, patch: int):
        super().__init__()
        torch.manual_seed(0)
        self.aggregator = Aggregator(width, heads, depth, patch)
        self.camera_head = nn.Linear(2 * width, 9)
        self.dense_head = nn.Linear(2 * width, 6 * patch**2)
        for block in [*self.aggregator.frame_blocks, *self.aggregator.global_blocks]:
            nn.init.normal_(block.attn.qkv.weight, std=2 * width**-0.5)  # enough contrast for saliency

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens, side = self.aggregator(images)[-1], self.aggregator.patch_size
        grid = [n // side for n in images.shape[-2:]]
        pose = self.camera_head(tokens[:, :, 0])
        dense = images.new_empty((*images.shape[:2], *images.shape[-2:], 6))
        for begin in range(0, images.shape[1], 8):  # frame chunks, as VGGT's heads
            x = self.dense_head(tokens[:, begin : begin + 8, SPECIAL:]).unflatten(-1, (6, side, side))
            x = x.unflatten(2, grid).permute(0, 1, 2, 5, 3, 6, 4).flatten(4, 5).flatten(2, 3)
            dense[:, begin : begin + 8] = x
        return {
            "pose_enc": torch.cat((pose[..., :6], pose[..., 6:7] + 3, pose[..., 7:].sigmoid() + 0.5), -1),
            "depth": dense[..., :1].exp(), "depth_conf": dense[..., 1].exp(),
            "world_points": dense[..., 2:5].clone(), "world_points_conf": dense[..., 5].exp(), "images": images,
        }  # fmt: skip
