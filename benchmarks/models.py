"""Networks with random weights, in the shapes of the models that gate4d serves: what the benchmarks and the demo run.

- :class:`AlternatingStack`: VGGT's blocks inside a frame and over the clip, the attention a parameter.
- :class:`DecoderPair`: the two-branch decoder of DUSt3R and CUT3R, the attention a parameter.
- :class:`Vggt`: a whole model in VGGT's structure, which :func:`gate4d.patch` recognises.
- :class:`StreamBlock`, :class:`ModuleDecoder`: a streaming block and a decoder made of gate4d's own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gate4d import TokenLayout, Visibility
from gate4d.nn import CrossAttention, FrameKVCache, RoPE2D, SelfAttention

SPECIAL_TOKENS = 5  # VGGT's: one camera token, four register tokens
# (q, k, v), each [B, H, N, D], to out [B, H, Nq, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (motion [B, N], visible, strength) to an Attend: what can be shared by the layers is made once a forward pass
Implementation = Callable[[Tensor, Visibility, float], Attend]
# (branch, layer, "self" or "cross", q, k, v) to out: an Attend that knows where it is in a decoder
DecoderAttend = Callable[[int, int, str, Tensor, Tensor, Tensor], Tensor]


def scaled_normal_(model: nn.Module, seed: int) -> None:
    """Random weights with fan-in scaling, so that signals neither vanish nor blow up; biases of layers are 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, C]`` to ``[B, heads, N, C / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, N, D]`` to ``[B, N, H D]``."""
    return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """The MLP of a transformer block, without its norm."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


# VGGT's blocks with the attention as a parameter.


class GatedBlock(nn.Module):
    """Pre-norm transformer block with q/k normalisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # x [B, N, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(merge_heads(attend(self.q_norm(q), self.k_norm(k), v)))
        return x + self.mlp(self.norm2(x))


class AlternatingStack(nn.Module):
    """Patch embedding, special tokens, and ``pairs`` of a block inside each frame and a block over the clip.

    Tokens of a frame: the special tokens, then the patches in row-major order. All blocks are gated by the tokens'
    motion scores; those over the clip are causal over frames. The attention is a parameter of the forward pass, so that
    implementations can be compared on the same weights.

    Args:
        pairs: VGGT has 24.
        heads, head_dim: VGGT has 16 of 64.
        patch: side of a patch in pixels.
        seed: of the random weights.
    """

    def __init__(self, pairs: int = 1, heads: int = 16, head_dim: int = 64, patch: int = 14, seed: int = 0):
        super().__init__()
        width = heads * head_dim
        self.patch = patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.special = nn.Parameter(torch.empty(SPECIAL_TOKENS, width))
        self.blocks = nn.ModuleList(GatedBlock(width, heads) for _ in range(2 * pairs))
        self.norm = nn.LayerNorm(width)
        scaled_normal_(self, seed)

    def layout(self, frames: Tensor) -> TokenLayout:
        """Token layout of frames ``[T, H, W, 3]``."""
        t, h, w, _ = frames.shape
        return TokenLayout(t, SPECIAL_TOKENS + (h // self.patch) * (w // self.patch), SPECIAL_TOKENS)

    def forward(
        self,
        frames: Tensor,  # [T, H, W, 3] uint8
        motion: Tensor,  # [T, patches] in [0, 1]
        implementation: Implementation,
        *,
        strength: float = 1.0,
        window: int | None = None,
        sinks: int = 0,
    ) -> Tensor:
        """Tokens ``[T, tokens per frame, C]`` after the last block."""
        layout = self.layout(frames)
        images = frames.permute(0, 3, 1, 2).to(self.special.dtype) / 127.5 - 1
        x = self.embed(images).flatten(2).transpose(1, 2)  # [T, patches, C]
        x = torch.cat((self.special.expand(layout.frames, -1, -1), x), dim=1)
        scores = layout.token_scores(motion[None])  # [1, N]
        in_frame = implementation(scores.view(layout.frames, -1), Visibility.full(), strength)
        causal = Visibility.frame_causal(layout, window=window, sinks=sinks)
        over_clip = implementation(scores, causal, strength)
        for frame_block, clip_block in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = frame_block(x, in_frame)
            x = clip_block(x.flatten(0, 1)[None], over_clip).view_as(x)
        return self.norm(x)


# The decoder of the CroCo family with the attention as a parameter.


class CrossLayer(nn.Module):
    """A decoder layer of one branch: self-attention, cross-attention to the other branch, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm_y, self.norm3 = (nn.LayerNorm(width) for _ in range(4))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.projq, self.projk, self.projv, self.cross_proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, y: Tensor, attend: Attend, cross: Attend) -> Tensor:  # [B, N, C], [B, M, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(merge_heads(attend(q, k, v)))
        y = self.norm_y(y)
        sides = (self.projq, self.norm2(x)), (self.projk, y), (self.projv, y)
        q, k, v = (split_heads(proj(z), self.heads) for proj, z in sides)
        x = x + self.cross_proj(merge_heads(cross(q, k, v)))
        return x + self.mlp(self.norm3(x))


class DecoderPair(nn.Module):
    """Two branches of ``depth`` layers; every layer sees the other branch's tokens of the layer before.

    Args:
        heads: of the two branches.
        width, depth: of both.
    """

    def __init__(self, heads: tuple[int, int], width: int, depth: int):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.ModuleList(CrossLayer(width, h) for _ in range(depth)) for h in heads)

    def forward(self, x: Tensor, y: Tensor, attend: DecoderAttend) -> tuple[Tensor, Tensor]:
        """The tokens ``[B, N, C]`` of both branches after the last layer."""
        for n, (one, two) in enumerate(zip(*self.branches, strict=True)):
            (self_one, cross_one), (self_two, cross_two) = (
                [partial(attend, branch, n, kind) for kind in ("self", "cross")] for branch in (0, 1)
            )
            x, y = one(x, y, self_one, cross_one), two(y, x, self_two, cross_two)
        return x, y


# A whole model in VGGT's structure.


class VggtAttention(nn.Module):
    """VGGT's: packed projection, LayerNorm on q and k, RoPE, SDPA."""

    def __init__(self, width: int, heads: int, rope: nn.Module):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.rope = rope

    def features(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k after norm and RoPE, and v."""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        return self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos), v

    def finish(self, x: Tensor) -> Tensor:
        """The projection of ``[B, H, N, D]``."""
        return self.proj(merge_heads(x))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.finish(F.scaled_dot_product_attention(*self.features(x, pos)))


class VggtBlock(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self, width: int, heads: int, rope: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), FeedForward(width)
        self.attn = VggtAttention(width, heads, rope)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), pos=pos)
        return x + self.mlp(self.norm2(x))


class VggtPatches(nn.Module):
    """The patch encoder: a convolution and two blocks (VGGT: 24)."""

    def __init__(self, width: int, heads: int, patch: int, rope: nn.Module):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(VggtBlock(width, heads, rope) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.proj(images)
        pos = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in x.shape[2:])).expand(len(x), -1, 2)
        x = x.flatten(2).mT
        for block in self.blocks:
            x = block(x, pos)
        return x, pos


class VggtAggregator(nn.Module):
    """Alternating frame and global blocks; keeps the tokens of every pair of blocks, as VGGT does."""

    def __init__(self, width: int, heads: int, depth: int, patch: int):
        super().__init__()
        self.patch_start_idx, self.patch_size = SPECIAL_TOKENS, patch
        rope = RoPE2D()
        self.patch_embed = VggtPatches(width, heads, patch, rope)
        self.frame_blocks = nn.ModuleList(VggtBlock(width, heads, rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(VggtBlock(width, heads, rope) for _ in range(depth))
        self.special = nn.Parameter(torch.randn(1, SPECIAL_TOKENS, width))

    def forward(self, images: Tensor) -> list[Tensor]:
        batch, frames = images.shape[:2]
        x, pos = self.patch_embed(images.flatten(0, 1))
        pos = torch.cat((torch.zeros_like(pos[:, :1]).expand(-1, SPECIAL_TOKENS, -1), pos + 1), dim=1)
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
        patch: side in pixels; VGGT's 14 at a width of 1024 is about ``0.44 sqrt(width)``, the default.
    """

    def __init__(self, width: int, heads: int, depth: int, patch: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        patch = round(0.44 * width**0.5) if patch is None else patch
        self.aggregator = VggtAggregator(width, heads, depth, patch)
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
            x = self.dense_head(tokens[:, begin : begin + 8, SPECIAL_TOKENS:]).unflatten(-1, (6, side, side))
            x = x.unflatten(2, grid).permute(0, 1, 2, 5, 3, 6, 4).flatten(4, 5).flatten(2, 3)
            dense[:, begin : begin + 8] = x
        return {
            "pose_enc": torch.cat((pose[..., :6], pose[..., 6:7] + 3, pose[..., 7:].sigmoid() + 0.5), -1),
            "depth": dense[..., :1].exp(), "depth_conf": dense[..., 1].exp(),
            "world_points": dense[..., 2:5].clone(), "world_points_conf": dense[..., 5].exp(), "images": images,
        }  # fmt: skip


# Blocks made of gate4d's own modules.


class StreamBlock(nn.Module):
    """A global block of a streaming model with its cache."""

    def __init__(self, width: int, heads: int, *, window: int, anchors: int):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), FeedForward(width)
        self.attn = SelfAttention(width, heads, qk_norm=True, rope=RoPE2D())
        self.cache = FrameKVCache(window=window, anchors=anchors)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), pos, cache=self.cache)
        return x + self.mlp(self.norm2(x))


class ModuleDecoder(nn.Module):
    """CUT3R's pair of decoders: state and image look at themselves and at each other, layer by layer."""

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(self._side(width, heads) for _ in range(2)) for _ in range(depth))

    @staticmethod
    def _side(width: int, heads: int) -> nn.ModuleDict:
        rope = RoPE2D()
        norms = {name: nn.LayerNorm(width) for name in ("norm1", "norm2", "norm_y", "norm3")}
        return nn.ModuleDict(
            {
                **norms,
                "self": SelfAttention(width, heads, rope=rope),
                "cross": CrossAttention(width, heads, rope=rope),
                "mlp": FeedForward(width),
            }
        )

    def forward(self, state: Tensor, image: Tensor, pos: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        for sides in self.layers:
            both = state, image
            state, image = (self._step(side, both[i], both[1 - i], pos[i], pos[1 - i]) for i, side in enumerate(sides))
        return state, image

    @staticmethod
    def _step(side: nn.ModuleDict, x: Tensor, y: Tensor, xpos: Tensor, ypos: Tensor) -> Tensor:
        x = x + side["self"](side["norm1"](x), xpos)
        y = side["norm_y"](y)
        x = x + side["cross"](side["norm2"](x), y, y, xpos, ypos)
        return x + side["mlp"](side["norm3"](x))
