"""Measures of cameras, depth, masks and points by hand, and against the scripts that the field uses where they are."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gate4d.evaluation import (
    camera_errors,
    depth_errors,
    frame_boundaries,
    frame_ious,
    icp,
    is_degenerate,
    normals,
    pair_errors,
    point_errors,
    video_scores,
)


def turned(axis, degrees):
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    k, a = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.radians(degrees)
    return np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k


def poses(centers, turns=None):
    out = np.repeat(np.eye(4)[None], len(centers), 0)
    out[:, :3, 3] = centers
    if turns is not None:
        out[:, :3, :3] = turns
    return out


def walks(seed, frames=40):
    """A trajectory and a noisy version of it in another world and scale."""
    rng = np.random.default_rng(seed)
    true = poses(rng.normal(size=(frames, 3)).cumsum(0), [turned(rng.normal(size=3), 9 * n) for n in range(frames)])
    predicted = true.copy()
    predicted[:, :3, :3] = [x @ turned(rng.normal(size=3), rng.uniform(0, 5)) for x in true[:, :3, :3]]
    predicted[:, :3, 3] += 0.3 * rng.normal(size=(frames, 3))
    move = turned(rng.normal(size=3), 77)
    predicted[:, :3, :3] = move @ predicted[:, :3, :3]
    predicted[:, :3, 3] = 0.2 * predicted[:, :3, 3] @ move.T + 5
    return predicted, true


EVO = """
import json, sys, numpy as np
from evo.core.trajectory import PoseTrajectory3D
from evo.core.metrics import PoseRelation, Unit
import evo.main_ape as ape, evo.main_rpe as rpe
data, out = np.load(sys.argv[1]), []
for p, q in zip(data["predicted"], data["true"]):
    p, q = (PoseTrajectory3D(poses_se3=list(x), timestamps=np.arange(len(x), dtype=float)) for x in (p, q))
    align = dict(align=True, correct_scale=True)
    step = dict(delta=1, delta_unit=Unit.frames, all_pairs=False, **align)
    out.append([
        ape.ape(q, p, pose_relation=PoseRelation.translation_part, **align).stats["rmse"],
        rpe.rpe(q, p, pose_relation=PoseRelation.translation_part, **step).stats["rmse"],
        rpe.rpe(q, p, pose_relation=PoseRelation.rotation_angle_deg, **step).stats["rmse"],
    ])
print(json.dumps(out))
"""


@pytest.mark.skipif("GATE4D_EVO" not in os.environ, reason="GATE4D_EVO: the Python of an environment with evo")
def test_cameras_are_evos(tmp_path):
    pairs = [walks(seed) for seed in range(30)]
    np.savez(tmp_path / "in.npz", predicted=[p for p, _ in pairs], true=[q for _, q in pairs])
    command = [os.environ["GATE4D_EVO"], "-c", EVO, str(tmp_path / "in.npz")]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    ours = np.array([camera_errors(p, q) for p, q in pairs])
    assert ours.min() > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_degenerate_trajectories_can_be_skipped():
    line, still, plane = np.outer(np.arange(4.0), (1, 2, 2)), np.zeros((4, 3)), np.eye(4)[:, :3]
    for a, b in ((line, plane), (plane, line), (still, plane), (plane, still)):
        assert is_degenerate(poses(a), poses(b))
        assert np.isnan(camera_errors(poses(a), poses(b), skip_degenerate=True)).all()
        assert np.isfinite(camera_errors(poses(a), poses(b))).all()
    assert not is_degenerate(poses(plane), poses(plane))
    assert np.isfinite(camera_errors(poses(plane), poses(plane), skip_degenerate=True)).all()


def test_pairs_by_hand():
    """Three cameras; the last one is 20 degrees off and goes another way. Pairs in the order 01, 02, 12."""
    true = poses([(0, 0, 0), (1, 0, 0), (1, 1, 0)])
    predicted = poses([(0, 0, 0), (2, 0, 0), (2, -3, 0)], [np.eye(3), np.eye(3), turned((0, 0, 1), 20)])
    found = pair_errors(predicted, true)
    np.testing.assert_allclose(found.rotation, (0, 20, 20), atol=1e-12)
    angle = np.degrees(np.arctan2(1, 1) + np.arctan2(3, 2))  # (1, 1) against (2, -3)
    np.testing.assert_allclose(found.translation, (0, 180 - angle, 0), atol=1e-12)
    np.testing.assert_allclose(pair_errors(predicted, true, signed=True).translation, (0, angle, 180), atol=1e-12)
    assert (found.rra(30), found.rra(15), found.rta(30)) == (1, 1 / 3, 2 / 3)
    # Pair 01 is below every threshold; 12 is off by 20 degrees, so below 21 to 30 of the 30; 02 below none.
    np.testing.assert_allclose(found.auc(30), (30 + 10) / 90)
    still = pair_errors(poses(np.zeros((2, 3))), true[:2])
    assert still.translation.tolist() == [90]


def test_pairs_do_not_depend_on_world_or_scale():
    predicted, true = walks(4, 8)
    moved = predicted.copy()
    turn = turned((1, 2, 3), 50)
    moved[:, :3, :3], moved[:, :3, 3] = turn @ moved[:, :3, :3], 7 * moved[:, :3, 3] @ turn.T - 2
    for a, b in zip(pair_errors(predicted, true), pair_errors(moved, true), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_depth_by_hand():
    found = depth_errors([[2.0, 2, 8, 1]], [[1.0, 2, 4, 0]], align="metric")  # ratios 2, 1, 2; the last does not count
    np.testing.assert_allclose(found.abs_rel, 2 / 3)
    np.testing.assert_allclose(found.sq_rel, (1 + 0 + 4) / 3)
    np.testing.assert_allclose(found.rmse, np.sqrt((1 + 0 + 16) / 3))
    np.testing.assert_allclose(found.log_rmse, np.log(2) * np.sqrt(2 / 3))
    np.testing.assert_allclose((found.delta, found.delta2, found.delta3), (1 / 3, 1 / 3, 1 / 3))
    found = depth_errors([1.2, 1.5, 1.9, 2.0], np.ones(4), align="metric")
    assert (found.delta, found.delta2, found.delta3) == (0.25, 0.5, 0.75)
    negative = depth_errors([-1.0], [1.0], align="metric")
    assert (negative.delta3, negative.log_rmse) == (0, pytest.approx(np.log(1e5)))


def test_depth_of_each_frame_alone():
    """Frames off by factors of their own: none is wrong alone, and the mean is weighted by valid pixels."""
    true = np.random.default_rng(0).uniform(1, 5, (3, 4, 5))
    predicted = true * np.array([0.5, 2, 7])[:, None, None]
    for align in ("median", "scale", "least_squares"):
        assert depth_errors(predicted, true, align=align, per_frame=True).abs_rel < 1e-12
        assert depth_errors(predicted, true, align=align).abs_rel > 0.1
    true[1], true[2, 0] = 0, 0
    found = depth_errors(predicted, true, align="metric", per_frame=True)
    np.testing.assert_allclose((found.abs_rel, found.pixels), ((20 * 0.5 + 15 * 6) / 35, 35))
    with pytest.raises(ValueError, match="align must be one of"):
        depth_errors(predicted, true, align="none at all", per_frame=True)


CUT3R = """
import json, sys, types, numpy as np
sys.modules.setdefault("cv2", types.ModuleType("cv2"))
sys.path.insert(0, sys.argv[1])
from eval.video_depth.tools import depth_evaluation
data, out = np.load(sys.argv[2]), {}
for name, how in (("scale", {"align_with_scale": True}), ("scale_and_shift", {"align_with_lad2": True}),
                  ("metric", {"metric_scale": True}), ("median", {})):
    got = depth_evaluation(data["predicted"].copy(), data["true"].copy(), max_depth=70, post_clip_max=70, **how)[0]
    out[name] = [got[n] for n in ("Abs Rel", "Sq Rel", "RMSE", "Log RMSE", "δ < 1.25", "δ < 1.25^2", "δ < 1.25^3",
                                  "valid_pixels")]
print(json.dumps(out))
"""


def outliers(times=3):
    """Depth off by a factor and noise, and 5 % outliers; some pixels are unknown, some too far."""
    rng = np.random.default_rng(5)
    true = rng.uniform(1, 60, (4, 40, 50))
    true.ravel()[rng.choice(true.size, 400, replace=False)] = 0
    true.ravel()[rng.choice(true.size, 400, replace=False)] = 90
    predicted = np.where(true > 0, true, 3) / 3.7 * rng.normal(1, 0.08, true.shape)
    predicted.ravel()[rng.choice(true.size, true.size // 20, replace=False)] *= times
    return predicted, true


def test_outliers_do_not_move_the_scale():
    predicted, true = outliers()
    found = depth_errors(predicted, true, align="scale", max_depth=70, clip_max=70)
    np.testing.assert_allclose(found.scale, 3.7, rtol=0.05)  # ten steps from a mean that outliers moved
    assert 0.9 < found.delta < 0.96
    assert depth_errors(predicted, true, align="least_squares", max_depth=70, clip_max=70).delta < 0.6


@pytest.mark.skipif("GATE4D_CUT3R" not in os.environ, reason="GATE4D_CUT3R: a checkout of CUT3R")
@pytest.mark.parametrize("times", [3, 40])  # of the larger ones the weight is more than that of all others
def test_depth_is_cut3rs(times, tmp_path):
    """With outliers, in float64; the script needs torch, tqdm and SciPy."""
    predicted, true = outliers(times)
    np.savez(tmp_path / "in.npz", predicted=predicted, true=true)
    command = [sys.executable, "-c", CUT3R, os.environ["GATE4D_CUT3R"], str(tmp_path / "in.npz")]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    for align, (*figures, pixels) in theirs.items():
        ours = depth_errors(predicted, true, align=align, max_depth=70, clip_max=70)
        mine = ours.abs_rel, ours.sq_rel, ours.rmse, ours.log_rmse, ours.delta, ours.delta2, ours.delta3
        assert ours.pixels == pixels
        # Shares are float32 means there; Adam's 1000 steps add up rounding.
        np.testing.assert_allclose(mine[:4], figures[:4], rtol=1e-6 if align == "scale_and_shift" else 1e-10)
        np.testing.assert_allclose(mine[4:], figures[4:], atol=1e-6)


def test_outlines_by_hand():
    """A square of 4 against itself moved by columns: within one pixel of the disk everything meets."""
    masks = np.zeros((3, 30, 30), bool)
    masks[0, 10:14, 10:14], masks[1, 10:14, 11:15], masks[2, 10:14, 24:28] = 1, 1, 1
    assert frame_boundaries(masks[:2], masks[[0, 0]], tolerance=1).tolist() == [1, 1]
    assert frame_boundaries(masks[:1], masks[2:]).tolist() == [0]
    empty = np.zeros_like(masks[:1])
    assert frame_boundaries(empty, empty).tolist() == [1]
    assert frame_boundaries(empty, masks[:1]).tolist() == frame_boundaries(masks[:1], empty).tolist() == [0]
    # A wall through the image has an outline of one column; of a second wall far away half of the pixels are wrong.
    wall, two = np.zeros((1, 20, 40), bool), np.zeros((1, 20, 40), bool)
    wall[..., :10], two[..., :10], two[..., 30:] = 1, 1, 1
    np.testing.assert_allclose(frame_boundaries(two, wall), 2 / 3)  # precision 1/2, recall 1


def test_video_scores_have_both_averages():
    """One clip of 4 right frames, one of 2 of which one is empty: by clip 3/4, by frame 5/6; ends left out as DAVIS."""
    right = np.zeros((4, 20, 20), bool)
    right[:, 5:15, 5:15] = 1
    half = right[:2].copy()
    half[1] = 0
    found = video_scores([right, half], [right, right[:2]])
    assert found[:4] == (0.75, 0.75, 0.75, 0.75)
    np.testing.assert_allclose(found[4:], 5 / 6)
    middle = right.copy()
    middle[[0, -1]] = 0
    assert video_scores([middle], [right], ends=False).jm == 1
    assert video_scores([middle], [right]).jm == 0.5
    with pytest.raises(ValueError, match="a frame that counts"):
        video_scores([half], [right[:2]], ends=False)


DAVIS = """
import json, sys, types, numpy as np
from skimage.morphology import dilation
cv2 = types.ModuleType("cv2")
cv2.dilate = dilation  # of a symmetric disk: the same
sys.modules["cv2"] = cv2
sys.path.insert(0, sys.argv[1])
from davis2017.metrics import db_eval_boundary, db_eval_iou
data = np.load(sys.argv[2])
print(json.dumps([f(data["true"], data["predicted"]).tolist() for f in (db_eval_iou, db_eval_boundary)]))
"""


@pytest.mark.skipif("GATE4D_DAVIS" not in os.environ, reason="GATE4D_DAVIS: a checkout of davis2017-evaluation")
def test_masks_are_davis(tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :214]
    draws = rng.uniform(20, 900, (2, 12, 4)) / (9, 1, 5, 1)
    true, predicted = (np.stack([(y - a) ** 2 / b + (x - c) ** 2 / d < 1 for a, b, c, d in rows]) for rows in draws)
    predicted[:4] = np.roll(true[:4], 3, 2) ^ (rng.random((4, 120, 214)) < 0.01)
    true[4], predicted[4:6] = False, False
    np.savez(tmp_path / "in.npz", predicted=predicted, true=true)
    command = [sys.executable, "-c", DAVIS, os.environ["GATE4D_DAVIS"], str(tmp_path / "in.npz")]
    j, f = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    np.testing.assert_allclose(frame_ious(predicted, true), j, rtol=1e-14)
    np.testing.assert_allclose(frame_boundaries(predicted, true), f, rtol=1e-14)


def test_points_by_hand():
    """On a line: predicted 0, 1, 5 and true 0, 2."""
    line = [[0.0, 0, 0], [1, 0, 0], [5, 0, 0]], [[0.0, 0, 0], [2, 0, 0]]
    found = point_errors(*line)
    np.testing.assert_allclose(found[:5], (4 / 3, 1, 0.5, 0.5, (4 / 3 + 0.5) / 2))
    assert np.isnan(found.normal_consistency)
    up, side = (0.0, 0, -2), (0.0, 3, 0)  # neither sign nor length matters
    found = point_errors(*line, predicted_normals=[up, side, up], true_normals=[(0, 0, 1), (0, 0, 1)])
    assert found.normals_accuracy == pytest.approx(2 / 3)  # the second one is closest to the first or second point
    assert found.normals_accuracy_median == 1
    assert found.normals_completeness == pytest.approx(0.5)  # the point at 2 meets the one at 1
    assert found.normal_consistency == pytest.approx(7 / 12)
    with pytest.raises(ValueError, match="both or not at all"):
        point_errors(*line, true_normals=line[1])
    with pytest.raises(ValueError, match=r"predicted must be \[N, 3\]"):
        point_errors(np.zeros((0, 3)), line[1])


def test_icp_undoes_a_small_motion_and_leaves_outliers_out():
    rng = np.random.default_rng(1)
    target = rng.uniform(-1, 1, (800, 3))
    turn, shift = turned((1, -2, 1), 1.5), np.array((0.01, -0.02, 0.01))
    source = (target - shift) @ turn  # so that turn and shift bring it back
    far = np.concatenate((source, rng.uniform(50, 60, (40, 3))))
    found = icp(far, target)
    np.testing.assert_allclose(found.rotation, turn, atol=1e-9)
    np.testing.assert_allclose(found.translation, shift, atol=1e-9)
    assert found.scale == 1
    assert point_errors(found.points(source), target).chamfer < 1e-9
    with pytest.raises(ValueError, match=r"points nearer than 0\.1"):
        icp(far + 1000, target)


def test_normals_of_a_plane():
    rng = np.random.default_rng(2)
    turn = turned((3, 1, 2), 40)
    flat = np.column_stack((rng.uniform(-1, 1, (200, 2)), np.zeros(200))) @ turn.T
    np.testing.assert_allclose(np.abs(normals(flat) @ turn[:, 2]), 1, atol=1e-9)
