"""Clips of points, poses and masks from what methods return: points follow the method's cameras."""

import dataclasses

import numpy as np
import pytest
import torch
from standins import factories

import gate4d
from gate4d.geometry import decode_pose, matrix_to_quaternion, unproject
from gate4d.methods import ClipResult, Ttt3rResult
from gate4d.methods.results import Collector, Outputs, collect

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

RECIPE = gate4d.GramRecipe(
    {"S": gate4d.GramMap("qq", (0, 1), "mean", inverted=True), "V": gate4d.GramMap("qk", (1,), "std")}, (-1, 1)
)
OPTIONS = {"vggt4d": {"recipe": RECIPE, "clusters": 6}, "more": {}}
SIZE = (28, 42)


class WorldVggt(factories.DenseVggt):
    """As VGGT does, it also says where its points are in the world, by its own cameras; ``depth`` can be left out."""

    gives_depth = True

    def forward(self, images):
        out = super().forward(images)
        cameras = decode_pose(out["pose_enc"].double(), *images.shape[-2:])
        out["world_points"] = unproject(out["depth"][..., 0].double(), *cameras).float()
        out["world_points_conf"] = out["depth_conf"]
        if not self.gives_depth:
            del out["depth"], out["depth_conf"]
        return out


def build(gives_depth=True):
    torch.manual_seed(0)
    model = WorldVggt(depth=2, dim=32, heads=2).eval()
    model.gives_depth = gives_depth
    return model


def run(model, method, **options):
    with gate4d.patch(model, method=method, **options) as handle:
        return handle.run(torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(1)))


def pixels_of(found, intrinsics):
    """Where the points are seen by the poses, and at which depth: ``[T, H, W, 3]``."""
    local = (found.points.double() - found.poses[:, None, None, :3, 3]) @ found.poses[:, None, :3, :3]
    seen = local @ intrinsics.mT[:, None]
    return torch.cat((seen[..., :2] / seen[..., 2:], local[..., 2:]), dim=-1)


@pytest.mark.parametrize("method", ["vggt4d", "more"])
@torch.no_grad()
def test_points_are_where_the_methods_cameras_see_them(method):
    options = {"recipe": RECIPE, "clusters": 6} if method == "vggt4d" else {}
    result = run(build(), method, **options)
    if method == "more":
        encoding, depth = result.cameras[0], torch.cat([p["depth"][0] for p in result.predictions])
    else:
        encoding, depth = result.predictions["pose_enc"][0], result.predictions["depth"][0]
    found = collect(result, SIZE)
    cameras, intrinsics = decode_pose(encoding.double(), *SIZE)
    torch.testing.assert_close(found.poses, cameras.inverse(), atol=1e-6, rtol=0)
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in SIZE), indexing="ij")
    seen = pixels_of(found, intrinsics)
    torch.testing.assert_close(seen[..., :2], torch.stack((x, y), -1).expand(5, -1, -1, -1).double(), atol=1e-2, rtol=0)
    torch.testing.assert_close(seen[..., 2], depth[..., 0].double(), atol=1e-4, rtol=1e-4)
    own = result.predictions["world_points"][0] if method == "vggt4d" else None
    own = torch.cat([p["world_points"][0] for p in result.predictions]) if own is None else own
    assert (own - found.points).abs().max() > 1e-2  # the model's own points belong to other cameras


@pytest.mark.parametrize("method", ["vggt4d", "more"])
@torch.no_grad()
def test_world_points_without_depth_move_with_the_cameras(method):
    options = {"recipe": RECIPE, "clusters": 6} if method == "vggt4d" else {}
    full = collect(run(build(), method, **options), SIZE)
    found = collect(run(build(gives_depth=False), method, **options), SIZE)
    # The second pass and the camera pass change the fields of view a little, which world points cannot follow.
    torch.testing.assert_close(found.poses, full.poses)
    own = pixels_of(found, torch.eye(3).double().expand(5, 3, 3))[..., 2]
    torch.testing.assert_close(
        own, pixels_of(full, torch.eye(3).double().expand(5, 3, 3))[..., 2], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["vggt4d", "more"])
@torch.no_grad()
def test_world_points_without_depth_are_where_the_methods_cameras_have_them(method):
    """What the model's own camera sees at a place, the method's camera sees at the same place of its own."""
    model = build(gives_depth=False)
    images = torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    plain = model(images[None])["pose_enc"][0].double()
    with gate4d.patch(model, method=method, **OPTIONS[method]) as handle:
        result = handle.run(images)
    found = collect(result, SIZE)
    if method == "more":
        said = torch.cat([p["world_points"][0] for p in result.predictions]).double()
        own = torch.cat([p["pose_enc"][0] for p in result.predictions]).double()
    else:  # the points are of the first pass, which is the plain model
        said, own = result.predictions["world_points"][0].double(), plain
    assert (own - (result.cameras if method == "more" else result.predictions["pose_enc"])[0]).abs().max() > 1e-3
    seen = torch.einsum("tij,thwj->thwi", decode_pose(own, *SIZE)[0], torch.nn.functional.pad(said, (0, 1), value=1.0))
    expected = torch.einsum("tij,thwj->thwi", found.poses, seen)[..., :3]
    torch.testing.assert_close(found.points.double(), expected, atol=1e-5, rtol=1e-5)
    assert (found.points - said).abs().max() > 1e-2


@torch.no_grad()
def test_cut3rs_points_are_those_of_its_own_view():
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.5], [-0.2, 0.5, 0.0]]).double())
    x, y, z, w = matrix_to_quaternion(turn).tolist()
    pose = torch.tensor([[1.0, -2.0, 0.5, w, x, y, z]])
    local, other, sure = torch.rand(1, *SIZE, 3), torch.rand(1, *SIZE, 3), torch.rand(1, *SIZE)
    prediction = {
        "camera_pose": pose, "pts3d_in_self_view": local, "conf_self": sure, "pts3d_in_other_view": other,
        "conf": 2 + sure,
    }  # fmt: skip
    found = collect(Ttt3rResult([prediction], None, rates=torch.ones(1, 1, 4)), SIZE)
    expected = local[0].double() @ turn.T + pose[0, :3].double()
    torch.testing.assert_close(found.points[0].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(found.confidence, sure)
    del prediction["pts3d_in_self_view"]
    found = collect(Ttt3rResult([prediction], None, rates=torch.ones(1, 1, 4)), SIZE)
    assert torch.equal(found.points, other)
    assert torch.equal(found.confidence, 2 + sure)


@torch.no_grad()
def test_a_collector_keeps_a_regular_sample(tmp_path):
    result = run(build(), "more")
    full, frames = collect(result, SIZE), torch.randint(0, 255, (5, *SIZE, 3), dtype=torch.uint8)
    some = Collector(SIZE, 5, points=5 * 28 * 42 // 3, cameras=True)
    for prediction in result.predictions:
        some.add(prediction)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in (some.said[-1], some.confidence[-1]))
    found = some.finish(result)
    assert found.pixels.shape == (5, 28 * 42 // 3)
    at = torch.arange(5)[:, None], found.pixels
    torch.testing.assert_close(found.points, full.points.flatten(1, 2)[at])
    assert torch.equal(found.confidence, full.confidence.flatten(1)[at])
    assert torch.equal(found.masks, full.masks)
    assert len({int(n) % 42 for n in found.pixels.flatten()}) == 42  # all columns
    found.save(tmp_path, frames)
    body = (tmp_path / "points.ply").read_bytes().partition(b"end_header\n")[2]
    dtype = [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in "rgb"]
    saved = np.frombuffer(body, dtype)
    points = np.stack([saved[n] for n in "xyz"], 1)
    colours = np.stack([saved[n] for n in "rgb"], 1)
    nearest = torch.cdist(torch.tensor(points), full.points.flatten(0, 2)).argmin(1)
    assert len(points)
    assert np.array_equal(frames.flatten(0, 2)[nearest].numpy(), colours)


@torch.no_grad()
def test_cameras_that_are_not_finite_are_left_out_and_the_rest_is_written(tmp_path):
    result = run(build(), "more")
    broken = dataclasses.replace(result, cameras=result.cameras * torch.tensor([torch.nan] * 3 + [1.0] * 6))
    with pytest.warns(UserWarning, match="the cameras are left out: they are not finite"):
        found = collect(broken, SIZE)
    assert found.poses is None
    assert found.points is None
    frames = torch.zeros((5, *SIZE, 3), dtype=torch.uint8)
    assert {p.name for p in found.save(tmp_path, frames)} == {"masks", "overlays", "scores.npz"}


def test_poses_are_written_with_their_times(tmp_path):
    frames, times = torch.zeros((2, *SIZE, 3), dtype=torch.uint8), [1341846313.592026, 1341846313.628014]
    poses = torch.eye(4).double().repeat(2, 1, 1)
    Outputs({}, poses=poses).save(tmp_path, frames, times=times)
    first, second = (tmp_path / "poses.txt").read_text().splitlines()
    assert first.split()[0] == "1341846313.592026"
    assert second.split()[0] == "1341846313.628014"


@torch.no_grad()
def test_masks_of_scores_are_of_what_rather_moves_than_not():
    motion = torch.zeros(3, 1, 6)
    motion[:, 0, 2] = 0.2  # stands out, and yet the score says that it rather stands still
    result = ClipResult([{}] * 3, motion_scores=motion)
    with pytest.warns(UserWarning, match="no motion score is above 1/2: the masks are empty"):
        assert not collect(result, SIZE).masks.any()
    motion[:, 0, 2] = 0.9
    assert collect(result, SIZE).masks.any()
