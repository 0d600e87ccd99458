"""MoRe's own model, as a stand-in: attention by key ranges and with a cache, and its copied camera tokens."""

import gc

import pytest
import torch
from helpers.accuracy import assert_accurate
from standins import more
from standins.common import live_bytes
from torch.nn import functional as F

import gate4d
from gate4d.methods.losses import ForcedAttention, MoreRecipe

VARIANTS = [{}, {"additional_token": False}, {"same_token": True}, {"sparse": False}]


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return more.More(**options).eval().to(dtype)


def clip(frames=5, batch=2, rows=2, columns=3):
    return torch.rand(batch, frames, 3, rows * 14, columns * 14)


def stream(model, images):
    aggregator = model.aggregator
    aggregator.global_kv_cache = [{"k": None, "v": None} for _ in range(aggregator.depth)]
    return [model(image[:, None]) for image in images.unbind(1)]


def assert_same(got, expected, exact=None):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        if x is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_patched_equals_unpatched(options, monkeypatch):
    model, images = build(**options), clip()
    expected = model(images)
    kernel = more.flex_flash_attn_func
    with monkeypatch.context() as without:  # where the kernel cannot run: recognised all the same, and it is not called
        without.delattr(more, "flex_flash_attn_func")
        without.setattr(more, "flex_flash_attn_func", lambda *_, **__: 1 / 0, raising=False)
        table = gate4d.inspect(model)
        assert {row.family for row in table.select("global")} == {
            "more" if options.get("sparse") is False else "more-sparse"
        }
        assert {row.family for row in table if row.role != "global"} == {"more"}
        with gate4d.patch(model):
            got = model(images)
    assert more.flex_flash_attn_func is kernel
    assert_same(got, expected)
    assert_same(model(images), expected)
    assert expected["attn_weight"].shape == (10, 2, 1, 11)


@torch.no_grad()
def test_the_cache_that_all_layers_share():
    model, images = build(stream=True), clip()
    expected = stream(model, images)
    with gate4d.patch(model) as handle:
        got = stream(model, images)
        shared = model.aggregator.global_kv_cache
        assert shared[0] is shared[1]
        assert shared[0]["k"].shape == (2, 2, 5 * 2 * 11, 16)  # of every frame and layer
        assert handle.table.select("global")[1].tokens == (11, 5 * 2 * 11)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    half = stream(model, images[:, :2])  # begun without the patch, gone on with it, finished without
    with gate4d.patch(model):
        half += [model(images[:, t : t + 1]) for t in (2, 3)]
    half.append(model(images[:, 4:]))
    for a, b in zip(half, expected, strict=True):
        assert_same(a, b)
    mixed = [clip(1), clip(1, rows=3), clip(1)]  # frames of different sizes
    model.aggregator.global_kv_cache = [{"k": None, "v": None} for _ in range(2)]
    plain = [model(x) for x in mixed]
    model.aggregator.global_kv_cache = [{"k": None, "v": None} for _ in range(2)]
    with gate4d.patch(model):
        for x, b in zip(mixed, plain, strict=True):
            assert_same(model(x), b)


def test_gradients_and_the_forcing_of_the_models_own_rows():
    model, images = build(), clip(3)
    motion = torch.rand(2, 3, 28, 42) > 0.6

    def run(recipe):
        model.zero_grad()
        out = model(images)
        rows = out["attn_weight"][..., more.SPECIAL :]
        moving = F.avg_pool2d(motion.float().flatten(0, 1), 14).flatten(1)
        forcing = (moving[:, None, None] * rows).mean()
        if recipe is not None:
            torch.testing.assert_close(recipe(motion), forcing)
        (forcing + out["dup_pose_enc"].square().sum() + out["depth"].square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(None)
    layers = {}

    def recipe(motion):
        forced = ForcedAttention(layers, gate4d.TokenLayout(1, 11, more.SPECIAL), patch=14)
        return MoreRecipe().loss({}, {"motion": motion}, forced)[1]["forcing"]

    with gate4d.patch(model) as handle:
        row = handle.table.select("frame")[-1]
        # the block runs twice a forward, the second time for the copied tokens
        row.control.observers.append(lambda q, k, scale: layers.setdefault(row.layer, (q, k)))
        got = run(recipe)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5 * float(x.abs().max()), msg=name)


@pytest.mark.parametrize("options", [{}, {"same_token": True}], ids=str)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_the_camera_pass_is_the_copied_tokens_of_the_forward(options, cached):
    images = clip()
    exact, torch_says = build(torch.float64, **options)(images.double()), build(**options)(images)
    model = build(**options, **({"stream": True} if cached else {}))
    model.load_state_dict(build(**options).state_dict())
    aggregator = model.aggregator
    own = getattr(aggregator, "global_kv_cache", None)
    with gate4d.patch(model, method="more") as handle:
        steps = list(handle.method.stream(images))
        result = handle.run(images)
        assert (aggregator.additional_token, model.additional_token) == (True, True)
        assert getattr(aggregator, "global_kv_cache", None) is own
    depth = torch.cat([s.prediction["depth"] for s in steps], dim=1)
    assert_accurate("depth", depth, exact["depth"], torch_says["depth"])
    assert_accurate("camera pass", result.cameras, exact["dup_pose_enc"], torch_says["dup_pose_enc"])
    assert not torch.allclose(result.cameras, torch.stack([s.camera for s in steps], dim=1), atol=1e-3)
    assert torch.equal(
        torch.stack(result.frame_masks, dim=1), torch.cat([s.prediction["motion"] for s in steps], 1)[..., 0] > 0
    )
    if own is not None:
        assert all(state["k"] is None for state in own)


@torch.no_grad()
def test_a_window_bounds_what_the_copied_tokens_need():
    model = build()
    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again
    held = {}
    with gate4d.patch(model, method="more", window=3, anchors=1) as handle:
        frames = handle.method.stream(torch.rand(3, 14, 28) for _ in range(60))
        for number, step in enumerate(frames, start=1):
            assert step.camera.isfinite().all()
            if number in (10, 60):
                held[number] = live_bytes(earlier)
        numbers, cameras = frames.camera_pass()
    assert numbers == [0, 57, 58, 59]
    assert cameras.isfinite().all()
    assert held[60] <= held[10]


@torch.no_grad()
def test_frames_of_different_sizes():
    """The first and the last frame alone see what they would see in a clip of their own size."""
    model = build()
    mixed = [torch.rand(1, 3, 28, 42), torch.rand(1, 3, 14, 28), torch.rand(1, 3, 28, 42)]
    with gate4d.patch(model, method="more") as handle:
        result = handle.run(mixed)
        alone = handle.run([mixed[0]])
    assert [p["depth"].shape[2] for p in result.predictions] == [6, 2, 6]
    torch.testing.assert_close(result.predictions[0]["depth"], alone.predictions[0]["depth"])
    assert result.cameras.isfinite().all()
    assert result.refined.all()


class TokenCausal(more.SparseAttention):
    """Names and ranges of another computation."""

    def forward(self, x, attn_bias=None, pos=None, motion_scores=None, save_attn=False, kv_cache=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        weights = (q @ k.mT * self.scale).masked_fill(~mask, -torch.inf).softmax(-1)
        return self.finish(weights @ v), None


class Biased(more.Attention):
    def forward(self, x, attn_bias=None, pos=None, motion_scores=None, save_attn=False, kv_cache=None):
        out, rest = super().forward(x, None, pos, motion_scores, save_attn, kv_cache)
        return (out if attn_bias is None else out * attn_bias), rest


def test_other_computations_are_not_taken_for_it():
    for cls, rope in ((TokenCausal, True), (Biased, False)):
        module = cls(32, 2, True, more.VggtRotary() if rope else None)
        table = gate4d.inspect(torch.nn.ModuleDict({"attn": module}))
        assert not {"more", "more-sparse"} & set(table.families), table
    model = build()
    with gate4d.patch(model):
        attention = model.aggregator.global_blocks[0].attn
        x, pos = torch.rand(1, 22, 32), torch.zeros(1, 22, 2, dtype=torch.long)
        for size in (None, 0, 23):
            with pytest.raises(ValueError, match=r"attn_bias must be the number of tokens of a frame, in \[1, 22\]"):
                attention(x, attn_bias=size, pos=pos)
        with pytest.raises(ValueError, match=r"\['attn_bias'\] must be left out"):
            model.aggregator.patch_embed.blocks[0].attn(x, attn_bias=x)
    with pytest.raises(ValueError, match="forward of its own that stays as it is"):
        gate4d.patch(model, method="more", causal="token")
