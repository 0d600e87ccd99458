"""VGGT4D on the stand-in of VGGT: every intermediate map, the masks and the second pass, materialised in float64."""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers.accuracy import assert_accurate
from standins import croco, factories, vggt

import gate4d
from gate4d.methods.refine import refine_masks
from gate4d.methods.results import collect
from gate4d.methods.segmentation import patch_masks
from gate4d.methods.vggt4d import vggt_geometry

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

GRID, PATCH, SPECIAL = (3, 4), 14, 5
SHALLOW = gate4d.GramRecipe(
    {"S": gate4d.GramMap("qq", (0, 1), "mean", inverted=True), "V": gate4d.GramMap("qk", (1,), "std")}, (-1, 1)
)


def build(dtype=torch.float32, depth=24):
    torch.manual_seed(0)
    model = vggt.Vggt(depth=depth, dim=32, heads=2).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    return model.to(dtype)


def clip(frames=7):
    return torch.rand(frames, 3, GRID[0] * PATCH, GRID[1] * PATCH)


def blocks(model):
    return [
        (role, n, b.attn)
        for role in ("frame", "global")
        for n, b in enumerate(getattr(model.aggregator, f"{role}_blocks"))
    ]


def replaced(model, images, attend):
    """The model's outputs with ``attend(role, layer, q, k, v)`` in its frame and global blocks."""
    for role, layer, module in blocks(model):

        def forward(self, x, pos=None, role=role, layer=layer):
            q, k, v = self.heads(x)
            q, k = self.turned(q, k, pos)
            return self.finish(attend(role, layer, q, k, v))

        module.forward = types.MethodType(forward, module)
    out = model(images[None])
    for _, _, module in blocks(model):
        del module.forward
    return out


def normalised(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low + 1e-6)


def materialised_saliency(model, images, reorder=False):
    """Dyn and its maps from all products of all patches of a frame with all of each source frame; ``reorder``: the
    attention adds up its keys in a random order, which rounds differently and is as right."""
    seen, frames = {}, len(images)

    def keep(role, layer, q, k, v):
        if role == "global":
            split = [x.unflatten(2, (frames, -1))[0, :, :, SPECIAL:].transpose(0, 1) for x in (q, k)]  # [T, H, P, D]
            seen[layer] = dict(zip("qk", split, strict=True))
        if reorder:
            order = torch.randperm(k.shape[2])
            k, v = k[:, :, order], v[:, :, order]
        return F.scaled_dot_product_attention(q, k, v)

    predictions = replaced(model, images, keep)

    def over(kind, layers):  # -> per frame [P, P], mean over layers, heads and source frames
        return [
            torch.stack([
                seen[n][kind[0]][t] @ seen[n][kind[1]][t + w].mT
                for n in layers for w in (-6, -4, -2, 2, 4, 6) if 0 <= t + w < frames
            ]).mean((0, 1))
            for t in range(frames)
        ]  # fmt: skip

    raw = {
        "S_mid": torch.stack([m.mean(1) for m in over("qq", range(3, 8))]),
        "V_deep": torch.stack([m.std(1) for m in over("qq", (18, 19))]),
        "S_deep": torch.stack([m.mean(1) for m in over("qq", range(17, 22))]),
        "S_sh": torch.stack([m.mean(1) for m in over("kk", (0,))]),
        "V_sh": torch.stack([m.std(1) for m in over("qk", (0,))]),
    }
    maps = {name: normalised(x) for name, x in raw.items()}
    dyn = (1 - maps["S_mid"]) * (1 - maps["V_deep"]) * maps["S_deep"] * (1 - maps["S_sh"]) * maps["V_sh"]
    return {**maps, "dyn": normalised(dyn)}, predictions


def materialised_second(model, images, dynamic):
    """Keys and values of dynamic patches taken out, layer by layer and item by item."""
    keep = ~F.pad(dynamic, (SPECIAL, 0))

    def attend(role, layer, q, k, v):
        if layer >= 5:
            return F.scaled_dot_product_attention(q, k, v)
        masks = keep if role == "frame" else keep.flatten()[None]
        return torch.cat([
            F.scaled_dot_product_attention(q[b : b + 1], k[b : b + 1, :, m], v[b : b + 1, :, m])
            for b, m in enumerate(masks)
        ])  # fmt: skip

    return replaced(model, images, attend)


@torch.no_grad()
def test_against_everything_materialised():
    images, model, exact_model = clip(), build(), build(torch.float64)
    runs = []
    hook = model.aggregator.patch_embed.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    with gate4d.patch(model, method="vggt4d", clusters=10) as handle:
        result = handle.run(images)
    hook.remove()
    assert len(runs) == 1  # the encoder ran in the first pass only

    exact, first = materialised_saliency(exact_model, images.double())
    torch_runs = [materialised_saliency(model, images, reorder) for reorder in (False, True, True, True)]
    for name, true in exact.items():
        got = result.saliency.dyn[0] if name == "dyn" else result.saliency.maps[name][0]
        assert_accurate(name, got, true, *(says[name] for says, _ in torch_runs))
    assert_accurate("depth", result.predictions["depth"], first["depth"], *(run["depth"] for _, run in torch_runs))

    found = result.masks
    dynamic = patch_masks(found.masks, GRID)
    assert 0 < dynamic.float().mean() < 1

    def clustered(dyn):
        means = torch.zeros_like(dyn)
        for n in found.labels.unique():
            means[found.labels == n] = dyn[found.labels == n].mean()
        pixels = normalised(means).unflatten(1, GRID)[:, None]
        return F.interpolate(pixels, size=images.shape[-2:], mode="bilinear")[:, 0]

    scores, *torch_scores = (clustered(says["dyn"]) for says in (exact, *(says for says, _ in torch_runs)))
    assert_accurate("scores", found.scores, scores, *torch_scores)
    worst = max((x - scores).abs().max() for x in torch_scores)
    off = 2 * worst + torch.finfo(torch.float32).eps  # what assert_accurate allows
    sure = (scores - found.threshold).abs() > off
    assert sure.float().mean() > 0.99
    assert torch.equal(found.masks[sure], (scores > found.threshold)[sure])

    second = materialised_second(exact_model, images.double(), dynamic)
    torch_second = materialised_second(model, images, dynamic)
    assert_accurate("pose", result.predictions["pose"], second["pose"], torch_second["pose"])
    assert (second["pose"] - first["pose"]).abs().max() > 1e-3  # the masks do change the cameras


@torch.no_grad()
def test_switches_change_what_they_should_and_nothing_stays():
    model, images = build(depth=2), clip(4)
    with gate4d.patch(model):
        plain = model(images[None])
    options = {"recipe": SHALLOW, "clusters": 6}
    with gate4d.patch(model, method="vggt4d", **options) as handle:
        masked = handle.run(list(images))
        again = handle.run(images[None])
        unmasked = model(images[None])
        assert all(r.control.gate is None and not r.control.observers for r in handle.table)
    with gate4d.patch(model, method="vggt4d", masked_layers=None, **options) as handle:
        off = handle.run(images)
    with gate4d.patch(model, method="vggt4d", camera_outputs=(), **options) as handle:
        first_only = handle.run(images)
    for name in plain:
        assert torch.equal(plain[name], unmasked[name])
        assert torch.equal(plain[name], off.predictions[name])
        assert torch.equal(plain[name], first_only.predictions[name])
        assert torch.equal(masked.predictions[name], again.predictions[name])
    assert torch.equal(off.masks.masks, masked.masks.masks)
    assert torch.equal(plain["depth"], masked.predictions["depth"])
    assert not torch.equal(plain["pose"], masked.predictions["pose"])
    assert "forward" not in model.aggregator.patch_embed.__dict__


def rotation(quaternion):
    """Of the unit quaternion xyzw, by rotating the axes: ``q e q*``."""
    *axis, real = (quaternion / quaternion.norm()).double()
    axis = torch.stack(axis)
    columns = []
    for e in torch.eye(3).double():
        once = torch.linalg.cross(axis, e) + real * e
        columns.append(e + 2 * torch.linalg.cross(axis, once))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("form", ["auto", "authors", "paper"])
@torch.no_grad()
def test_refined_masks(form):
    """With depth and field of view of the first pass and poses of the second."""
    torch.manual_seed(0)
    model, images = factories.DenseVggt(depth=2, dim=32, heads=2).eval(), clip(4)
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW, clusters=6, refine=form) as handle:
        result = handle.run(images)
        before = model(images[None])
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW, clusters=6, refine=None) as handle:
        coarse = handle.run(images)
    assert coarse.refined_masks is None
    assert torch.equal(coarse.masks.masks, result.masks.masks)  # the masks that gate are not touched
    assert torch.equal(coarse.predictions["pose_enc"], result.predictions["pose_enc"])
    assert not torch.equal(before["pose_enc"], result.predictions["pose_enc"])
    height, width = images.shape[-2:]
    poses, intrinsics = [], []
    for moved, first in zip(result.predictions["pose_enc"][0], before["pose_enc"][0], strict=True):
        camera = torch.eye(4).double()
        camera[:3, :3], camera[:3, 3] = rotation(moved[3:7]), moved[:3]
        poses.append(camera.inverse())
        focal = [side / 2 / (angle / 2).tan() for side, angle in ((width, first[8]), (height, first[7]))]
        intrinsics.append(torch.tensor([[focal[0], 0, width / 2], [0, focal[1], height / 2], [0, 0, 1]]))
    scene = before["depth"][0, ..., 0], torch.stack(intrinsics), torch.stack(poses).float()
    for got, expected in zip(vggt_geometry(before, result.predictions, (height, width)), scene, strict=True):
        torch.testing.assert_close(got, expected)
    expected = refine_masks(result.masks.masks, images, *scene, form="authors" if form == "auto" else form)
    assert (result.refined_masks != expected).float().mean() < 0.01
    assert not torch.equal(result.refined_masks, result.masks.masks)


@torch.no_grad()
def test_refinement_of_other_predictions():
    model, images = build(depth=2), clip(4)
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW) as handle:
        assert handle.run(images).refined_masks is None  # neither depth maps nor pose encodings: nothing to refine with
    with (
        gate4d.patch(model, method="vggt4d", recipe=SHALLOW, refine="authors") as handle,
        pytest.raises(ValueError, match="pose_enc"),
    ):
        handle.run(images)
    flat = torch.ones(4, *images.shape[-2:]), torch.tensor([[50.0, 0, 28], [0, 50, 21], [0, 0, 1]]), torch.eye(4)
    geometry = flat[0], flat[1], flat[2].repeat(4, 1, 1)
    options = {"recipe": SHALLOW, "geometry": lambda first, second, size: geometry, "refine_options": {"views": 2}}
    with gate4d.patch(model, method="vggt4d", refine="paper", **options) as handle:
        result = handle.run(images)
    assert torch.equal(result.refined_masks, refine_masks(result.masks.masks, images, *geometry, form="paper", views=2))
    with pytest.raises(ValueError, match="refine must be"):
        gate4d.patch(model, method="vggt4d", recipe=SHALLOW, refine="yes")


@pytest.mark.parametrize("form", ["auto", "authors", "paper"])
@torch.no_grad()
def test_a_refinement_that_fails_is_a_warning(form):
    """Random weights of a real VGGT have a field of view of 0: what both passes found is returned all the same."""
    torch.manual_seed(0)
    model, images = factories.DenseVggt(depth=2, dim=32, heads=2).eval(), clip(4)
    model.register_forward_hook(lambda module, args, out: {**out, "pose_enc": out["pose_enc"] * mask})
    mask = torch.tensor([1.0] * 7 + [0.0] * 2)
    handle = gate4d.patch(model, method="vggt4d", recipe=SHALLOW, clusters=6, refine=form)
    with handle, pytest.warns(UserWarning, match="not refined: intrinsics must be finite"):
        result = handle.run(images)
    assert result.refined_masks is None
    assert result.masks.masks.shape == (4, *images.shape[-2:])
    with pytest.warns(UserWarning, match="the points are left out"):
        found = collect(result, tuple(images.shape[-2:]))
    assert found.points is None
    assert found.poses.isfinite().all()
    assert torch.equal(found.masks, result.masks.masks)


@torch.no_grad()
def test_layers_and_camera_outputs_that_match_nothing():
    model, options = build(depth=2), {"method": "vggt4d", "recipe": SHALLOW, "clusters": 6}
    for layers, gated in (("auto", (0, 1)), ("0-1", (0, 1)), ("range(1)", (0,)), (1, (1,)), (None, ())):
        with gate4d.patch(model, masked_layers=layers, **options) as handle:
            assert handle.method.masked_layers == gated
    for layers in ("0-4", range(5), (), "early"):
        with pytest.raises(ValueError, match="masked_layers must"):
            gate4d.patch(model, masked_layers=layers, **options)
    with gate4d.patch(model, camera_outputs="pose", **options) as handle:
        one = handle.run(clip(4))
    assert set(one.first_cameras) == {"pose"}
    handle = gate4d.patch(model, camera_outputs=["poses"], **options)
    with handle, pytest.warns(UserWarning, match=r"no camera comes from the second pass.*\['poses'\]"):
        handle.run(clip(4))


class DictDino(vggt.Dino):
    """Returns a dict, as DINOv2 does."""

    def forward(self, images):
        x, self.positions = super().forward(images)
        return {"x_norm_patchtokens": x, "x_prenorm": x}


class DictAggregator(vggt.Aggregator):
    def embed(self, images, first=True):
        x = self.patch_embed(images.flatten(0, 1))["x_norm_patchtokens"]
        self.__dict__["patch_embed"] = lambda _: (x, self._modules["patch_embed"].positions)
        try:
            return super().embed(images, first)
        finally:
            del self.__dict__["patch_embed"]


@torch.no_grad()
def test_an_encoder_that_returns_a_dict():
    model, images = build(depth=2), clip(4)
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW) as handle:
        expected = handle.run(images)
    model.aggregator.__class__, model.aggregator.patch_embed.__class__ = DictAggregator, DictDino
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW) as handle:
        result = handle.run(images)
    assert torch.equal(result.masks.masks, expected.masks.masks)
    assert torch.equal(result.predictions["pose"], expected.predictions["pose"])


@torch.no_grad()
def test_a_failed_pass_leaves_nothing_behind():
    model = build(depth=2)
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW) as handle:
        hook = model.depth_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.run(clip(4))
        hook.remove()
        assert not any(r.control.observers for r in handle.table)
        assert not model.aggregator.patch_embed._forward_hooks
        handle.run(clip(4))


@torch.no_grad()
def test_a_clip_that_stands_still_has_finite_masks():
    model, images = build(depth=2), clip(1).repeat(4, 1, 1, 1)
    images[:] = 0.5  # and looks the same everywhere: all features are equal, so there is one cluster
    handle = gate4d.patch(model, method="vggt4d", recipe=SHALLOW)
    with handle, pytest.warns(UserWarning, match="the masks are"):
        result = handle.run(images)
    assert result.masks.masks.unique().numel() == 1
    assert torch.isfinite(result.masks.scores).all()
    assert torch.isfinite(result.predictions["pose"]).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="needs a model of the family vggt"):
        gate4d.patch(croco.Dust3r(), method="vggt4d")
    with pytest.raises(ValueError, match="needs a model of the family vggt"):
        gate4d.patch(vggt.Vggt4d(), method="vggt4d")
    model = build(depth=2)
    with pytest.raises(ValueError, match=r"recipe needs global blocks \[3, 4"):
        gate4d.patch(model, method="vggt4d")
    with pytest.raises(ValueError, match="recipe must be"):
        gate4d.patch(model, method="vggt4d", recipe="pi3")
    with pytest.raises(TypeError, match="colour"):
        gate4d.patch(model, method="vggt4d", colour=1)
    with gate4d.patch(model, method="vggt4d", recipe=SHALLOW) as handle:
        for frames, error, match in (
            (clip(1), ValueError, "1 frame"),
            ([torch.rand(3, 28, 28), torch.rand(3, 28, 42)], ValueError, "one size"),
            ([], ValueError, "at least one"),
            (torch.rand(2, 3, 30, 28), ValueError, "multiples of 14"),
            (torch.rand(2, 2, 3, 28, 28), ValueError, "one clip"),
            (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), TypeError, "uint8"),
        ):
            with pytest.raises(error, match=match):
                handle.run(frames)
