"""Masks from saliency against the steps in float64 and the libraries' own functions; degenerate clips; writers."""

import builtins
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gate4d.methods import export
from gate4d.methods.segmentation import adaptive_threshold, cluster_means, dynamic_masks, kmeans, patch_masks

pytest.importorskip("sklearn")
multiotsu = pytest.importorskip("skimage.filters").threshold_multiotsu


def blobs(count=3000, clusters=12, width=16, spread=0.05):
    centres = torch.randn(clusters, width)
    truth = torch.randint(clusters, (count,))
    return centres[truth] + spread * torch.randn(count, width), truth


def inertia(x, labels):
    return sum(float((y - y.mean(0)).square().sum()) for n in labels.unique() for y in [x[labels == n].double()])


def clip(frames=4, grid=(6, 8), inside=0.9, outside=0.1):
    """A square of dynamic patches that moves; its features differ from the rest."""
    moving = torch.zeros(frames, *grid, dtype=torch.bool)
    for t in range(frames):
        moving[t, 1:4, t : t + 3] = True
    moving = moving.flatten(1)
    dyn = torch.where(moving, inside, outside) + 0.05 * torch.rand(frames, grid[0] * grid[1])
    features = torch.randn(2, 32)[moving.long()] + 0.1 * torch.randn(*moving.shape, 32)
    return dyn, features, grid, moving


@pytest.mark.parametrize("engine", ["sklearn", "torch"])
def test_kmeans_finds_blobs(engine):
    x, truth = blobs()
    labels = kmeans(x, 12, engine=engine)
    assert labels.dtype == torch.int64
    pairs = torch.stack((labels, truth)).unique(dim=1)
    assert pairs.shape[1] == 12  # one label a blob, one blob a label
    assert torch.equal(labels, kmeans(x, 12, engine=engine))


def test_kmeans_engines_agree_where_clusters_overlap():
    x = torch.randn(4000, 24) * torch.linspace(0.1, 2, 24)
    ours, theirs = (inertia(x, kmeans(x, 32, engine=e)) for e in ("torch", "sklearn"))
    starts = [inertia(x, kmeans(x, 32, engine="sklearn", seed=s)) for s in range(1, 6)]
    # No further from scikit-learn than scikit-learn is from itself with other seeds, twice over.
    assert abs(ours - theirs) <= 2 * max(abs(s - theirs) for s in starts)


def test_kmeans_with_few_and_equal_vectors():
    assert sorted(kmeans(torch.randn(3, 4), 64, engine="torch").tolist()) == [0, 1, 2]
    for engine in ("sklearn", "torch"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            labels = kmeans(torch.ones(50, 4), 8, engine=engine)
        assert len(labels) == 50
    far = torch.cat((torch.randn(100, 3), 1 + torch.randn(100, 3))) + 1e4  # far from the origin
    assert kmeans(far, 2, engine="torch").unique().numel() == 2


def test_threshold_is_the_libraries_and_the_best_of_three():
    values = torch.cat([m + 0.03 * torch.randn(500) for m in (0.1, 0.45, 0.9)]).clamp(0, 1).reshape(3, 20, 25)
    array = values.numpy()
    expected = {}
    for n in (2, 3, 4):
        thresholds = multiotsu(array, classes=n)
        regions = np.digitize(array, thresholds)
        expected[n] = np.var([array[regions == i].astype(np.float64).mean() for i in range(n)]) / n**0.5, thresholds[-1]
    best = max(expected, key=lambda n: expected[n][0])
    threshold, classes = adaptive_threshold(values)
    assert classes == best
    assert threshold == pytest.approx(float(expected[best][1]), abs=float(np.finfo(np.float32).eps))


def test_threshold_of_few_values():
    assert adaptive_threshold(torch.full((2, 3), 0.4)) is None
    threshold, classes = adaptive_threshold(torch.tensor([0.0, 0.0, 1.0]))
    assert classes == 2
    assert 0 < threshold < 1


def test_masks_follow_the_steps():
    dyn, features, grid, moving = clip()
    size = (84, 112)
    found = dynamic_masks(dyn, features, grid, size, clusters=8)
    means = torch.zeros_like(dyn, dtype=torch.float64)
    for n in found.labels.unique():
        means[found.labels == n] = dyn.double()[found.labels == n].mean()
    low, high = means.amin(1, keepdim=True), means.amax(1, keepdim=True)
    scores = ((means - low) / (high - low + 1e-6)).unflatten(1, grid)
    scores = F.interpolate(scores[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.scores.double(), scores, atol=8 * torch.finfo(torch.float32).eps, rtol=0)
    assert torch.equal(found.masks, found.scores > found.threshold)
    centres = found.masks.reshape(4, 6, 14, 8, 14)[:, :, 7, :, 7].flatten(1)
    assert torch.equal(centres, moving)
    assert torch.equal(patch_masks(found.masks, grid) | moving, patch_masks(found.masks, grid))


def test_cluster_means_of_hand():
    values = torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    got = cluster_means(values, torch.tensor([[3, 1], [3, 1]]))
    assert got.tolist() == [[0.25, 1.0], [0.25, 1.0]]


@pytest.mark.parametrize(("level", "full"), [(0.0, False), (1.0, True)])
def test_flat_clips_degrade_with_a_warning(level, full):
    features = torch.randn(2, 12, 4)
    with pytest.warns(UserWarning, match="full" if full else "empty"):
        found = dynamic_masks(torch.full((2, 12), level), features, (3, 4), (42, 56))
    assert bool((found.masks == full).all())
    assert torch.isfinite(found.scores).all()
    assert found.classes == 0


def test_one_flat_frame_is_static():
    dyn, features, grid, _ = clip()
    dyn[2], features[2] = 0.1, features[2, -1]
    found = dynamic_masks(dyn, features, grid, (84, 112), clusters=4)
    assert not found.masks[2].any()
    assert found.masks[0].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"grid": (5, 8)}, "grid"),
        ({"size": (0, 3)}, "size"),
        ({"features": torch.randn(4, 47, 3)}, "features"),
        ({"features": torch.full((4, 48, 3), torch.nan)}, "features"),
        ({"dyn": torch.full((4, 48), torch.inf)}, "dyn"),
        ({"engine": "magic"}, "engine"),
        ({"clusters": 0}, "clusters"),
        ({"classes": (1,)}, "classes"),
    ],
)
def test_bad_input_is_named(change, match):
    dyn, features, grid, _ = clip()
    args = {"dyn": dyn, "features": features, "grid": grid, "size": (84, 112), **change}
    with pytest.raises(ValueError, match=match):
        dynamic_masks(**args)
    with pytest.raises(ValueError, match="grid"):
        patch_masks(torch.zeros(1, 10, 10, dtype=torch.bool), (3, 5))


@pytest.mark.parametrize(("package", "call"), [
    ("sklearn", lambda: kmeans(torch.randn(4, 2), 2)),
    ("skimage", lambda: adaptive_threshold(torch.rand(9))),
    ("PIL", lambda: export.save_masks("unused", torch.zeros(1, 2, 2, dtype=torch.bool))),
])  # fmt: skip
def test_missing_extra_is_named(monkeypatch, package, call):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"gate4d\[methods\]"):
        call()


def test_images_and_arrays_are_read_back(tmp_path):
    image = pytest.importorskip("PIL.Image")
    masks = torch.rand(2, 5, 7) > 0.5
    frames = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    paths = export.save_masks(tmp_path / "masks", masks)
    assert [p.name for p in paths] == ["000000.png", "000001.png"]
    for path, mask in zip(paths, masks, strict=True):
        assert np.array_equal(np.asarray(image.open(path)), mask.numpy() * np.uint8(255))
    over = np.asarray(image.open(export.save_overlays(tmp_path / "over", frames, masks, alpha=1.0)[1]))
    assert (over[masks[1].numpy()] == [255, 0, 0]).all()
    assert np.array_equal(over[~masks[1].numpy()], frames[1][~masks[1]].numpy())
    with np.load(export.save_scores(tmp_path / "scores.npz", {"dyn": masks.float()})) as saved:
        assert np.array_equal(saved["dyn"], masks.float().numpy())
    with pytest.raises(ValueError, match="masks"):
        export.save_masks(tmp_path, masks.float())
    with pytest.raises(ValueError, match="scores"):
        export.save_overlays(tmp_path, frames, masks[:, 1:])


def test_poses_and_points_are_read_back(tmp_path):
    rotations = torch.linalg.qr(torch.randn(20, 3, 3, dtype=torch.float64))[0]
    rotations = rotations * torch.det(rotations)[:, None, None]
    rotations[0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # half a turn, where naive formulas divide by 0
    poses = torch.eye(4, dtype=torch.float64).repeat(20, 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = rotations, torch.randn(20, 3, dtype=torch.float64)
    rows = np.loadtxt(export.save_tum(tmp_path / "poses.txt", poses))
    assert np.array_equal(rows[:, 0], np.arange(20))
    assert np.allclose(rows[:, 1:4], poses[:, :3, 3].numpy(), rtol=1e-8)
    xyz, w = rows[:, 4:7], rows[:, 7, None]
    v = np.random.default_rng(0).standard_normal((20, 3))
    turned = v + 2 * w * np.cross(xyz, v) + 2 * np.cross(xyz, np.cross(xyz, v))  # q v q*
    assert np.allclose(turned, np.einsum("tij,tj->ti", rotations.numpy(), v), atol=1e-7)

    points, colours = torch.randn(6, 3), torch.randint(0, 256, (6, 3), dtype=torch.uint8)
    points[2, 1] = torch.nan
    raw = export.save_ply(tmp_path / "points.ply", points, colours).read_bytes()
    head, body = raw.split(b"end_header\n")
    assert b"element vertex 5" in head
    read = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    keep = [0, 1, 3, 4, 5]
    assert np.array_equal(read["xyz"], points[keep].numpy())
    assert np.array_equal(read["rgb"], colours[keep].numpy())
    for call, match in (
        (lambda: export.save_tum(tmp_path / "x", poses[:, :3]), "poses"),
        (lambda: export.save_tum(tmp_path / "x", poses, [0.0]), "timestamps"),
        (lambda: export.save_ply(tmp_path / "x", points[:, :2]), "points"),
        (lambda: export.save_ply(tmp_path / "x", points, colours.float()), "colours"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
