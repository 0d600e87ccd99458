"""Stand-ins for attention under other names, of which the structure is known and the patch is not."""

import torch.nn.functional as F
from torch import nn

from . import croco
from .common import heads_of, joined
from .others import Plain


class CrossVit(nn.Module):
    """CrossViT's: ``wq, wk, wv``, one query."""

    def __init__(self, dim=64, num_heads=4):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (heads_of(p(y), self.num_heads) for p, y in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x)))
        return self.proj(joined((q @ k.mT * self.scale).softmax(dim=-1) @ v))


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class CrossRope(nn.Module):
    """Pi3's and Pi3X's: ``q_proj, k_proj, v_proj, proj``; the call may be in a function of the file."""

    def __init__(self, dim=64, num_heads=4, flash=True):
        super().__init__()
        self.num_heads, self.flash = num_heads, flash
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value, attn_bias=None, qpos=None, kpos=None):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads_of(p(x), self.num_heads) for p, x in zip(projections, (query, key, value), strict=True))
        return self.proj(joined(attention(q, k, v)))


class Neither(nn.Module):
    """A softmax over experts, and a product: no attention."""

    def __init__(self, dim=64):
        super().__init__()
        self.gate, self.quality = nn.Linear(dim, 3), nn.Linear(dim, 3 * dim)

    def forward(self, x):
        return (self.gate(x).softmax(-1)[..., None, :] @ self.quality(x).unflatten(-1, (3, -1))).squeeze(-2)


class Half(Plain):
    """A model of which a part is known."""

    def __init__(self, dim=64):
        super().__init__(dim)
        self.cross, self.crossvit, self.neither = CrossRope(dim), CrossVit(dim), Neither(dim)

    def forward(self, images):
        x = super().forward(images)["out"]
        x = x + self.cross(x, x.flip(1), x)
        return {"out": self.neither(x + self.crossvit(x))}


class AroundBlock(croco.DecoderBlock):
    """SLAM3R's: computes its cross-attention itself, with the parts of ``cross_attn``, whose forward is not called."""

    def forward(self, x, y, xpos, ypos):
        x = x + self.attn(self.norm1(x), xpos)
        y_, cross = self.norm_y(y), self.cross_attn
        q, k, v = cross.heads(self.norm2(x), y_, y_)
        q, k = cross.turn(q, xpos), cross.turn(k, ypos)
        x = x + cross.finish((q @ k.mT * cross.scale).softmax(-1) @ v)
        return x + self.mlp(self.norm3(x)), y


class Around(croco.Dust3r):
    decoder_block = AroundBlock


class Stateful(nn.Module):
    """SAIL-Recon's: what the module has seen is kept in it and shows in what later calls attend to."""

    def __init__(self, dim=64, num_heads=4):
        super().__init__()
        self.num_heads, self.context = num_heads, 0.0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, pos=None):
        x = x + self.context
        self.context = self.context + x.detach().mean((0, 1))
        q, k, v = (heads_of(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v)))


class TwoPaths(nn.Module):
    """Calls SDPA, unless it is told to write its attention out; takes a mask."""

    def __init__(self, dim=64, num_heads=4):
        super().__init__()
        self.num_heads, self.fused = num_heads, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, context=None):
        q, k, v = (heads_of(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            return self.proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)))
        return self.proj(joined((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v))
