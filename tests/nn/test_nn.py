"""RoPE against its definition, and the drop-in modules against attention written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from standins.common import Rotary, heads_of, joined

import gate4d
from gate4d.nn import CrossAttention, FrameKVCache, RoPE2D, SelfAttention, rotate_last


@pytest.mark.parametrize("dim", [16, 48, 64])
def test_rope_by_definition(dim):
    tokens = torch.randn(2, 3, 7, dim, dtype=torch.float64)
    positions = torch.randint(-1, 30, (2, 7, 2))
    positions[:, 0] = -1
    got = RoPE2D()(tokens, positions)
    for axis in (0, 1):
        for i in range(dim // 4):
            a, b = axis * dim // 2 + i, axis * dim // 2 + i + dim // 4
            angle = positions[..., axis].double() * 100.0 ** (-4 * i / dim)
            turn = torch.polar(torch.ones_like(angle), angle)[:, None]
            pair = torch.complex(tokens[..., a], tokens[..., b]) * turn
            assert torch.allclose(torch.view_as_real(pair), got[..., [a, b]], atol=1e-6)


def test_rope_relative_and_zero():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    rope, here, there = RoPE2D(), torch.tensor([[[5, 9]]]), torch.tensor([[[3, 10]]])
    product = (rope(q, here) * rope(k, there)).sum()
    shifted = (rope(q, here - 4) * rope(k, there - 4)).sum()  # negative positions among them
    assert torch.allclose(product, shifted, atol=1e-4)
    assert torch.equal(rope(q, torch.zeros(1, 1, 2, dtype=torch.long)), q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_16_bits(dtype):
    """exact=True rounds once; exact=False quantises angles as Python implementations in 16 bits do."""
    tokens = torch.randn(1, 2, 38, 32).to(dtype)
    positions = torch.arange(38)[None, :, None].expand(1, 38, 2)
    truth = RoPE2D()(tokens.double(), positions)
    once = (RoPE2D()(tokens, positions).double() - truth).abs().max()
    assert once <= torch.finfo(dtype).eps * truth.abs().max()
    quantised = RoPE2D(exact=False)(tokens, positions)
    theirs = Rotary(quantise=True)(tokens, positions)
    assert (quantised.double() - theirs.double()).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()
    assert (theirs.double() - truth).abs().max() > 2 * once


def test_rope_of_the_last_tokens():
    x, angles = torch.randn(2, 3, 9, 16), torch.rand(5, 8)
    sin, cos = angles.sin().repeat(1, 2), angles.cos().repeat(1, 2)
    got = rotate_last(x, sin, cos)
    assert torch.equal(got[:, :, :4], x[:, :, :4])
    pair = torch.complex(x[:, :, 4:, :8], x[:, :, 4:, 8:]) * torch.polar(torch.ones(5, 8), angles)
    assert torch.allclose(got[:, :, 4:], torch.cat((pair.real, pair.imag), dim=-1), atol=1e-6)
    assert torch.allclose(rotate_last(x, sin.expand(2, -1, -1), cos.expand(2, -1, -1)), got)
    assert rotate_last(x.bfloat16(), sin, cos).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="at most the 4 tokens, got 5 rows"):
        rotate_last(x[:, :, :4], sin, cos)


def test_rope_bad_input():
    rope, pos = RoPE2D(), torch.zeros(1, 4, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="D a multiple of 4"):
        rope(torch.zeros(1, 1, 4, 6), pos)
    with pytest.raises(ValueError, match=r"positions must have shape \[1, 5, 2\], got \[1, 4, 2\]"):
        rope(torch.zeros(1, 1, 5, 8), pos)


def written_out(module, x, pos):
    q, k, v = (heads_of(y, module.num_heads) for y in module.qkv(x).chunk(3, dim=-1))
    q, k = module.q_norm(q), module.k_norm(k)
    if pos is not None:
        q, k = Rotary()(q, pos), Rotary()(k, pos)
    return module.proj(joined((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [None, RoPE2D()])
def test_self_attention(qk_norm, rope):
    module = SelfAttention(32, 4, qk_norm=qk_norm, rope=rope)
    x, pos = torch.randn(2, 9, 32, requires_grad=True), torch.randint(-1, 6, (2, 9, 2))
    got, want = module(x, pos), written_out(module, x, None if rope is None else pos)
    assert torch.allclose(got, want, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    norms = {f"{n}.{p}" for n in ("q_norm", "k_norm") for p in ("weight", "bias")} if qk_norm else set()
    assert set(module.state_dict()) == names | norms
    assert torch.equal(copy.deepcopy(module)(x, pos), got)


def test_cross_attention():
    module = CrossAttention(32, 2, rope=RoPE2D())
    x, y = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    qpos, kpos = torch.randint(0, 6, (2, 5, 2)), torch.randint(-1, 6, (2, 7, 2))
    q, k, v = (heads_of(p(z), 2) for p, z in ((module.projq, x), (module.projk, y), (module.projv, y)))
    for positions in ((qpos, kpos), (None, kpos), (None, None)):
        a, b = (z if p is None else Rotary()(z, p) for z, p in zip((q, k), positions, strict=True))
        want = module.proj(joined(F.scaled_dot_product_attention(a, b, v)))
        assert torch.allclose(module(x, y, y, *positions), want, atol=1e-5)
    assert {n.split(".")[0] for n in module.state_dict()} == {"projq", "projk", "projv", "proj"}


def test_gate_visibility_and_observers():
    module = SelfAttention(32, 4)
    layout = gate4d.TokenLayout(3, 4)
    x, motion = torch.randn(1, 12, 32), torch.rand(1, 12)
    gate, visible = gate4d.MotionGate.pairwise(motion), gate4d.Visibility.frame_causal(layout)
    seen = []
    module.control.observers.append(lambda q, k, scale: seen.append((q, k, scale)))
    got = module(x, gate=gate, visible=visible)
    q, k, v = (heads_of(y, 4) for y in module.qkv(x).chunk(3, dim=-1))
    want = module.proj(joined(gate4d.gated_attention(q, k, v, gate=gate, visible=visible, backend="reference")))
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(seen[0][0], q)
    assert seen[0][2] == 8**-0.5
    assert module.control.tokens == (12, 12)
    module.control.gate = lambda q, k: gate
    module.control.visible = visible
    assert torch.allclose(module(x), want, atol=1e-5)
    with pytest.raises(ValueError, match="gate is set on this attention"):
        module(x, gate=gate)


def test_streaming_equals_the_causal_clip():
    module = SelfAttention(32, 4, qk_norm=True, rope=RoPE2D())
    layout = gate4d.TokenLayout(6, 4)
    x, pos = torch.randn(2, 24, 32), torch.randint(0, 5, (2, 4, 2)).repeat(1, 6, 1)
    cache = FrameKVCache()
    with torch.no_grad():
        clip = module(x, pos, visible=gate4d.Visibility.frame_causal(layout))
        frames = [module(x[:, i : i + 4], pos[:, :4], cache=cache) for i in range(0, 24, 4)]
        assert torch.allclose(torch.cat(frames, dim=1), clip, atol=1e-5)
        with pytest.raises(ValueError, match="visible cannot be combined with a cache"):
            module(x[:, :4], pos[:, :4], cache=cache, visible=gate4d.Visibility.full())
    assert module.control.tokens == (4, 24)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads=5, got 32"):
        SelfAttention(32, 5)
