"""A VGGT-shaped alternating-attention stack with random weights, and three ways of computing its gated attention.

Tokens of a frame: one camera token, four register tokens, then the patches in row-major order. Blocks alternate
between attention inside each frame and attention over the clip; both are gated by the tokens' motion scores, and
the blocks over the clip are causal over frames. The attention is a parameter of the forward pass, so that
implementations can be compared on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gate4d import MotionGate, TokenLayout, Visibility, gated_attention

SPECIAL_TOKENS = 5
# (q, k, v), each [B, H, N, D], to out [B, H, N, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (motion [B, N], visible, strength) to an Attend: what can be shared by the layers is made once a forward pass
Implementation = Callable[[Tensor, Visibility, float], Attend]


def gate4d_attention(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """The gate applied on the fly: nothing of size N x N exists with the compiled backends."""
    gate = MotionGate.pairwise(motion, strength=strength)
    return lambda q, k, v: gated_attention(q, k, v, gate=gate, visible=visible)


def dense_bias(motion: Tensor, visible: Visibility, strength: float) -> Tensor:
    """The gate and the visibility as the papers write them, an additive bias ``[B, 1, N, N]``.

    ``strength * log(1 - (1 - g_i) g_j)`` where visible, ``-inf`` elsewhere; ``motion`` is ``[B, N]``.
    """
    weight = 1 - (1 - motion)[:, :, None] * motion[:, None, :]  # [B, N, N]
    bias = torch.xlogy(strength, weight)  # 0, not NaN, for strength 0 at a weight of 0
    if visible.bounds is not None:
        tokens = motion.shape[1]
        bias.masked_fill_(~visible.dense(tokens, tokens), -torch.inf)
    return bias[:, None]


def masked_sdpa(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """``F.scaled_dot_product_attention`` with the dense bias."""
    bias = dense_bias(motion, visible, strength)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def materialised(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """The attention maps of all heads ``[B, H, N, N]`` in memory, as code that reads attention maps has them."""
    bias = dense_bias(motion, visible, strength)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(logits.add_(bias), dim=-1) @ v

    return attend


IMPLEMENTATIONS: dict[str, Implementation] = {
    "maps": materialised,
    "SDPA + mask": masked_sdpa,
    "gate4d": gate4d_attention,
}


def scaled_normal_(model: nn.Module, seed: int) -> None:
    """Random weights with fan-in scaling, so that signals neither vanish nor blow up; biases of layers are 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block with q/k normalisation."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # x [B, N, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self.q_norm(q), self.k_norm(k), v)  # [B, H, N, D]
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class AlternatingStack(nn.Module):
    """Patch embedding, special tokens, and ``pairs`` of a frame block and a clip block.

    Args:
        pairs: VGGT has 24.
        heads, head_dim: VGGT has 16 of 64.
        patch: side of a patch in pixels.
        seed: of the random weights.
    """

    def __init__(self, pairs: int = 1, heads: int = 16, head_dim: int = 64, patch: int = 14, seed: int = 0):
        super().__init__()
        dim = heads * head_dim
        self.patch = patch
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.special = nn.Parameter(torch.empty(SPECIAL_TOKENS, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(2 * pairs))
        self.norm = nn.LayerNorm(dim)
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


def pool_to_patches(scores: Tensor, patch: int) -> Tensor:
    """Mean of pixel scores ``[T, H, W]`` over each patch: ``[T, patches]``, row-major."""
    return F.avg_pool2d(scores.float()[:, None], patch).flatten(1)


def frame_difference(frames: Tensor, patch: int) -> Tensor:
    """A cheap motion cue for clips without a true mask: ``[T, patches]`` in [0, 1] from frames ``[T, H, W, 3]``.

    The smaller of the mean absolute differences to the previous and to the next frame, scaled so that the median
    patch of a frame gets 0 and the 98th percentile 1. It answers to camera motion, shadows and flicker as well.
    """
    gray = frames.float().mean(-1)
    step = pool_to_patches((gray[1:] - gray[:-1]).abs(), patch)  # [T - 1, patches]
    change = torch.minimum(torch.cat((step[:1], step)), torch.cat((step, step[-1:])))
    low, high = change.quantile(0.5, 1, keepdim=True), change.quantile(0.98, 1, keepdim=True)
    return ((change - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
