"""What cannot be patched is refused with a list of what was found, and stays untouched."""

import pytest
import torch
from standins import croco, others, vggt
from torch import nn

import gate4d
from gate4d import register_method
from gate4d.integrations.masks import recognise


def snapshot(model):
    return [dict(m.__dict__) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}


def refused(model, error, match, **options):
    before, state = snapshot(model)
    rng = torch.get_rng_state()
    with pytest.raises(error, match=match):
        gate4d.patch(model, **options)
    after, same = snapshot(model)
    assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(state[k], same[k]) for k in state)
    assert torch.equal(torch.get_rng_state(), rng)


def test_no_known_attention():
    refused(nn.Linear(4, 4), ValueError, "no attention that is known")
    model = nn.TransformerEncoderLayer(8, 2)
    refused(model, ValueError, r"left alone: self_attn \(torch.nn.MultiheadAttention\)")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        gate4d.patch("model")


class Rescaled(vggt.Attention):
    """The names and the signature of VGGT, another computation."""

    def forward(self, x, pos=None):
        q, k, v = self.heads(x)
        return self.finish((2 * q @ k.mT).softmax(-1) @ v)


class Renamed(vggt.Attention):
    def forward(self, x, coordinates):
        return super().forward(x, coordinates)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Rescaled, "has the names of vggt but computes something else"),
        (Renamed, r"unknown call convention forward\(x,"),
    ],
)
def test_half_matching_model(other, why):
    model = vggt.Vggt()
    model.aggregator.global_blocks[1].attn = other(64, 4)
    refused(model, ValueError, rf"(?s)does not fit.*aggregator.frame_blocks.0.attn.*global_blocks.1.attn .*{why}")


def test_missing_part():
    model = croco.Easi3r()
    decoder = model.dec_blocks  # without the model that reduces its maps
    refused(decoder, ValueError, r"easi3r: no module has _get_attn_k\(attn, shape\)")
    model = vggt.Vggt()
    model.aggregator.frame_blocks[0].attn.num_heads = None
    refused(model, ValueError, "it has no num_heads, got None")
    model = vggt.Vggt()
    model.aggregator.frame_blocks[0].attn.qkv = nn.Linear(64, 128)
    refused(model, ValueError, "qkv must project C to 3 C features")
    model = vggt.Vggt()
    model.aggregator.frame_blocks[0].attn.attn_drop.p = 0.1
    refused(model, ValueError, "attention dropout is not supported, got attn_drop.p=0.1")


def test_replaced_by_someone_else():
    model = vggt.Vggt()
    attention = model.camera_head.trunk[0].attn
    attention.forward = lambda x, pos=None: x
    refused(model, ValueError, "its forward was already replaced by .*<lambda>")
    del attention.forward
    handle = gate4d.patch(model)
    ours = attention.forward
    attention.forward = lambda *args: ours(*args)
    with pytest.raises(RuntimeError, match="somebody replaced forward of Attention after the patch"):
        handle.remove()
    assert model.camera_head.trunk[1].attn.__dict__["forward"]
    attention.forward = ours
    handle.remove()
    handle.remove()  # does nothing
    assert "forward" not in attention.__dict__


def test_patched_twice():
    model = vggt.Vggt()
    with gate4d.patch(model) as handle:
        refused(model, RuntimeError, "patched already")
        refused(model.aggregator, RuntimeError, "patched already")
        with pytest.raises(RuntimeError, match=r"run\(\) needs a method"):
            handle.run([])
    gate4d.patch(model).remove()


def test_options_and_methods():
    model = vggt.Vggt()
    known = r"\['anchors', 'budget', 'policy', 'specials', 'window'\]"
    refused(model, TypeError, rf"unknown options \['colour'\]; without a method there are {known}", colour=1)
    needs = "window and budget need a model with a key/value cache"
    refused(model, ValueError, needs, window=3)
    refused(vggt.Stream3r(), ValueError, rf"{needs}.*stream3r.*mode='window'", window=3, anchors=1)
    stream = vggt.StreamVggt()
    refused(stream.camera_head, ValueError, needs, window=3)  # its entries are no frames
    refused(stream, ValueError, "anchors=1 has no effect without a window", anchors=1)
    refused(stream, ValueError, "window must be None or an int >= 1", window=0)
    refused(model, ValueError, r"method must be one of \[.*\] or None, got 'magic'", method="magic")

    calls = []

    @register_method("test only")
    class Method:
        def __init__(self, model, table, fail=False):
            if fail:
                raise ValueError("this model lacks something")
            rows = table.select("global")
            for row in rows:
                row.control.observers.append(lambda q, k, scale: calls.append((q.shape, scale)))
                row.control.gate = lambda q, k: gate4d.MotionGate.keys(torch.ones(k.shape[0], k.shape[2]) * 0.5)
            self.model = model

        def run(self, frames):
            return self.model(frames)

        def close(self):
            calls.append("closed")

    try:
        refused(model, ValueError, "lacks something", method="test only", fail=True)
        images = torch.rand(1, 2, 3, 28, 42)
        with torch.no_grad(), gate4d.patch(model, method="test only") as handle:
            result, plain = handle.run(images), calls[:]
        assert plain == [((1, 4, 22, 16), 0.25)] * 2
        assert calls[-1] == "closed"
        with torch.no_grad():  # the same weight for every key changes nothing
            assert torch.allclose(model(images)["depth"], result["depth"], atol=1e-5)
    finally:
        from gate4d import handle as registry

        del registry._registered["test only"]


def test_wrong_frame_count_of_a_mask():
    model = vggt.Vggt4d().eval()
    images, masks = torch.rand(1, 3, 3, 28, 42), torch.zeros(1, 2, 6, dtype=torch.bool)
    with gate4d.patch(model), pytest.raises(ValueError, match=r"dyn_masks \[1, 2, 6\].*wrong number of frames"):
        model(images, masks)
    attention = vggt.StreamVggt().aggregator
    with gate4d.patch(attention):
        block = attention.global_blocks[0].attn
        with pytest.raises(ValueError, match=r"attn_mask must have shape \[12, 12\].*another number of frames"):
            block(torch.rand(1, 12, 64), torch.zeros(1, 12, 2, dtype=torch.long), torch.zeros(18, 18))
    model = croco.Easi3r()
    x, pos, mask = torch.rand(1, 6, 48), torch.zeros(1, 6, 2, dtype=torch.long), torch.zeros(1, 5, 1)
    with (
        gate4d.patch(model),
        pytest.raises(ValueError, match=r"query mask must have shape \[B, 6, 1\], got \[1, 5, 1\]"),
    ):
        model.dec_blocks[0].cross_attn(x, x, x, pos, pos, mask, torch.zeros(1, 6, 1))


def test_recognised_masks():
    layout = gate4d.TokenLayout(6, 3)
    for visible in (
        gate4d.Visibility.frame_causal(layout),
        gate4d.Visibility.frame_causal(layout, window=2, sinks=1),
        gate4d.Visibility.frame_causal(layout, window=2),
        gate4d.Visibility.per_frame(layout),
    ):
        dense = visible.dense(18, 18)[0]
        for low in (-torch.inf, torch.finfo(torch.float32).min):
            additive = torch.zeros(18, 18).masked_fill(~dense, low)
            assert torch.equal(recognise(additive, 18, 18).dense(18, 18)[0], dense)
            assert torch.equal(recognise(additive[None, None], 18, 18).dense(18, 18)[0], dense)
        assert torch.equal(recognise(dense, 18, 18).dense(18, 18)[0], dense)
        for where in ((0, 1), (7, 2), (17, 17)):  # a single other entry is no longer this mask
            other = dense.clone()
            other[where] ^= True
            found = recognise(other, 18, 18)
            assert found is None or torch.equal(found.dense(18, 18)[0], other)
    assert recognise(torch.full((4, 4), -1.0), 4, 4) is None  # a finite bias
    assert recognise(torch.tensor([[0.0, -1.0], [0.0, 0.0]]), 2, 2) is None


def test_dense_mask_that_is_no_interval_stays_dense():
    model = vggt.StreamVggt().eval().aggregator
    block = model.global_blocks[0].attn
    x, pos = torch.rand(1, 12, 64), torch.zeros(1, 12, 2, dtype=torch.long)
    mask = torch.randn(12, 12)
    with torch.no_grad():
        expected = block(x, pos, mask)
        with gate4d.patch(model):
            assert torch.allclose(block(x, pos, mask), expected, atol=1e-5)
            block.forward.gate = gate4d.MotionGate.keys(torch.zeros(1, 12))
            with pytest.raises(ValueError, match="no interval of keys"):
                block(x, pos, mask)


def test_inspect_table():
    table = gate4d.inspect(croco.Ttt3r())
    text = str(table)
    roles = {r.name: r.role for r in table}
    assert roles["enc_blocks.0.attn"] == "encoder"
    assert roles["dec_blocks.1.attn"] == "decoder self"
    assert roles["dec_blocks.1.cross_attn"] == "decoder cross"
    assert roles["dec_blocks_state.0.cross_attn"] == "state cross"
    assert "RoPE in float16" in text
    assert "return_attn" in text
    state = table.select("state", "cross")
    assert [(r.layer, r.heads, r.head_dim) for r in state] == [(0, 2, 48), (1, 2, 48)]
    roles = {r.name: r.role for r in gate4d.inspect(others.Pi3())}
    assert [roles[f"decoder.{i}.attn"] for i in range(4)] == ["frame", "global", "frame", "global"]
    assert roles["camera_decoder.blocks.0.attn"] == "camera head"
    roles = {r.name: r.role for r in gate4d.inspect(others.Omega())}
    assert roles["aggregator.inter_frame_blocks.0.attn"] == "global"
    assert roles["aggregator.frame_blocks.0.attn"] == "frame"
    roles = {r.name: r.role for r in gate4d.inspect(vggt.Vggt())}
    assert roles["aggregator.patch_embed.blocks.0.attn"] == "encoder"
    assert roles["camera_head.trunk.0.attn"] == "camera head"
