"""Rendered clips: reproducible, geometrically consistent, their motion masks true."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gate4d.data.procedural import batches, evaluation_clips, render_clip, render_scenes
from gate4d.data.procedural.render import describe, join, render
from gate4d.data.procedural.scene import BALLS, ROUND, SOLIDS, Camera, Solids, Waves, random_scene

NOW = np.zeros(1)


def some(seed, **kwargs):
    return random_scene(np.random.default_rng(seed), **kwargs)


def still(values) -> Waves:
    values = np.asarray(values, float)
    nothing = np.zeros((1, *values.shape))
    return Waves(values, nothing, nothing, nothing)


def digest(batch) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in batch)).hexdigest()


def a_batch(**kwargs):
    return next(batches(2, 3, 40, 52, seed=5, **kwargs))


def test_shapes_and_types():
    batch = a_batch()
    assert [(tuple(x.shape), x.dtype) for x in batch] == [
        ((2, 3, 3, 40, 52), torch.float32), ((2, 3, 40, 52), torch.bool), ((2, 3, 40, 52), torch.float32),
        ((2, 3, 4, 4), torch.float32), ((2, 3, 3, 3), torch.float32),
    ]  # fmt: skip
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert torch.isfinite(batch.depth).all()
    assert (batch.depth > 0).all()
    clip = render_clip(3, 28, 42)
    assert clip.frames.shape == (3, 28, 42, 3)
    assert clip.frames.dtype == torch.uint8
    assert clip.masks.shape == clip.depth.shape == (3, 28, 42)
    assert clip.poses.shape == (3, 4, 4)
    assert clip.intrinsics.shape == (3, 3)


def test_same_seed_same_bits_in_another_process_and_thread_count():
    sizes = (2, 8, 63, 101)  # above the size at which torch shares an operation among threads, with an odd tail
    here = digest(next(batches(*sizes, seed=5, blur=3)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert digest(next(batches(*sizes, seed=5, blur=3))) == here
    finally:
        torch.set_num_threads(before)
    assert digest(next(batches(*sizes, seed=6, blur=3))) != here
    code = f"from test_procedural import *; print(digest(next(batches(*{sizes}, seed=5, blur=3))))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_start_resumes_and_clips_differ():
    whole = [digest(b) for b in islice(batches(2, 2, 16, 20, seed=3), 4)]
    assert len(set(whole)) == 4
    assert [digest(b) for b in islice(batches(2, 2, 16, 20, seed=3, start=2), 2)] == whole[2:]
    first, second = (digest([x[i] for x in next(batches(2, 2, 16, 20))]) for i in range(2))
    assert first != second


def test_a_longer_clip_starts_with_the_shorter_one():
    assert torch.equal(render_clip(2, 28, 28).frames, render_clip(4, 28, 28).frames[:2])
    short, long = (list(evaluation_clips(n, 16, 20, count=c)) for n, c in ((2, 2), (3, 3)))
    for s, longer in zip(short, long[:2], strict=True):
        assert all(torch.equal(a, b[:, :2]) for a, b in zip(s, longer, strict=True))


def test_static_clips_have_no_motion_and_dynamic_ones_do():
    static = next(batches(6, 2, 32, 40, dynamic=0.0))
    assert not static.masks.any()
    dynamic = next(batches(12, 8, 32, 40, dynamic=1.0))
    share = dynamic.masks.flatten(1).float().mean(1)
    assert (share > 0).all()
    assert 0.03 < share.median() < 0.35
    assert [bool(b.masks.any()) for b in evaluation_clips(2, 32, 40, count=5)] == [True] * 4 + [False]


def known_scene():
    """A room with a ball of radius 0.4 and a box of half extents 0.2, 0.3, 0.25, both at z = 1, camera at z = -1."""
    present, half, center = np.zeros(SOLIDS, bool), np.ones((SOLIDS, 3)), np.zeros((SOLIDS, 3))
    ball, box = 1, ROUND + 1
    present[[ball, box]] = True
    half[ball], half[box] = 0.4, (0.2, 0.3, 0.25)
    center[ball], center[box] = (0, 0, 1), (0.7, 0, 1)
    zero = np.zeros(SOLIDS)
    solids = Solids(present, half, still(center), still(np.zeros((SOLIDS, 3))), zero, zero, zero)
    camera = Camera(still((0, 0, -1)), still((0, 0, 0)), still(0.8))
    return replace(some(0), half=np.array([2, 1.5, 3]), solids=solids, camera=camera), ball, box


def test_depth_of_a_known_scene():
    scene, _, _ = known_scene()
    frames, _, intrinsics = describe(scene, NOW, 21, 31)
    _, depth, moving = render(frames, 21, 31)
    assert not moving.any()
    torch.testing.assert_close(depth[0, 10, 15].item(), 2 - 0.4)  # the ball's nearest point
    column = int(intrinsics[0, 0, 0] * 0.7 / 1.75 + intrinsics[0, 0, 2])
    torch.testing.assert_close(depth[0, 10, column].item(), 2 - 0.25)  # the box's front face
    empty = replace(scene, solids=replace(scene.solids, present=np.zeros(SOLIDS, bool)))
    _, depth, _ = render(describe(empty, NOW, 21, 31)[0], 21, 31)
    torch.testing.assert_close(depth[0, 10], torch.full((31,), 4.0))  # the back wall, 3 m behind the origin


@pytest.mark.parametrize("way", ["turn", "squash"])
def test_solids_turn_and_deform(way):
    """The box turned by a quarter shows its other side; the ball squashed to half its size is half as near."""
    scene, ball, box = known_scene()
    solids = scene.solids
    time = np.array([0.0, 0.5])
    if way == "turn":
        solids = replace(solids, spin=np.where(np.arange(SOLIDS) == box, np.pi, 0.0))
        column, expected = int(21 * 2**0.5), (2 - 0.25, 2 - 0.2)
    else:
        amplitude = np.zeros((1, SOLIDS, 3))
        amplitude[:, ball] = -np.log(2)
        solids = replace(
            solids, squash=Waves(np.zeros((SOLIDS, 3)), amplitude, np.full((1, SOLIDS, 3), 0.5), 0 * amplitude)
        )
        column, expected = 15, (2 - 0.4, 2 - 0.2)
    _, depth, moving = render(describe(replace(scene, solids=solids), time, 21, 31)[0], 21, 31)
    torch.testing.assert_close(depth[:, 10, column], torch.tensor(expected))
    assert moving[:, 10, column].all()  # also where it has not moved yet
    assert not moving[:, 10, 41 - column].any()


@pytest.mark.parametrize("seed", range(4))
def test_mask_marks_exactly_what_moves(seed):
    scene, time = some(seed), np.array([0.5])
    _, depth, moving = render(describe(scene, time, 42, 56)[0], 42, 56)
    resting = replace(scene.solids, present=scene.solids.present & ~scene.solids.moving)
    _, background, nothing = render(describe(replace(scene, solids=resting), time, 42, 56)[0], 42, 56)
    assert not nothing.any()
    assert torch.equal(moving, depth < background)
    assert moving.any()


def test_moving_and_resting_solids_come_from_the_same_distributions():
    moving, resting = [], []
    for seed in range(150):
        solids = some(seed).solids
        own = np.r_[0:BALLS, ROUND:SOLIDS]
        for group, chosen in ((moving, solids.moving), (resting, solids.present & ~solids.moving)):
            group += [(s >= ROUND, *np.log(solids.half[s])) for s in own[chosen[own]]]
    a, b = np.array(moving, float), np.array(resting, float)
    assert min(len(a), len(b)) > 150
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()


def test_static_points_reproject_onto_each_other():
    scenes = [some(seed, zoom=True) for seed in range(6)]
    height, width = 84, 112
    batch = render_scenes(scenes, 7, height, width)
    assert (batch.intrinsics[:, 0, 0, 0] != batch.intrinsics[:, 6, 0, 0]).any()
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((columns + 0.5, rows + 0.5, torch.ones_like(rows)), -1).double()
    errors, static, moved = [], [], []
    for motion, depth, poses, k in zip(*(x.double() for x in batch[1:]), strict=True):
        rays = pixels @ torch.linalg.inv(k[0]).T
        points = (rays * depth[0][..., None]) @ poses[0, :3, :3].T + poses[0, :3, 3]
        local = (points - poses[6, :3, 3]) @ poses[6, :3, :3]
        projected = local @ k[6].T
        column, row = (projected[..., :2] / projected[..., 2:]).floor().long().unbind(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (local[..., 2] > 0)
        assert inside.double().mean() > 0.4
        seen = depth[6][row[inside], column[inside]]
        errors.append((seen - local[..., 2][inside]).abs() / seen)
        moved.append(motion[0][inside] > 0)
        static.append(~moved[-1] & (motion[6][row[inside], column[inside]] == 0))
    error, static, moved = torch.cat(errors), torch.cat(static), torch.cat(moved)
    assert error[static].median() < 0.005  # what is left is the rounding to whole pixels
    assert (error[static] < 0.05).double().mean() > 0.93  # the rest is hidden behind a resting solid
    assert (error[moved] > 0.02).double().mean() > 0.4


def test_scenes_rendered_together_are_those_rendered_alone():
    """The way of a GPU: all clips at once, also where a solid is in some of them only."""
    parts = [describe(some(seed), np.arange(3) / 8, 20, 24)[0] for seed in range(5)]
    assert len({tuple(p.present) for p in parts}) > 1
    together = render(join(parts), 20, 24)
    for i, alone in enumerate(zip(*(render(p, 20, 24) for p in parts), strict=True)):
        assert torch.equal(together[i], torch.cat(alone))


def test_blur_averages_the_colours_only():
    sharp, blurred = a_batch(), a_batch(blur=5)
    assert all(torch.equal(a, b) for a, b in zip(sharp[1:], blurred[1:], strict=True))
    assert not torch.equal(sharp.images, blurred.images)
    assert (sharp.images - blurred.images).abs().mean() < 0.05


def test_cameras_are_rigid_and_smooth_and_some_stand_still():
    poses = next(batches(32, 8, 4, 4)).poses.double()
    rotation = poses[..., :3, :3]
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(32, 8, dtype=torch.float64))
    step = poses[..., :3, 3].diff(dim=1).norm(dim=-1).mean(1)
    assert 1 <= (step == 0).sum() <= 12
    assert step.max() < 0.25
    assert step.max() > 10 * step[step > 0].min()  # from nearly still to fast
    fast = next(batches(32, 8, 4, 4, pace=(1.0, 1.0))).poses[..., :3, 3].diff(dim=1).norm(dim=-1).mean(1)
    assert fast[fast > 0].min() > step.median()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"frames": 0}, "frames"), ({"height": -3}, "height"), ({"width": 2.5}, "width"), ({"frame_rate": 0}, "rate"),
     ({"seed": -1}, "seed")],
)  # fmt: skip
def test_bad_input(arguments, name):
    with pytest.raises(ValueError, match=name):
        render_clip(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"start": -1}, "start"),
        ({"dynamic": 1.5}, "dynamic"),
        ({"blur": 2}, "blur"),
        ({"pace": (0, 1)}, "pace"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_bad_batches_are_refused_at_once(arguments, name):
    with pytest.raises(ValueError, match=name):
        batches(1, 2, 8, 8, **arguments)
