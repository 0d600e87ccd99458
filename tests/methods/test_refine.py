"""Refinement of masks: against both forms written out over all points and frames at once, and on known geometry."""

import pytest
import torch
import torch.nn.functional as F

from gate4d.data.procedural import render_clip
from gate4d.methods import refine
from gate4d.methods.refine import inliers, refine_masks
from gate4d.methods.segmentation import kmeans

pytest.importorskip("scipy")
pytest.importorskip("sklearn")


def scene(frames, height, width, seed=0):
    """Images, depth, intrinsics and poses in units of the mean depth, as VGGT's are, and the true motion."""
    clip = render_clip(frames, height, width, seed=seed)
    unit, poses = clip.depth[0].mean(), clip.poses.clone()
    poses[:, :3, 3] /= unit
    return (clip.frames.movedim(-1, 1) / 255, clip.depth / unit, clip.intrinsics, poses), clip.masks


def corrupted(motion, reach=4, seed=0):
    """Moving things with a margin, and patches of what stands still."""
    wide = F.max_pool2d(motion[:, None].float(), 2 * reach + 1, 1, reach)
    patches = (torch.rand(len(motion), 1, 5, 6, generator=torch.Generator().manual_seed(seed)) > 0.85).float()
    return ((wide + F.interpolate(patches, size=motion.shape[1:]))[:, 0] > 0) | motion


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("form", ["authors", "paper"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_corrupted_mask_gets_better(form, seed):
    geometry, motion = scene(10, 84, 112, seed)
    bad = corrupted(motion)
    good = refine_masks(bad, *geometry, form=form)
    assert iou(good, motion) > iou(bad, motion) + 0.15
    assert (good & motion).sum() > 0.97 * motion.sum()  # what moves stays
    few = refine_masks(bad, *geometry, form=form, views=4)
    assert iou(few, motion) > iou(bad, motion) + 0.1


def pixel(image, u, v, half, nearest=False):
    """``image [H, W]`` at ``u, v [M]``, zero outside; ``half``: pixel centres lie at integer + 1/2."""
    height, width = image.shape
    x, y = (u - 0.5, v - 0.5) if half else (u, v)
    padded = F.pad(image, (1, 1, 1, 1))

    def at(i, j):  # rows, columns
        return padded[(i + 1).clamp(0, height + 1).long(), (j + 1).clamp(0, width + 1).long()]

    if nearest:
        return at(y.round(), x.round())
    i, j = y.floor(), x.floor()
    a, b = y - i, x - j
    rows = [(1 - b) * at(i + n, j) + b * at(i + n, j + 1) for n in (0, 1)]
    return (1 - a) * rows[0] + a * rows[1]


def restated(masks, images, depth, intrinsics, poses, form):
    """Decisions per pixel before they are closed and dilated, which of them are no matter of rounding, and the sums
    over the other frames of w and the two residuals, a list over frames.
    """
    frames, height, width = depth.shape
    inverse, cameras = intrinsics.inverse(), poses.inverse()
    grid = torch.cartesian_prod(torch.arange(height) + 0.5, torch.arange(width) + 0.5).flip(1).double()
    half, sure, sums = form == "paper", [], []
    decisions = torch.zeros_like(masks)
    for t in range(frames):
        rays = torch.cat((grid, torch.ones(len(grid), 1)), 1) @ inverse.T
        world = (depth[t].flatten()[:, None] * rays) @ poses[t, :3, :3].T + poses[t, :3, 3]
        chosen = masks[t].flatten()
        if form == "authors":
            near = torch.cdist(world, world).topk(20, largest=False).values.mean(1)
            chosen = chosen & (near < near.mean() + 2.5 * near.std())
        points, colours = world[chosen], images[t].flatten(1)[:, chosen]
        w, of_depth, of_colour = [], [], []
        for i in range(frames):
            if i == t:
                continue

            def residual(p, i=i):
                x = p @ cameras[i, :3, :3].T + cameras[i, :3, 3]
                u, v = ((x @ intrinsics.T)[:, :2] / x[:, 2:]).T
                if not half:
                    return x[:, 2], u, v, x[:, 2] - pixel(depth[i], u, v, half, nearest=True)
                slopes = torch.gradient(depth[i])[::-1]
                su, sv = (pixel(s, u, v, half).detach() for s in slopes)
                fixed = pixel(depth[i], u, v, half).detach()
                # D as a plane around where the point lands: its slope is that of the central differences.
                return x[:, 2], u, v, x[:, 2] - (fixed + su * (u - u.detach()) + sv * (v - v.detach()))

            p = points.clone().requires_grad_()
            z, u, v, r = residual(p)
            (gradient,) = torch.autograd.grad(r.sum(), p) if half else (torch.ones_like(p),)
            z, u, v, r = (y.detach() for y in (z, u, v, r))
            inside = (u > 0) & (u < width) & (v > 0) & (v < height) & (z > 0)
            static = pixel(masks[i].double(), u, v, half) <= 0.5
            w.append(inside & (r < 0.01) & static)
            c = colours - torch.stack([pixel(x, u, v, half) for x in images[i]])
            of_depth.append(r.abs() if not half else (r[:, None] * gradient).norm(dim=1))
            of_colour.append(c.abs().sum(0) if not half else c.norm(dim=0))
        w, of_depth, of_colour = (torch.stack(x).double() for x in (w, of_depth, of_colour))
        sums.append(torch.stack((w.sum(0), (w * of_depth).sum(0), (w * of_colour).sum(0))))
        loss = w * (of_depth + of_colour / 3)
        if form == "authors":
            labels = kmeans(points.float(), 30, seed=42)
            dynamic, clear = torch.zeros(len(points), dtype=torch.bool), torch.zeros(len(points), dtype=torch.bool)
            for n in labels.unique():
                mine = labels == n
                share, mean = w[:, mine].mean(), loss[:, mine].sum() / w[:, mine].sum()
                dynamic[mine] = bool(share < 0.05 or mean > 0.1)
                clear[mine] = bool(share < 0.049 or (share > 0.051 and (mean - 0.1).abs() > 1e-3))
        else:
            score = loss.mean(0)
            dynamic, clear = (w.sum(0) == 0) | (score > 0.1), (score - 0.1).abs() > 1e-4
        decisions[t].view(-1)[chosen] = dynamic
        sure.append(torch.ones(height * width, dtype=torch.bool))
        sure[-1][chosen] = clear
    return decisions, torch.stack(sure).unflatten(1, (height, width)), sums


def closed_and_dilated(masks):
    def spread(x, offsets, value=0.0):
        padded = F.pad(x, (2, 2, 2, 2), value=value)
        height, width = x.shape[1:]
        return torch.stack([padded[:, 2 + i : 2 + i + height, 2 + j : 2 + j + width] for i, j in offsets]).amax(0)

    ellipse = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if abs(i) < 2 or j == 0]
    square = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    closed = -spread(-spread(masks.float(), ellipse), ellipse, value=-1.0)
    return spread(closed, square) > 0


@pytest.mark.parametrize("form", ["authors", "paper"])
@torch.no_grad()
def test_against_the_formulas(form, monkeypatch):
    geometry, motion = scene(5, 42, 56)
    masks = corrupted(motion, reach=2)
    exact = [x.double() for x in geometry]
    with torch.enable_grad():
        expected, sure, sums = restated(masks, *exact, form)
    assert 0.02 < expected.float().mean() < masks.float().mean() - 0.02  # some stay and some go
    decided, summed, real, residuals = [], [], refine._smooth, refine._Scene.residuals
    monkeypatch.setattr(refine, "_smooth", lambda mask: decided.append(mask) or real(mask))
    monkeypatch.setattr(refine._Scene, "residuals", lambda *args: summed.append(residuals(*args)) or summed[-1])
    for inputs, allowed in ((exact, 0.0), (geometry, 2e-3)):  # in fp32 a point or two may fall into another cluster
        decided.clear()
        refined = refine_masks(masks, *inputs, form=form)
        got = torch.stack(decided)
        assert sure.float().mean() > 0.95
        assert (got[sure] != expected[sure]).float().mean() <= allowed
        assert torch.equal(refined, closed_and_dilated(got))
    for got, true in zip(summed[: len(sums)], sums, strict=True):  # of the exact inputs
        torch.testing.assert_close(torch.stack(got), true, rtol=1e-9, atol=1e-12)


def test_inliers():
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    points[7] += 4
    points[100:120] = 0.5  # 20 in one place: Open3D drops what has no distance to its neighbours
    kept = inliers(points, 20, 2.5)
    assert not kept[7]
    assert not kept[100:120].any()
    near = torch.cdist(points.double(), points.double()).topk(20, largest=False).values.mean(1).clamp(min=0)
    near[100:120] = 0
    mean = near.mean()
    deviation = ((near - mean)[near > 0].square().sum() / 399).sqrt()
    assert torch.equal(kept, (near > 0) & (near < mean + 2.5 * deviation))


@pytest.mark.parametrize("form", ["authors", "paper"])
def test_clips_of_one_frame_and_of_one_kind(form):
    geometry, _ = scene(3, 28, 42)
    empty = torch.zeros(3, 28, 42, dtype=torch.bool)
    assert not refine_masks(empty, *geometry, form=form).any()
    full = refine_masks(~empty, *geometry, form=form)  # nothing static to compare with: all stays
    assert full.float().mean() > 0.95
    few = empty.clone()
    few[1, 3, 4:9] = True  # fewer points than clusters
    assert refine_masks(few, *geometry, form=form).shape == few.shape
    images, depth, intrinsics, poses = geometry
    lone = refine_masks(~empty[:1], images[:1], depth[:1], intrinsics, poses[:1], form=form)
    assert lone.float().mean() > 0.95


def test_intrinsics_by_frame_and_bad_input():
    geometry, motion = scene(3, 28, 42)
    images, depth, intrinsics, poses = geometry
    same = refine_masks(motion, images, depth, intrinsics.repeat(3, 1, 1), poses)
    assert torch.equal(same, refine_masks(motion, *geometry))
    for args, match in (
        ((motion.float(), *geometry), "masks must be bool"),
        ((motion, images[:, :, 1:], depth, intrinsics, poses), "images must be"),
        ((motion, images, depth[..., None], intrinsics, poses), "depth must be"),
        ((motion, images, depth * float("nan"), intrinsics, poses), "depth must be finite"),
        ((motion, images, depth, intrinsics, poses[:, :3]), "poses must be"),
    ):
        with pytest.raises(ValueError, match=match):
            refine_masks(*args)
    with pytest.raises(ValueError, match="form must be"):
        refine_masks(motion, *geometry, form="gradient")
    with pytest.raises(ValueError, match="views must be"):
        refine_masks(motion, *geometry, views=0)
