"""Metrics against cases worked out by hand and against a search."""

import numpy as np
import pytest
import torch

from gate4d.evaluation import (
    camera_errors,
    depth_errors,
    frame_ious,
    mask_counts,
    mask_iou,
    mask_scores,
    mean_depth_errors,
    relative_pose_errors,
    similarity,
)


def rotation(axis, degrees):
    """Rodrigues' formula."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    k, a = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.radians(degrees)
    return np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k


def pose(r, t):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = r, t
    return out


def path(frames=9, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([pose(rotation(rng.normal(size=3), rng.uniform(0, 90)), rng.normal(size=3)) for _ in range(frames)])


def test_similarity_finds_a_known_one():
    points, turn = np.random.default_rng(1).normal(size=(6, 3)), rotation((1, 2, -1), 130)
    found = similarity(points, 2.5 * points @ turn.T + (3, -1, 7))
    np.testing.assert_allclose(found.scale, 2.5)
    np.testing.assert_allclose(found.rotation, turn, atol=1e-12)
    np.testing.assert_allclose(found.translation, (3, -1, 7), atol=1e-12)


def test_similarity_of_noisy_points_is_the_best_of_its_neighbours():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 8, 3))
    found = similarity(a, b)

    def cost(s, r, t):
        return ((s * a @ r.T + t - b) ** 2).sum()

    best = cost(*found)
    for _ in range(200):
        s, t = found.scale + 1e-3 * rng.normal(), found.translation + 1e-3 * rng.normal(size=3)
        assert best <= cost(s, rotation(rng.normal(size=3), 0.1 * rng.normal()) @ found.rotation, t)
    np.testing.assert_allclose(similarity(a, b, with_scale=False).scale, 1)


def test_similarity_does_not_mirror():
    points = np.random.default_rng(3).normal(size=(7, 3))
    found = similarity(points, points * (1, 1, -1))
    np.testing.assert_allclose(np.linalg.det(found.rotation), 1)
    assert np.abs(found.points(points) - points * (1, 1, -1)).max() > 0.1


@pytest.mark.parametrize("points", [np.outer(np.arange(4.0), (1, 2, 2)), np.ones((4, 3)), np.ones((1, 3))])
def test_similarity_of_points_that_do_not_determine_it(points):
    found = similarity(points, points @ rotation((0, 0, 1), 90).T + 5)
    np.testing.assert_allclose(np.linalg.det(found.rotation), 1)
    np.testing.assert_allclose(found.points(points), points @ rotation((0, 0, 1), 90).T + 5, atol=1e-12)


def test_a_trajectory_that_differs_by_a_similarity_has_no_error():
    true, turn = path(), rotation((0, 1, 1), 77)
    predicted = true.copy()
    predicted[:, :3, :3] = turn @ true[:, :3, :3]
    predicted[:, :3, 3] = 0.1 * true[:, :3, 3] @ turn.T + (1, 2, 3)
    np.testing.assert_allclose(camera_errors(torch.from_numpy(predicted), true), 0, atol=1e-6)


def test_ate_by_hand():
    """Corners of a square against the same with one diagonal lengthened: the best similarity only scales."""
    true = np.stack([pose(np.eye(3), p) for p in ((1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -1, 0))])
    predicted = true.copy()
    predicted[[1, 3], :3, 3] *= 3
    scale = (1 + 3) / (1 + 9)  # <predicted, true> / |predicted|^2
    expected = np.sqrt(((scale - 1) ** 2 + (3 * scale - 1) ** 2) / 2)
    np.testing.assert_allclose(camera_errors(predicted, true).ate, expected)


def test_relative_pose_errors_by_hand():
    true = np.stack([pose(np.eye(3), (t, 0, 0)) for t in range(4)])
    predicted = true.copy()
    predicted[2:] = predicted[2:] @ pose(rotation((0, 0, 1), 30), (0, 0.5, 0))  # one wrong step, from 1 to 2
    translation, angle = relative_pose_errors(predicted, true)
    np.testing.assert_allclose(translation[:2], (0, 0.5), atol=1e-12)
    np.testing.assert_allclose(angle, (0, 30, 0), atol=1e-9)
    np.testing.assert_allclose(translation[2], 2 * np.sin(np.radians(15)))  # the step ahead, seen turned by 30 degrees
    assert relative_pose_errors(predicted, true, step=3)[1] == pytest.approx([30])
    tiny = np.stack([np.eye(4), pose(rotation((1, 1, 0), 1e-5), (0, 0, 0))])
    np.testing.assert_allclose(relative_pose_errors(tiny, np.stack([np.eye(4)] * 2))[1], 1e-5, rtol=1e-9)
    np.testing.assert_allclose(relative_pose_errors(np.stack([np.eye(4), pose(rotation((1, 0, 0), 180), (0, 0, 0))]),
                                                    np.stack([np.eye(4)] * 2))[1], 180)  # fmt: skip


def test_rpe_does_not_depend_on_the_world_but_its_scale_is_aligned():
    true = path()
    predicted = path(seed=0)
    predicted[:, :3, 3] *= 7
    predicted = pose(rotation((1, 0, 1), 50), (1, 1, 1)) @ predicted
    errors = camera_errors(predicted, true)
    np.testing.assert_allclose(errors, 0, atol=1e-6)


def test_depth_by_hand():
    true = np.array([[1.0, 2.0, 4.0, 0.0, np.inf]])
    predicted = np.array([[2.0, 4.0, 12.0, 5.0, np.nan]])
    errors = depth_errors(predicted, true)
    assert errors.scale == 0.5
    np.testing.assert_allclose(errors.abs_rel, (0 + 0 + 0.5) / 3)
    np.testing.assert_allclose(errors.delta, 2 / 3)
    np.testing.assert_allclose(depth_errors(predicted, true, align="none").abs_rel, (1 + 1 + 2) / 3)
    np.testing.assert_allclose(depth_errors(predicted, true, align="metric").abs_rel, (1 + 1 + 2) / 3)
    least = depth_errors(predicted, true, align="least_squares")
    np.testing.assert_allclose(least.scale, (2 + 8 + 48) / (4 + 16 + 144))
    assert least.pixels == 3
    assert depth_errors(predicted, true, valid=true < 3).abs_rel == 0
    assert depth_errors([1.25, 0.8, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], align="none").delta == 0.25


def noisy_depth(seed=0):
    """A prediction in another unit, a twentieth of whose pixels are far off."""
    rng = np.random.default_rng(seed)
    true = rng.lognormal(1.5, 1.2, (2, 30, 40))
    predicted = 0.37 * true * rng.lognormal(0, 0.05, true.shape)
    return np.where(rng.random(true.shape) < 0.05, 9 * predicted, predicted), true


def test_scaling_by_reweighted_steps_minimises_the_absolute_error():
    """Ten steps come close to the factor of least absolute error, which outliers move less than that of the squares."""
    predicted, true = noisy_depth()
    scales = np.linspace(2, 3.5, 3001)
    cost = [np.abs(s * predicted - true).sum() for s in scales]
    best = scales[np.argmin(cost)]
    found = depth_errors(predicted, true, align="scale")
    squares = depth_errors(predicted, true, align="least_squares")
    assert abs(found.scale - best) < 0.05 * abs(squares.scale - best)
    one = depth_errors([1.0, 3.0], [1.0, 5.0], align="scale")
    s = 6 / 4
    for _ in range(10):
        w = 1 / (np.abs(s * np.array([1.0, 3.0]) - [1.0, 5.0]) + 1e-8)
        s = (w[0] * 1 + w[1] * 15) / (w[0] + 9 * w[1])
    np.testing.assert_allclose(one.scale, s)
    assert depth_errors([-1.0, -1.0], [1.0, 2.0], align="scale").scale == 1e-3


def test_scale_and_shift_takes_the_steps_of_torchs_adam():
    predicted, true = (x.ravel()[:200] for x in noisy_depth(1))
    x = torch.tensor([np.partition(true, 99)[99] / np.partition(predicted, 99)[99], 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=1e-4)
    p, t = torch.from_numpy(predicted), torch.from_numpy(true)
    for _ in range(1000):
        optimizer.zero_grad()
        (x[0].double() * p + x[1].double() - t).abs().sum().backward()
        optimizer.step()
    found = depth_errors(predicted, true, align="scale_and_shift")
    np.testing.assert_allclose((found.scale, found.shift), x.detach().numpy(), atol=2e-4)
    assert abs(found.shift) > 0.01


def test_depth_limits_and_clips():
    """The limit takes out pixels before the alignment, the clip holds predictions after it."""
    true = np.array([1.0, 2.0, 4.0, 69.0, 70.0, 500.0])
    predicted = np.array([1.0, 2.0, 4.0, 300.0, 1.0, 1.0])
    errors = depth_errors(predicted, true, align="metric", max_depth=70, clip_max=70)
    assert errors.pixels == 4
    np.testing.assert_allclose(errors.abs_rel, (70 - 69) / 69 / 4)
    assert depth_errors(predicted, true, align="metric", max_depth=70).delta == 0.75
    doubled = depth_errors(2 * predicted[:3], true[:3], clip_max=3.0)  # the true median is 2, the predicted one 4
    assert doubled.scale == 0.5
    np.testing.assert_allclose(doubled.abs_rel, (4 - 3) / 4 / 3)


def test_clips_count_by_their_pixels():
    one = depth_errors([1.0, 1.5], [1.0, 1.0], align="none")
    many = depth_errors(np.full(6, 1.1), np.ones(6), align="none")
    mean = mean_depth_errors([one, many])
    np.testing.assert_allclose(mean[:2], ((2 * 0.25 + 6 * 0.1) / 8, (2 * 0.5 + 6) / 8))
    assert mean.pixels == 8
    assert np.isnan(mean.scale)
    assert mean_depth_errors([one]) == one


def test_the_means_of_masks_differ_as_they_should():
    """Two clips: one of a frame that is right, one of three, of which one is right, one half, one empty in both."""
    full, half, none = np.ones((2, 2), bool), np.array([[1, 1], [0, 0]], bool), np.zeros((2, 2), bool)
    predicted = [full[None], np.stack((full, half, none))]
    true = [full[None], np.stack((full, full, none))]
    np.testing.assert_array_equal(frame_ious(predicted[1], true[1]), (1, 0.5, 1))
    scores = mask_scores(predicted, true)
    np.testing.assert_allclose(scores, (10 / 12, (1 + 1 + 0.5 + 1) / 4, (1 + 2.5 / 3) / 2, (1 + 2 / 3) / 2))
    counted = mask_scores(predicted, true, empty=0.0)  # VGGT4D's code
    np.testing.assert_allclose(counted, (10 / 12, 2.5 / 4, (1 + 0.5) / 2, (1 + 1 / 3) / 2))
    left_out = mask_scores(predicted, true, empty=np.nan)
    np.testing.assert_allclose(left_out[1:3], (2.5 / 3, (1 + 0.75) / 2))


def test_masks_by_hand():
    a, b = np.array([1, 1, 0, 0, 1], bool), torch.tensor([1, 0, 1, 0, 1], dtype=torch.bool)
    assert mask_counts(a, b) == (2, 4)
    assert mask_iou(a, b) == 0.5
    assert mask_iou(a, ~a) == 0
    assert mask_iou(np.zeros(3, bool), np.zeros(3, bool)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: similarity(np.ones((3, 2)), np.ones((3, 2))), ValueError, "source and target"),
        (lambda: similarity(np.full((3, 3), np.nan), np.ones((3, 3))), ValueError, "source must be finite"),
        (lambda: camera_errors(path(3), path(4)), ValueError, "predicted and true"),
        (lambda: camera_errors(path(1), path(1)), ValueError, "T > 1"),
        (lambda: camera_errors(path(3) * np.nan, path(3)), ValueError, "predicted must hold finite poses, frame 0"),
        (lambda: camera_errors(path(3), path(3), step=0), ValueError, "step"),
        (lambda: depth_errors(np.ones(3), np.ones(2)), ValueError, "alike"),
        (lambda: depth_errors(np.ones(3), np.zeros(3)), ValueError, "valid pixel"),
        (lambda: depth_errors(np.full(3, np.nan), np.ones(3)), ValueError, "predicted must be finite"),
        (lambda: depth_errors(np.ones(3), np.ones(3), align="mean"), ValueError, "align"),
        (lambda: depth_errors(np.ones(3), np.ones(3), max_depth=0), ValueError, "max_depth must be"),
        (lambda: depth_errors(np.ones(3), np.ones(3), clip_max=-1), ValueError, "clip_max must be"),
        (lambda: depth_errors(np.zeros(3), np.ones(3)), ValueError, "can't be aligned"),
        (lambda: depth_errors(np.ones(3), 9 * np.ones(3), max_depth=5), ValueError, "valid pixel"),
        (lambda: mean_depth_errors([]), ValueError, "valid pixels"),
        (lambda: mask_scores([], []), ValueError, "at least 1"),
        (lambda: frame_ious(np.ones(3, bool), np.ones(3, bool)), ValueError, r"\[T, H, W\]"),
        (lambda: mask_iou(np.ones(3), np.ones(3, bool)), TypeError, "predicted must be a bool mask"),
        (lambda: mask_iou(np.ones(2, bool), np.ones(3, bool)), ValueError, "alike"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
