"""MoRe on the stand-in of VGGT: stream, causal forward and camera pass against dense masks in float64."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from standins import croco, vggt
from standins.common import heads_of, joined, live_bytes

import gate4d
from gate4d.methods.losses import ForcedAttention, MoreRecipe

PATCH, SPECIAL = 14, 5
FAMILIES = (vggt.Vggt, vggt.StreamVggt, vggt.Stream3r)


def build(dtype=torch.float32, cls=vggt.Vggt, depth=2):
    torch.manual_seed(0)
    model = cls(depth=depth, dim=32, heads=2).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    return model.to(dtype)


def clip(frames=5, rows=2, columns=3, batch=1):
    return torch.rand(batch, frames, 3, rows * PATCH, columns * PATCH)


def seen(frame, window, anchors):
    """Frames that a frame sees."""
    return [s for s in range(frame + 1) if s < anchors or window is None or s > frame - window]


def attention(module, x, pos, mask):
    """One attention with its map materialised; returns keys and values too."""
    q, k, v = module.heads(x)
    q, k = module.turned(q, k, pos)
    weights = (q @ k.mT * module.scale).masked_fill(~mask, -torch.inf).softmax(-1)
    return module.proj(joined(weights @ v)), k, v


def finish(block, x, attended):
    x = x + block.ls1(attended)
    return x + block.ls2(block.mlp(block.norm2(x)))


def head(model, x, mask):
    for _ in range(4):
        for block in model.camera_head.trunk:
            x = finish(block, x, attention(block.attn, block.norm1(x), None, mask)[0])
    return model.camera_head.pose(x)


def restated(model, images, window=None, anchors=0, causal="frame"):
    """Everything at once with dense masks, images of any sizes: cameras, depths, cameras after the camera pass."""
    agg, count = model.aggregator, len(images)
    tokens, pos = zip(*(agg.embed(image[:, None], first=t == 0) for t, image in enumerate(images)), strict=True)
    sizes = [x.shape[1] for x in tokens]
    frame = torch.repeat_interleave(torch.arange(count), torch.tensor(sizes))
    frames = torch.tensor([[s in seen(t, window, anchors) for s in range(count)] for t in range(count)])
    mask = frames[frame][:, frame]
    if causal == "token":
        mask &= torch.ones_like(mask).tril()
    first = [sum(sizes[:t]) for t in range(count)]
    held = seen(count - 1, window, anchors)
    again = torch.cat([tokens[t][:, :1] for t in held], dim=1)
    cached = torch.isin(frame, torch.tensor(held))
    for inside, over_all in zip(agg.frame_blocks, agg.global_blocks, strict=True):
        after = [inside(x, pos=p) for x, p in zip(tokens, pos, strict=True)]
        again = again + torch.cat([after[t][:, :1] - tokens[t][:, :1] for t in held], dim=1)
        x = torch.cat(after, dim=1)
        attended, k, v = attention(over_all.attn, over_all.norm1(x), torch.cat(pos, dim=1), mask)
        tokens = finish(over_all, x, attended).split(sizes, dim=1)
        q = heads_of(over_all.attn.qkv(over_all.norm1(again)).chunk(3, dim=-1)[0], over_all.attn.num_heads)
        q = over_all.attn.rope(over_all.attn.q_norm(q), torch.zeros(1, len(held), 2, dtype=torch.long))
        weights = (q @ k[:, :, cached].mT * over_all.attn.scale).softmax(-1)
        again = finish(over_all, again, over_all.attn.proj(joined(weights @ v[:, :, cached])))
    whole = torch.cat(tokens, dim=1)
    cameras = head(model, whole[:, first], frames)
    cameras_again = cameras.clone()
    cameras_again[:, held] = head(model, again, torch.ones(len(held), len(held), dtype=torch.bool))
    return cameras, [model.depth_head(x[:, SPECIAL:]) for x in tokens], cameras_again


VARIANTS = [
    {}, {"window": 2}, {"window": 2, "anchors": 1}, {"causal": "token"}, {"causal": "token", "window": 2, "anchors": 1}
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_stream_forward_and_camera_pass_against_dense_masks(options):
    model, images = build(), clip(batch=2)
    exact = restated(build(torch.float64), images.double().unbind(1), **options)
    torch_says = restated(model, images.unbind(1), **options)
    plain = model(images)
    with gate4d.patch(model, method="more", **options) as handle:
        forward = model(images)
        steps = list(handle.method.stream(images))
        result = handle.run(images)
    streamed = torch.stack([s.camera for s in steps], dim=1)
    depths = torch.cat([s.prediction["depth"] for s in steps], dim=1)
    exact_depth, torch_depth = (torch.stack(x[1], dim=1) for x in (exact, torch_says))
    assert_accurate("streamed cameras", streamed, exact[0], torch_says[0])
    assert_accurate("cameras of the forward", forward["pose"], exact[0], torch_says[0])
    assert_accurate("streamed depth", depths, exact_depth, torch_depth)
    assert_accurate("depth of the forward", forward["depth"], exact_depth, torch_depth)
    assert_accurate("cameras after the camera pass", result.cameras, exact[2], torch_says[2])
    held = seen(4, options.get("window"), options.get("anchors", 0))
    assert result.refined.nonzero().flatten().tolist() == held
    moved = (result.cameras - streamed).abs().amax((0, 2))
    assert bool((moved[result.refined] > 1e-3).all())
    assert bool((moved[~result.refined] == 0).all())
    after = model(images)
    assert torch.equal(plain["pose"], after["pose"])  # undone exactly
    assert not torch.allclose(plain["pose"], forward["pose"], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"window": 2, "anchors": 1}, {"causal": "token", "window": 2}], ids=str)
@torch.no_grad()
def test_frames_of_different_sizes(options):
    sizes = [(2, 3), (1, 2), (2, 3), (3, 2), (1, 2), (1, 2), (2, 3), (3, 2)]  # two of them with the same token count
    images = [torch.rand(1, 3, rows * PATCH, columns * PATCH) for rows, columns in sizes]
    model = build()
    exact = restated(build(torch.float64), [x.double() for x in images], **options)
    torch_says = restated(model, images, **options)
    with gate4d.patch(model, method="more", **options) as handle:
        result = handle.run(images)
    assert_accurate("cameras", result.cameras, exact[2], torch_says[2])
    for step, *depths in zip(result.predictions, exact[1], torch_says[1], strict=True):
        assert_accurate("depth", step["depth"][:, 0], *depths)


@pytest.mark.parametrize("cls", FAMILIES)
@torch.no_grad()
def test_families_stream_as_they_run_a_clip(cls):
    """StreamVGGT and STream3R by their own causal masks."""
    model, images = build(cls=cls), clip()
    exact = build(torch.float64, cls)
    with gate4d.patch(model, method="more") as handle, gate4d.patch(exact, method="more"):
        truth, forward = exact(images.double())["pose"], model(images)["pose"]
        steps = list(handle.method.stream(images[0]))
    assert_accurate("cameras", torch.stack([s.camera for s in steps], dim=1), truth, forward)


@torch.no_grad()
def test_switches_change_what_they_should_and_nothing_else():
    model, images = build(), clip()
    with gate4d.patch(model, method="more") as handle:
        full = handle.run(images)
    with gate4d.patch(model, method="more", camera_pass=False) as handle:
        stream = handle.method.stream(images)
        without = handle.run(images)
        assert list(stream)[-1].camera.shape == (1, 9)
        with pytest.raises(ValueError, match="camera_pass=True"):
            stream.camera_pass()
    assert not without.refined.any()
    assert not torch.equal(without.cameras, full.cameras)
    for a, b in zip(full.predictions, without.predictions, strict=True):
        assert torch.equal(a["pose"], b["pose"])
        assert torch.equal(a["depth"], b["depth"])
    with gate4d.patch(model, method="more", window=5) as handle:  # as many as there are
        torch.testing.assert_close(handle.run(images).cameras, full.cameras)
    with gate4d.patch(model, method="more", window=4) as handle:
        short = handle.run(images)
    for t in range(4):
        assert torch.equal(full.predictions[t]["pose"], short.predictions[t]["pose"])
    assert not torch.equal(full.predictions[4]["pose"], short.predictions[4]["pose"])


@torch.no_grad()
def test_streams_by_turns_and_a_forward_between():
    model, images, others = build(), clip(), clip(rows=3)
    with gate4d.patch(model, method="more", window=3) as handle:
        alone = [[s.camera for s in handle.method.stream(x)] for x in (images, others)]
        forward = model(images)
        one, other = handle.method.stream(images), handle.method.stream(others)
        for t in range(5):
            assert torch.equal(next(one).camera, alone[0][t])
            assert torch.equal(model(images)["pose"], forward["pose"])
            held, early = one.camera_pass()  # at any time, and nothing is changed by it
            assert early.shape == (1, len(held), 9)
            assert torch.equal(next(other).camera, alone[1][t])
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images)["pose"], forward["pose"])
        late = handle.method.stream(images)
        next(late)
    with pytest.raises(RuntimeError, match="patch was removed"):
        next(late)
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_a_long_stream_holds_no_more_than_a_short_one():
    model = build(depth=1)
    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again
    held = {}
    with gate4d.patch(model, method="more", window=3, anchors=1) as handle:
        frames = (torch.rand(3, 14, 28) for _ in range(300))
        stream = handle.method.stream(frames)
        for number, step in enumerate(stream, start=1):
            if number in (20, 300):
                held[number] = live_bytes(earlier)
            assert torch.isfinite(step.camera).all()
        assert number == 300
        frames, cameras = stream.camera_pass()
        assert frames == [0, 297, 298, 299]
        assert torch.isfinite(cameras).all()
    assert held[300] <= held[20]


@torch.no_grad()
def test_compiled_blocks_know_their_frames():
    """The mask of a global block takes the size of a frame from the frame block before it, compiled or not."""
    model = build()
    with gate4d.patch(model, method="more") as handle:
        torch._dynamo.reset()
        compiled = torch.compile(model.aggregator.frame_blocks[0], backend="eager")
        for tokens in (7, 9):
            compiled(torch.rand(3, tokens, 32), pos=torch.zeros(3, tokens, 2, dtype=torch.long))
            assert handle.table.select("frame")[0].tokens == (tokens, tokens)


def test_a_training_step_under_the_patch():
    """Gradients of the causal forward against dense masks, and attention forcing on what an observer sees."""
    images = clip(3)

    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and n.endswith("qkv.weight")
        }

    def of(model, cameras):
        return gradients(model, cameras.square().sum())

    exact_model, model = build(torch.float64), build()
    exact = of(exact_model, restated(exact_model, images.double().unbind(1))[0])
    torch_says = of(model, restated(model, images.unbind(1))[0])
    with gate4d.patch(model, method="more") as handle:
        ours = of(model, model(images)["pose"])
        for name in ("aggregator.global_blocks.0.attn.qkv.weight", "camera_head.trunk.0.attn.qkv.weight"):
            assert_accurate_gradient(name, ours[name], exact[name], torch_says[name])

        layers = {}
        for row in handle.table.select("global"):
            row.control.observers.append(lambda q, k, scale, n=row.layer: layers.update({n: (q, k)}))
        predictions = {"pose_enc": model(images)["pose"]}
        layout = gate4d.TokenLayout(3, SPECIAL + 6, SPECIAL)
        forced = ForcedAttention(layers, layout, gate4d.Visibility.frame_causal(layout), PATCH)
        motion = torch.zeros(1, 3, 28, 42, dtype=torch.bool)
        motion[..., :14] = True
        targets = {"pose_enc": torch.randn(1, 3, 9), "motion": motion}
        total, terms = MoreRecipe().loss(predictions, targets, forced)
        assert terms.keys() == {"pose", "rotation", "translation", "forcing"}
        grads = gradients(model, total)
        assert all(g.isfinite().all() for g in grads.values())
        only = gradients(model, MoreRecipe(pose=0, rotation=0, translation=0).loss({}, targets, ForcedAttention(
            {1: _again(handle, model, images)}, layout, None, PATCH))[0])  # fmt: skip
        assert only["aggregator.global_blocks.1.attn.qkv.weight"].any()


def _again(handle, model, images):
    found = []
    row = handle.table.select("global")[1]
    row.control.observers[:] = [lambda q, k, scale: found.append((q, k))]
    model(images)
    return found[0]


def test_bad_input_is_named():
    for other in (croco.Cut3rSteps(), vggt.Vggt4d(dim=32, heads=2)):
        with pytest.raises(ValueError, match="method 'more' needs a model of the family vggt or"):
            gate4d.patch(other, method="more")
    for part in (vggt.Aggregator(), vggt.Vggt().aggregator.frame_blocks):
        with pytest.raises(ValueError, match="through \\['aggregator', 'camera_head'\\]"):
            gate4d.patch(part, method="more")
    model = build()
    for options, message in (
        ({"window": 0}, "window must be None or an int >= 1"),
        ({"anchors": 1}, "no effect without a window"),
        ({"causal": "patch"}, "causal must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            gate4d.patch(model, method="more", **options)
    with pytest.raises(ValueError, match="needs a VGGT"):
        gate4d.patch(build(cls=vggt.StreamVggt), method="more", causal="token")
    with pytest.raises(TypeError, match="strength"):
        gate4d.patch(model, method="more", strength=1.0)
    odd = build()
    odd.aggregator.aa_order = ["global", "frame"]
    with pytest.raises(ValueError, match="frame and global blocks in turn"):
        gate4d.patch(odd, method="more")
    odd = build()
    odd.aggregator.special = torch.nn.Parameter(odd.aggregator.special[:, :, :4].detach().clone())
    with pytest.raises(ValueError, match=r"needs 5 special tokens .* got 4"):
        gate4d.patch(odd, method="more")
    with gate4d.patch(model, method="more") as handle:  # refused patches left nothing behind
        for frames, error, message in (
            ([], ValueError, "at least 1 frame"),
            ([torch.rand(3, 15, 28)], ValueError, "frame 0 must have sides that are multiples of 14"),
            ([torch.rand(3, 14, 28), torch.rand(14, 28)], ValueError, "frame 1 must have shape"),
            (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), TypeError, "frame 0 must be a floating-point image"),
            ([torch.rand(1, 3, 14, 28), torch.rand(2, 3, 14, 28)], ValueError, "must have the shape"),
        ):
            with pytest.raises(error, match=message):
                handle.run(frames)
        with pytest.raises(ValueError, match="has read a frame"):
            handle.method.stream(clip()).camera_pass()


@torch.no_grad()
def test_one_frame_is_the_plain_model():
    model, images = build(), clip(1)
    with gate4d.patch(model):
        plain = model(images)
    with gate4d.patch(model, method="more") as handle:
        result = handle.run(images)
    torch.testing.assert_close(result.predictions[0]["pose"], plain["pose"])
    torch.testing.assert_close(result.cameras, plain["pose"])


@torch.no_grad()
def test_a_model_with_a_stream_of_its_own():
    alternating = pytest.importorskip("gate4d.models.alternating")
    if not hasattr(alternating, "AlternatingModel"):
        pytest.skip("this model is not there yet")
    model, images = alternating.AlternatingModel(dim=64, heads=2, depth=2, trunk=1).eval(), torch.rand(1, 6, 3, 32, 48)
    forward = model(images, causal=True, camera_pass=True)
    with gate4d.patch(model, method="more") as handle:
        result = handle.run(images)
        with pytest.raises(ValueError, match="all frames must have one size"):
            handle.run([torch.rand(3, 32, 48), torch.rand(3, 32, 64)])
    with gate4d.patch(model, method="more", window=2, anchors=1) as handle:
        assert handle.run(images).refined.tolist() == [True, False, False, False, True, True]
    for options in ({}, {"window": 2, "anchors": 1}):  # as its own stream, with frames that left the cache too
        own = model.stream(images, **options)
        expected = list(own)
        with gate4d.patch(model, method="more", **options) as handle:
            got = handle.run(images)
        for a, b in zip(got.predictions, expected, strict=True):
            for name in ("pose_enc", "depth", "motion"):
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.cameras[:, got.refined], own.camera_pass()[:, got.refined], rtol=1e-4, atol=1e-5)
    with gate4d.patch(model, method="more"):  # a plain forward stays the model's own
        again = model(images, causal=True, camera_pass=True)
        torch.testing.assert_close(again["global_pose_enc"], forward["global_pose_enc"])
        whole = model(images)["pose_enc"]
    torch.testing.assert_close(whole, model(images)["pose_enc"])
    with pytest.raises(ValueError, match="forward of its own that stays as it is"):
        gate4d.patch(model, method="more", causal="token")
    streamed = torch.cat([p["pose_enc"] for p in result.predictions], dim=1)
    torch.testing.assert_close(streamed, forward["pose_enc"])
    torch.testing.assert_close(result.cameras, forward["global_pose_enc"])
    assert torch.equal(
        torch.stack(result.frame_masks, dim=1), torch.cat([p["motion"] for p in result.predictions], 1) > 0
    )


@pytest.mark.parametrize("name", ["VGGT", "STREAMVGGT", "STREAM3R"])
def test_real_checkouts(name):
    if f"GATE4D_UPSTREAM_{name}" not in os.environ:
        pytest.skip(f"GATE4D_UPSTREAM_{name} does not name a checkout")
    script = Path(__file__).parents[1] / "helpers" / "upstream_more.py"
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pose"] <= 1e-5
    assert report["depth"] <= 1e-5
    assert report["camera pass"] > 1e-3


def test_the_authors_checkout():
    if "GATE4D_UPSTREAM_MORE" not in os.environ:
        pytest.skip("GATE4D_UPSTREAM_MORE does not name a checkout")
    script = Path(__file__).parents[1] / "helpers" / "upstream_more.py"
    done = subprocess.run([sys.executable, script, "MORE"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("camera pass moves") > 1e-3
    assert all(report[f"{form}: {what}"] <= 1e-5 for form in ("ranges", "cache") for what in ("tokens", "camera pass"))
