"""What accepted models do later: other masks, other paths, state, other tensor methods, quantised layers."""

import copy

import pytest
import torch
from standins import croco, unknown, vggt
from standins.common import Rotary
from torch import nn

import gate4d


def largest(a, b):
    return float((a - b).abs().max() / b.abs().max())


def keys_gate(q, k):
    return gate4d.MotionGate.keys(torch.linspace(0, 0.9, k.shape[2]).expand(k.shape[0], -1))


MASKS = {
    "key padding": torch.rand(2, 1, 1, 12) > 0.4,
    "key padding of one": torch.arange(12).expand(1, 1, 1, 12) < 7,
    "keys": torch.tensor([[0.0, -torch.inf] * 6]),
    "heads": torch.randn(1, 4, 12, 12),
    "queries": torch.zeros(12, 1),
    "dense": torch.randn(2, 1, 12, 12),
}


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_masks_that_broadcast(mask):
    """As torch's own attention takes them; observers see q and k under every mask."""
    model, x, seen = nn.ModuleList([unknown.TwoPaths()]), torch.rand(2, 12, 64), []
    expected = model[0](x, MASKS[mask])
    stream, pos = vggt.StreamVggt().eval().aggregator, torch.zeros(2, 12, 2, dtype=torch.long)
    block = stream.global_blocks[0].attn
    streamed = block(x, pos, MASKS[mask])
    with gate4d.patch(model) as handle:
        handle.table.rows[0].control.observers.append(lambda q, k, scale: seen.append(q.shape))
        assert largest(model[0](x, MASKS[mask]), expected) <= 1e-5
        assert handle.table.rows[0].tokens == (12, 12)
    assert seen == [(2, 4, 12, 16)]
    with gate4d.patch(stream):
        assert largest(block(x, pos, MASKS[mask]), streamed) <= 1e-5
        with pytest.raises(ValueError, match="it describes another number of frames"):
            block(x, pos, torch.zeros(2, 1, 1, 11))


@torch.no_grad()
def test_a_module_that_takes_another_path_later():
    model, x = nn.ModuleList([unknown.TwoPaths()]), torch.rand(2, 12, 64)
    expected = model[0](x)
    with gate4d.patch(model) as handle:
        control = handle.table.rows[0].control
        model[0].fused = False
        assert largest(model[0](x), expected) <= 1e-5
        control.gate = keys_gate
        with pytest.raises(RuntimeError, match=r"TwoPaths took a path that does not call.*no effect"):
            model[0](x)
        model[0].fused = True
        assert largest(model[0](x), expected) > 1e-4


def test_one_that_never_calls_it_is_recomputed_or_refused():
    model = unknown.TwoPaths()
    model.fused = False
    assert gate4d.inspect(nn.ModuleList([model])).families == ("generic (recomputed)",)


@torch.no_grad()
def test_state_in_a_module_does_not_pass_from_one_trial_run_to_the_other():
    model, x = nn.ModuleList([unknown.Stateful()]), torch.rand(2, 12, 64)
    other = copy.deepcopy(model)
    expected = [other[0](x) for _ in range(3)]
    assert largest(expected[1], expected[0]) > 1e-3
    got = [model[0](x)]
    with gate4d.patch(model) as handle:
        assert handle.table.families == ("generic (attention call)",)
        got.append(model[0](x))
    got.append(model[0](x))
    for a, b in zip(got, expected, strict=True):
        assert largest(a, b) <= 1e-5


def test_the_difference_from_zeros_is_absolute():
    class Zeros(vggt.Attention):
        def forward(self, x, pos=None):
            q, k, v = self.heads(x)
            return self.finish((q @ k.mT).softmax(-1) @ v) * 0

    with pytest.raises(ValueError, match=r"computes something else \(relative difference [0-9.]+e[-+]0[01]\)"):
        gate4d.patch(nn.ModuleList([Zeros(64, 4)]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_dynamically_quantised():
    model = vggt.Vggt().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    images = torch.rand(1, 2, 3, 28, 42)
    expected = quantised(images)
    rows = gate4d.inspect(quantised).rows
    assert [r.name for r in rows] == [r.name for r in gate4d.inspect(model).rows]
    with gate4d.patch(quantised):
        got = quantised(images)
    for name, e in expected.items():
        # A value that lies between two steps of a quantised layer may go to either.
        assert largest(got[name], e) <= 2e-2
    plain = nn.ModuleList([torch.ao.quantization.quantize_dynamic(nn.ModuleList([unknown.TwoPaths()]), {nn.Linear})])
    assert not list(plain.parameters())
    assert gate4d.inspect(plain).families == ("generic (attention call)",)


@torch.no_grad()
def test_cached_tensors_are_tensors_to_their_readers():
    model, frames = vggt.Stream3r().eval(), list(torch.rand(2, 1, 3, 28, 42))
    with gate4d.patch(model):
        session = vggt.Session(model, "causal")
        for frame in frames:
            session.forward_stream(frame)
        row = gate4d.inspect(model).select("global")[0]
        x, pos = torch.rand(1, 11, 64), torch.zeros(1, 11, 2, dtype=torch.long)
        _, (k, v) = row.module(x, pos, None, [None, None])
        whole = k.tensor()
        for read in (
            lambda t: t.contiguous(),
            lambda t: t.clone(),
            lambda t: t.detach(),
            lambda t: t.to(torch.float64),
            lambda t: t.cpu(),
            lambda t: t.float(),
            lambda t: t.half(),
            lambda t: t[:, :, :3],
            lambda t: t.mean((0, 1)),
            lambda t: t.permute(0, 2, 1, 3).reshape(11, -1),
            lambda t: t * 2 - 1,
            lambda t: 1 - t,
            lambda t: t @ t.mT,
            lambda t: t.eq(0) | (t != 0),
            lambda t: torch.from_numpy(t.numpy()),
            lambda t: torch.stack(list(t)),
            lambda t: torch.cat([t, t], dim=2),
        ):
            assert torch.equal(read(k), read(whole))
        for known in ("ndim", "numel", "dim", "element_size", "is_cuda", "layout", "requires_grad", "size", "shape"):
            a, b = getattr(k, known), getattr(whole, known)
            assert (a() if callable(a) else a) == (b() if callable(b) else b), known
        assert (len(k), k.size(2), k.dtype, k.device) == (1, 11, torch.float32, whole.device)
        with pytest.raises(AttributeError, match="mul_ would change a copy of what the cache holds"):
            k.mul_(2)
        with pytest.raises(AttributeError, match="no attribute 'colour'"):
            _ = k.colour
        assert v.clone().shape == v.shape
    model = vggt.StreamVggt().eval()
    with gate4d.patch(model):
        _, (k, v) = model.aggregator.global_blocks[0].attn(x, pos, use_cache=True)
        assert (k.ndim, k.numel(), k.is_cuda) == (5, 4 * 11 * 16, False)
        assert v.clone().shape == (1, 4, 1, 11, 16)
        with pytest.raises(RuntimeError, match="stored after norm and RoPE"):
            k.clone()


class TrueEncoder(nn.Module):
    """CUT3R's encoder attention at its true width with the RoPE of its Python code, which computes in float16."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attn = croco.EncoderAttention(dim, Rotary(quantise=True), heads)
        nn.init.xavier_uniform_(self.attn.qkv.weight)


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (1024, 16)])
@torch.no_grad()
def test_an_encoder_that_rotates_in_half_precision(dim, heads):
    model = TrueEncoder(dim, heads).eval()
    grid = torch.cartesian_prod(torch.arange(18), torch.arange(8))[None]
    x = torch.randn(1, len(grid[0]), dim)
    expected = model.attn(x, grid)
    with gate4d.patch(model) as handle:
        row = handle.table.rows[0]
        assert (row.family, row.traits.rotate_dtype) == ("croco", torch.float16)
        assert largest(model.attn(x, grid), expected) <= 1e-5
    model.attn.rope = None
    assert largest(model.attn(x, grid), expected) > 1e-2  # the rotation shows
