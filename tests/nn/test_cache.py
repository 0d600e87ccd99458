"""FrameKVCache against attention over the concatenated frames it should hold."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gate4d
from gate4d.kernels.norm_rope import op
from gate4d.kernels.norm_rope.reference import norm_rope as norm_rope_reference
from gate4d.nn import FrameKVCache, RoPE2D, SelfAttention


def frames(count, tokens=5, heads=2, dim=16, dtype=torch.float32, batch=2):
    g = torch.Generator().manual_seed(count)
    return [
        tuple(torch.randn(batch, heads, tokens, dim, generator=g).to(dtype) for _ in range(3)) for _ in range(count)
    ]


def expected(q, kept):
    k, v = (torch.cat([f[i] for f in kept], dim=2) for i in (1, 2))
    return F.scaled_dot_product_attention(q, k, v)


def test_growing_cache_equals_concatenation_and_never_moves():
    cache, seen, addresses = FrameKVCache(), [], {}
    for frame in frames(13):
        cache.append(*frame[1:])
        seen.append(frame)
        assert torch.allclose(cache.attend(frame[0]), expected(frame[0], seen), atol=1e-5)
        for i, page in enumerate(cache.pages()):
            assert addresses.setdefault(i, page[0].data_ptr()) == page[0].data_ptr()
    assert cache.num_frames == 13
    assert cache.frame_ids == tuple(range(13))
    used = 13 * 5 * 2 * 2 * 16 * 4 * 2
    largest = max(k.numel() * 4 * 2 for k, _ in cache._pages.tensors)
    assert used <= cache.nbytes < used + largest
    cache.reset()
    assert cache.nbytes == cache.num_tokens == 0


def test_true_frames_fill_pages_exactly():
    cache = FrameKVCache()
    k = torch.zeros(1, 1, 1041, 8)
    for _ in range(12):
        cache.append(k, k)
    assert len(cache.pages()) == 3
    assert cache.nbytes == 12 * 2 * k.numel() * 4


@pytest.mark.parametrize(("window", "anchors"), [(1, 0), (3, 0), (3, 1), (2, 2)])
def test_window_and_anchors(window, anchors):
    cache, seen = FrameKVCache(window, anchors=anchors), frames(9)
    for t, frame in enumerate(seen):
        cache.append(*frame[1:])
        kept = sorted(set(range(min(anchors, t + 1))) | set(range(max(0, t + 1 - window), t + 1)))
        if t + 1 > window + anchors:
            assert sorted(cache.frame_ids) == kept
            assert torch.allclose(cache.attend(frame[0]), expected(frame[0], [seen[i] for i in kept]), atol=1e-5)
        if t == 0:
            address, size = cache.pages()[0][0].data_ptr(), cache.nbytes
    assert (cache.pages()[0][0].data_ptr(), cache.nbytes) == (address, size)
    assert size == (window + anchors) * 2 * 2 * 2 * 5 * 16 * 4


def test_policy_is_fed_by_statistics():
    """The frame that received least leaves, whatever its age; the anchor stays."""
    asked = []

    def least(ids, scores):
        asked.append((list(ids), scores.tolist()))
        return ids[int(scores.argmin())]

    cache = FrameKVCache(3, anchors=1, policy=least)
    for i, frame in enumerate(frames(4)):
        cache.append(*frame[1:])
        assert cache.frame_ids == tuple(range(i + 1))
    cache.add_scores(torch.tensor([0.0, 3.0, 1.0, 2.0]).repeat_interleave(5).expand(2, -1))
    cache.append(*frames(5)[4][1:])
    assert asked == [([1, 2, 3], [3.0, 1.0, 2.0])]
    assert sorted(cache.frame_ids) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="scores must have 20 entries"):
        cache.add_scores(torch.zeros(2, 15))
    cache.policy = lambda ids, scores: 0
    with pytest.raises(ValueError, match=r"policy must return one of the frame ids \[1, 3, 4\], got 0"):
        cache.append(*frames(5)[4][1:])


@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_over_pages(renormalize):
    cache, seen = FrameKVCache(), frames(9)
    for frame in seen:
        cache.append(*frame[1:])
    q, k, v = seen[0][0], *(torch.cat([f[i] for f in seen], dim=2) for i in (1, 2))
    gate = gate4d.MotionGate(
        torch.rand(2, 5), torch.rand(2, 45), torch.rand(2, 5), torch.rand(2, 45) < 0.3, 1.5, renormalize
    )
    assert len(cache.pages()) > 1
    assert torch.allclose(cache.attend(q, gate=gate), gate4d.gated_attention(q, k, v, gate=gate), atol=1e-5)
    everything = gate4d.MotionGate.drop_keys(torch.ones(2, 45, dtype=torch.bool))
    assert torch.equal(cache.attend(q, gate=everything), torch.zeros_like(q))
    with pytest.raises(ValueError, match=r"gate.key_score must have 45 keys, got 46"):
        cache.attend(q, gate=gate4d.MotionGate.keys(torch.zeros(2, 46)))


def test_16_bits_by_default_for_16_bit_values():
    """Under autocast norms give fp32 keys beside 16-bit values."""
    cache, seen = FrameKVCache(), frames(6)
    for _, k, v in seen:
        cache.append(k, v.bfloat16())
    assert {x.dtype for page in cache.pages() for x in page} == {torch.bfloat16}
    q = seen[0][0]
    k, v = (torch.cat([f[i] for f in seen], dim=2) for i in (1, 2))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    got = cache.attend(q.bfloat16())
    bound = 2 * (plain.double() - exact).abs().max() + 2**-8 * exact.abs().max()
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= bound
    wide = FrameKVCache(dtype=torch.float32)
    wide.append(seen[0][1], seen[0][2].bfloat16())
    assert wide.pages()[0][1].dtype == torch.float32


def test_steady_state_is_fixed_for_graphs():
    """reserve() outside, write() and attend() inside a captured region: same addresses, same shapes, slot on device."""
    cache, seen = FrameKVCache(2), frames(7)
    for frame in seen[:2]:
        cache.append(*frame[1:])
    slot, shape = cache._index.data_ptr(), cache.pages()[0][0].shape
    for t in range(2, 7):
        cache.reserve(*seen[t][1:])
        assert cache._index.data_ptr() == slot
        cache.write(*seen[t][1:])
        assert cache.pages()[0][0].shape == shape
        assert torch.allclose(cache.attend(seen[t][0]), expected(seen[t][0], seen[t - 1 : t + 1]), atol=1e-5)


class Graph(TorchDispatchMode):
    """What a CUDA graph keeps: the operators of a region with their tensors and numbers, to be run again on them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_module_writes_where_the_frame_belongs(fused, monkeypatch):
    """Each replay into the slot reserved before it, not into the one of the capture; with the kernel's path too."""
    library = torch.library.Library("gate4d", "IMPL")
    if fused:
        monkeypatch.setattr(op, "fits", lambda x, exact: True)

        def forward(x, out, weight, bias, positions, frequencies, norm, eps):
            out.copy_(norm_rope_reference(x, weight, bias, positions, frequencies, norm, eps))

        library.impl("norm_rope_forward", forward, "CPU")
    module = SelfAttention(32, 2, qk_norm=True, rope=RoPE2D())
    tokens, pos = torch.randn(9, 2, 5, 32), torch.randint(0, 9, (1, 5, 2))
    cache, eager, graph = FrameKVCache(2, anchors=1), FrameKVCache(2, anchors=1), Graph()
    shape = torch.empty(2, 2, 5, 16)
    x = tokens[3].clone()
    try:
        with torch.no_grad():
            want = [module(t, pos, cache=eager) for t in tokens]
            for t in tokens[:3]:
                module(t, pos, cache=cache)
            cache.reserve(shape, shape)
            with monkeypatch.context() as m, graph:
                m.setattr("gate4d.nn.cache.capturing", lambda x: True)
                m.setattr("gate4d.nn.attention.capturing", lambda x: True)
                out = module(x, pos, cache=cache)
            for t in range(3, 9):
                if t > 3:
                    cache.reserve(shape, shape)
                x.copy_(tokens[t])
                graph.replay()
                torch.testing.assert_close(out, want[t])
                assert cache.frame_ids == (0, *sorted((t - 1, t), key=lambda i: (i - 1) % 2))
    finally:
        library._destroy()


def test_what_cannot_be_captured_says_so(monkeypatch):
    cache, (q, k, v) = FrameKVCache(2), frames(1)[0]
    causal = FrameKVCache(2, token_causal=True)
    causal.append(k, v)
    monkeypatch.setattr("gate4d.nn.cache.capturing", lambda x: True)
    for call in (cache.append, cache.reserve, cache.claim):
        with pytest.raises(RuntimeError, match=r"Call reserve\(k, v\) before the capture and before each replay"):
            call(k, v)
    assert cache.num_frames == 0
    with pytest.raises(RuntimeError, match="token-causal cache cannot be captured"):
        causal.attend(q)


def test_adopt_does_not_copy():
    (_, k, v), (q, k2, v2) = frames(2, tokens=6)
    cache = FrameKVCache.adopt(k, v, 2, page_frames=1)
    assert cache.pages()[0][0].data_ptr() == k.data_ptr()
    cache.append(k2[:, :, :3], v2[:, :, :3])
    want = F.scaled_dot_product_attention(q, torch.cat((k, k2[:, :, :3]), 2), torch.cat((v, v2[:, :, :3]), 2))
    assert torch.allclose(cache.attend(q), want, atol=1e-5)
    with pytest.raises(ValueError, match="must hold 4 frames"):
        FrameKVCache.adopt(k, v, 4)
    with pytest.raises(ValueError, match="must hold 4 frames"):
        cache.extend(k, v, 4)


def test_bad_input():
    with pytest.raises(ValueError, match="window must be None or an int >= 1"):
        FrameKVCache(0)
    with pytest.raises(ValueError, match="anchors must be an int >= 0"):
        FrameKVCache(1, anchors=-1)
    with pytest.raises(ValueError, match="policy needs a window"):
        FrameKVCache(policy=lambda ids, scores: ids[0])
    cache = FrameKVCache()
    with pytest.raises(ValueError, match="cache is empty"):
        cache.attend(torch.zeros(1, 1, 1, 8))
    k = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"k must be one frame of shape \[B, H, P, D\], got \[2, 5, 8\]"):
        cache.append(k[0], k)
    with pytest.raises(ValueError, match="v must have one value per key"):
        cache.append(k, k[:, :, 1:])
    cache.append(k, k)
    with pytest.raises(
        ValueError, match=r"k must have the shape \[1, 2, 5, 8\] of the frames held, got \[1, 2, 6, 8\]"
    ):
        cache.append(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8))
    assert cache.num_frames == 1


@pytest.mark.parametrize(("window", "anchors"), [(None, 0), (3, 0), (3, 2)])
def test_frames_of_different_sizes(window, anchors):
    """Frames of one size share pages; what leaves is freed, wherever it lay."""
    sizes = [5, 3, 5, 5, 2, 3, 3, 5, 2, 5, 5, 5, 3, 3, 5]
    cache, seen = FrameKVCache(window, anchors=anchors, ragged=True, page_frames=2), []
    for t, tokens in enumerate(sizes):
        seen.append(tuple(torch.randn(2, 2, tokens, 16) for _ in "qkv"))
        cache.append(*seen[t][1:])
        kept = [s for s in range(t + 1) if s < anchors or window is None or s > t - window]
        assert sorted(cache.frame_ids) == kept
        assert cache.num_tokens == sum(sizes[s] for s in kept)
        assert torch.allclose(cache.attend(seen[t][0]), expected(seen[t][0], [seen[s] for s in kept]), atol=1e-5)
        scores = torch.repeat_interleave(
            torch.tensor([float(i) for i in cache.frame_ids]), torch.tensor([sizes[i] for i in cache.frame_ids])
        )
        cache.add_scores(scores.expand(2, -1))
    added = {i: (len(sizes) - i) * i for i in cache.frame_ids}  # at every frame since, its own number
    assert {i: float(x) for i, x in cache._scores.items()} == added
    if window is not None:  # a page for the first size, and pages of two frames for the others
        pages = (window + anchors) * max(sizes) + 2 * (2 * max(sizes)) + 2 * (2 * 3)
        assert cache.nbytes <= 2 * 2 * 2 * 16 * 4 * pages
    with pytest.raises(ValueError, match="k must have the shape"):
        cache.append(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16))  # another batch


@pytest.mark.parametrize("window", [None, 3])
def test_token_causal_and_frozen(window):
    cache, seen = FrameKVCache(window, token_causal=True), frames(8)
    for t, (q, k, v) in enumerate(seen):
        cache.append(k, v)
        past = [s for s in range(t) if window is None or s > t - window]
        k, v = (torch.cat([seen[s][i] for s in (*past, t)], dim=2) for i in (1, 2))
        visible = torch.ones(5, k.shape[2], dtype=torch.bool).tril(5 * len(past))
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        assert torch.allclose(cache.attend(q), want, atol=1e-5)
    with pytest.raises(ValueError, match="q must be the 5 tokens of the newest frame"):
        cache.attend(q[:, :, :3])
    cache.frozen = True
    cache.append(k[:, :, :5], v[:, :, :5])
    assert cache.frames_seen == 8
    assert torch.allclose(cache.attend(q[:, :, :3]), F.scaled_dot_product_attention(q[:, :, :3], k, v), atol=1e-5)


def test_a_claimed_slot_counts_once_it_is_committed():
    cache = FrameKVCache(window=2)
    (q, k, v), (_, k2, v2) = (frames(2)[t] for t in range(2))
    cache.append(k, v)
    slot = cache.claim(k2, v2)
    with pytest.raises(RuntimeError, match="not committed"):
        cache.attend(q)
    slot.k.copy_(k2)
    slot.v.copy_(v2)
    assert slot.commit() is cache
    other = FrameKVCache(window=2)
    other.append(k, v)
    other.append(k2, v2)
    assert torch.equal(cache.attend(q), other.attend(q))
    with pytest.raises(RuntimeError, match="not open"):
        slot.commit()
    late = cache.claim(k, v)
    cache.append(k2, v2)
    with pytest.raises(RuntimeError, match="another frame came after it"):
        late.commit()
