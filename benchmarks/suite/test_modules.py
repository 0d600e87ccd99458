"""Attention modules and the frame cache against the same parameters with SDPA."""

import pytest
import torch
import torch.nn.functional as F

from gate4d.benchmarks.check import Expected
from gate4d.benchmarks.registry import SHAPES
from gate4d.nn import CrossAttention, FrameKVCache, RoPE2D, SelfAttention
from gate4d.nn.attention import split_heads, split_qkv


def agree(ours, peer, double, summands):
    """Both outputs against the same module in float64."""
    expected = Expected(("out",), (double,), (peer()[0],), summands)
    expected.verify("gate4d", ours(), peer=True)


@pytest.mark.parametrize("name", ["vggt.frame", "cut3r.state"])
@torch.inference_mode()
def test_self_attention(name, versus):
    shape = SHAPES[name]
    torch.manual_seed(0)
    module = SelfAttention(shape.width, shape.heads, qk_norm=name.startswith("vggt"), rope=RoPE2D()).eval()
    x, pos = torch.randn(1, shape.queries, shape.width), torch.randint(0, 28, (1, shape.queries, 2))

    def plain(m, x):
        q, k, v = split_qkv(m.qkv(x), m.num_heads)
        q, k = m.rope.pair(m.q_norm(q), m.k_norm(k), pos, pos)
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    ours, peer = lambda: (module(x, pos),), lambda: (plain(module, x),)
    results = ours(), peer()
    double = plain(module.double(), x.double())
    module.float()
    agree(lambda: results[0], lambda: results[1], double, shape.width)
    versus(ours, peer)


@torch.inference_mode()
def test_cross_attention(versus):
    shape = SHAPES["cut3r.state_image"]
    torch.manual_seed(0)
    module = CrossAttention(shape.width, shape.heads, rope=RoPE2D()).eval()
    x, y = torch.randn(1, shape.queries, shape.width), torch.randn(1, shape.keys, shape.width)
    qpos, kpos = (torch.randint(-1, 28, (1, n, 2)) for n in (shape.queries, shape.keys))

    def plain(m, x, y):
        q, k, v = (split_heads(p(t), m.num_heads) for p, t in ((m.projq, x), (m.projk, y), (m.projv, y)))
        q, k = m.rope.pair(q, k, qpos, kpos)
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    ours, peer = lambda: (module(x, y, y, qpos, kpos),), lambda: (plain(module, x, y),)
    results = ours(), peer()
    double = plain(module.double(), x.double(), y.double())
    module.float()
    agree(lambda: results[0], lambda: results[1], double, shape.width)
    versus(ours, peer)


@torch.inference_mode()
def test_cache(versus):
    """Eight more frames on a stream of sixteen: pages against concatenation."""
    shape = SHAPES["streamvggt.cached"].scaled(4)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 24, 1, shape.heads, shape.queries, shape.head_dim).unbind(0)

    def paged():
        cache = FrameKVCache()
        for t in range(24):
            cache.append(k[t], v[t])
            out = cache.attend(q[t]) if t >= 16 else None
        return (out,)

    def concatenated(q=q, k=k, v=v):
        keys, values = k[0], v[0]
        for t in range(1, 24):
            keys, values = torch.cat((keys, k[t]), 2), torch.cat((values, v[t]), 2)
            out = F.scaled_dot_product_attention(q[t], keys, values) if t >= 16 else None
        return (out,)

    (double,) = concatenated(q.double(), k.double(), v.double())
    agree(paged, concatenated, double, 24 * shape.keys)
    versus(paged, concatenated)
