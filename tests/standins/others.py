"""Stand-ins for Pi3 and VGGT-Omega, and models that follow a pattern without belonging to a family."""

import torch
import torch.nn.functional as F
from torch import nn

from . import vggt
from .common import Mlp, Patches, Rotary, Scale, heads_of, joined


class DinoAttention(vggt.Base):
    """DINOv2 as Pi3 ships it: no norms, attention written out."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        del self.q_norm, self.k_norm, self.rope, self.fused_attn, self.head_dim

    def forward(self, x, attn_bias=None):
        q, k, v = self.heads(x)
        return self.finish((q * self.scale @ k.mT).softmax(-1) @ v)


class Pi3Attention(vggt.Base):
    def forward(self, x, attn_bias=None, xpos=None):
        q, k, v = self.heads(x)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope is not None:
            q, k = self.rope(q, xpos), self.rope(k, xpos)
        with nn.attention.sdpa_kernel([nn.attention.SDPBackend.MATH]):
            return self.finish(F.scaled_dot_product_attention(q, k, v))


class Pi3Encoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.patches = Patches(dim, 14)
        self.blocks = nn.ModuleList(vggt.Block(dim, 4) for _ in range(2))
        for block in self.blocks:
            block.attn = DinoAttention(dim, 4)

    def forward(self, images):
        x, pos = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return x, pos


class Pi3(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.rope = Rotary()
        self.encoder = Pi3Encoder(dim)
        self.register_token = nn.Parameter(torch.randn(1, 5, dim))
        self.decoder = nn.ModuleList(vggt.Block(dim, 4, Pi3Attention, rope=self.rope) for _ in range(4))
        self.point_decoder = nn.Module()
        self.point_decoder.blocks = nn.ModuleList([vggt.Block(dim, 4, Pi3Attention, False, self.rope)])
        self.camera_decoder = nn.Module()
        self.camera_decoder.blocks = nn.ModuleList([vggt.Block(dim, 4, Pi3Attention, False, self.rope)])
        self.head = nn.Linear(dim, 4)

    def forward(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.encoder(images.flatten(0, 1))
        x = torch.cat((self.register_token.expand(len(x), -1, -1), x), dim=1)
        pos = torch.cat((torch.zeros_like(pos[:, :1]).expand(-1, 5, -1), pos + 1), dim=1)
        for i, block in enumerate(self.decoder):
            rows = batch if i % 2 else batch * frames
            x, pos = x.reshape(rows, -1, x.shape[-1]), pos.reshape(rows, -1, 2)
            x = block(x, xpos=pos)
        x, pos = x.reshape(batch * frames, -1, x.shape[-1]), pos.reshape(batch * frames, -1, 2)
        return {
            "points": self.head(self.point_decoder.blocks[0](x, xpos=pos)),
            "camera": self.head(self.camera_decoder.blocks[0](x, xpos=pos)),
        }


class MaskedBias(nn.Linear):
    def __init__(self, dim, out):
        super().__init__(dim, out)
        mask = torch.ones(out)
        mask[out // 3 : 2 * out // 3] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class OmegaAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale, self.use_qk_norm = num_heads, (dim // num_heads) ** -0.5, True
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)
        self.qkv, self.proj = MaskedBias(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, attn_bias=None, rope=None):
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), attn_bias, rope)))

    def forward_list(self, x_list, attn_bias=None, rope_list=None):
        outputs = (self.compute_attention(self.qkv(x), attn_bias, r) for x, r in zip(x_list, rope_list, strict=True))
        return [self.proj(x) for x in outputs]

    def compute_attention(self, qkv, attn_bias=None, rope=None):
        assert attn_bias is None
        q, k, v = (heads_of(x, self.num_heads) for x in qkv.chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.turn(q, *rope), self.turn(k, *rope)
        return joined(F.scaled_dot_product_attention(q, k, v))

    def turn(self, x, sin, cos):
        prefix, half = x.shape[2] - len(sin), x.shape[3] // 2
        a, b = x[:, :, prefix:, :half], x[:, :, prefix:, half:]
        s, c = sin[:, :half], cos[:, :half]  # the angles are tiled twice
        return torch.cat((x[:, :, :prefix], torch.cat((a * c - b * s, b * c + a * s), dim=-1)), dim=2)


class OmegaBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.ls1 = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim), Scale(dim)
        self.attn = OmegaAttention(dim, 4)

    def forward(self, x, rope=None):
        x = x + self.ls1(self.attn.forward_list([self.norm1(x)], rope_list=[rope])[0])
        return x + self.mlp(self.norm2(x))


class Omega(nn.Module):
    """17 special tokens a frame; in the last inter-frame block the special tokens of all frames attend alone."""

    special = 17

    def __init__(self, dim=64):
        super().__init__()
        self.aggregator = nn.Module()
        self.aggregator.patch_embed = Patches(dim, 16)
        self.aggregator.token = nn.Parameter(torch.randn(1, self.special, dim))
        self.aggregator.frame_blocks = nn.ModuleList(OmegaBlock(dim) for _ in range(2))
        self.aggregator.inter_frame_blocks = nn.ModuleList(OmegaBlock(dim) for _ in range(2))
        self.head = nn.Linear(dim, 4)

    def forward(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.aggregator.patch_embed(images.flatten(0, 1))
        angle = (pos[0, :, :, None] * torch.arange(1.0, 5.0) / 4).flatten(1).repeat(1, 2).to(x.dtype)  # [HW, 16]
        x = torch.cat((self.aggregator.token.expand(len(x), -1, -1), x), dim=1)
        size = x.shape[1]
        for i in range(2):
            x = self.aggregator.frame_blocks[i](x.reshape(batch * frames, size, -1), (angle.sin(), angle.cos()))
            x = x.reshape(batch, frames, size, -1)
            part = x if i == 0 else x[:, :, : self.special]
            new = self.aggregator.inter_frame_blocks[i](part.flatten(1, 2)).reshape(part.shape)
            x = new if i == 0 else torch.cat((new, x[:, :, self.special :]), dim=2)
        return {"out": self.head(x)}


class PlainAttention(nn.Module):
    """A vision transformer's attention under the usual names, with an argument nobody has seen."""

    def __init__(self, dim, num_heads, written_out):
        super().__init__()
        self.num_heads, self.written_out = num_heads, written_out
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, flag=False):
        q, k, v = (heads_of(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        if not self.written_out:
            return self.proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)))
        return self.proj(joined((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v))


class Plain(nn.Module):
    def __init__(self, dim=64, written_out=False):
        super().__init__()
        self.patches = Patches(dim, 16)
        self.blocks = nn.ModuleList(PlainAttention(dim, 4, written_out) for _ in range(2))

    def forward(self, images):
        x, _ = self.patches(images.flatten(0, 1))
        for block in self.blocks:
            x = x + block(x)
        return {"out": x}
