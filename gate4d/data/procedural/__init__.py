"""Endless rendered clips with their true motion, depth and cameras.

Scenes are drawn in :mod:`.scene` and rendered in :mod:`.render`. A clip depends on its seed alone: on CPUs the same
seed gives the same bits, whatever the number of threads. On a GPU the pixels may differ in the last bits; that path
has not been run on one.

**Motion.** A pixel is marked as moving if the nearest surface in it belongs to a solid that translates, turns or
deforms at any time: also in a frame in which it stands still for a moment, and also if the pixel's own part of it does
not. Shadows and lights do not count, nor does the camera.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count as counting

import numpy as np
import torch

from ..clip import Batch, Clip
from .render import describe, join, render
from .scene import RATE, Scene, random_scene

__all__ = ["batches", "evaluation_clips", "render_clip", "render_scenes"]

_TRAINING, _EVALUATION, _SINGLE = range(3)  # first words of the seeds, so that no two purposes share a scene
_BRISK = (0.25, 1.0)  # pace of the cameras that are to be looked at


def batches(
    batch: int,
    frames: int,
    height: int,
    width: int,
    *,
    seed: int = 0,
    start: int = 0,
    device: torch.device | str = "cpu",
    dynamic: float = 0.8,
    frame_rate: float = RATE,
    blur: int = 1,
    pace: tuple[float, float] = (0.02, 1.0),
) -> Iterator[Batch]:
    """Batches without end; the one with number ``n`` depends on ``seed`` and ``n`` alone.

    Args:
        batch, frames, height, width: sizes of a batch.
        start: number of the first batch: training resumes with it.
        device: where the pixels are computed.
        dynamic: share of clips with moving solids.
        frame_rate: frames a second; at 8, most moving solids go 0.3 to 3 pixels a frame in an image 80 wide.
        blur: odd number of moments averaged over the time that the shutter is open; 1 is a sharp image. Depth, motion
            and poses are those of the middle one.
        pace: between which the cameras' speeds lie (in the logarithm), see :func:`.scene.random_scene`; one in seven
            stands still whatever it is.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(batch=batch, frames=frames, height=height, width=width)
    if not 0 <= dynamic <= 1:
        raise ValueError(f"dynamic must be a share in [0, 1], got {dynamic!r}.")
    for name, value in (("seed", seed), ("start", start)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an int >= 0, got {value!r}.")
    if not 0 < pace[0] <= pace[1]:
        raise ValueError(f"pace must be two speeds, 0 < slowest <= fastest, got {pace!r}.")
    _check_time(frame_rate, blur)

    def endless() -> Iterator[Batch]:
        for n in counting(start):
            scenes, shutters = [], []
            for clip in range(batch):
                rng = np.random.default_rng([_TRAINING, seed, n, clip])
                moves = rng.random() < dynamic
                shutters.append(rng.uniform(0.1, 0.7))
                scenes.append(random_scene(rng, dynamic=bool(moves), pace=pace))
            yield render_scenes(
                scenes, frames, height, width, frame_rate=frame_rate, blur=blur, shutters=shutters, device=device
            )

    return endless()


def evaluation_clips(frames: int, height: int, width: int, count: int = 16) -> Iterator[Batch]:
    """A fixed set of ``count`` batches of one clip that training never sees; every fifth one is static.

    Cameras that move do so at the faster paces of training: of a trajectory that hardly leaves its first point, an
    error after alignment says little. A longer clip begins with the shorter one, and a larger set with the smaller one.

    Raises:
        ValueError: a size is not a positive int.
    """
    _check(frames=frames, height=height, width=width, count=count)
    draws = (np.random.default_rng([_EVALUATION, i]) for i in range(count))
    scenes = (random_scene(rng, dynamic=i % 5 != 4, pace=_BRISK) for i, rng in enumerate(draws))
    return (render_scenes([scene], frames, height, width) for scene in scenes)


def render_clip(
    frames: int = 12, height: int = 252, width: int = 322, *, seed: int = 0, frame_rate: float = RATE
) -> Clip:
    """Render a clip of a random scene with moving solids and a fixed field of view.

    Args:
        frames: number of frames ``T``.
        height, width: size in pixels.
        seed: chooses the scene and the camera; the same seed gives the same bits.
        frame_rate: frames a second.

    Returns:
        A clip with ``motion``, ``depth``, ``poses``, ``intrinsics`` and ``times`` filled in.

    Raises:
        ValueError: a size, the seed or the frame rate is out of its range.
    """
    _check(frames=frames, height=height, width=width)
    _check_time(frame_rate, 1)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an int >= 0, got {seed!r}.")
    scene = random_scene(np.random.default_rng([_SINGLE, seed]), zoom=False, pace=_BRISK)
    parts, poses, intrinsics = describe(scene, np.arange(frames) / frame_rate, height, width)
    color, depth, motion = render(parts, height, width)
    rgb = (255 * color.clamp(0, 1).sqrt()).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    name = f"rendered scene, seed {seed}"
    times = torch.arange(frames, dtype=torch.float64) / frame_rate
    return Clip(rgb, name, motion, depth, torch.from_numpy(poses), torch.from_numpy(intrinsics[0]), times)


def render_scenes(
    scenes: Iterable[Scene],
    frames: int,
    height: int,
    width: int,
    *,
    frame_rate: float = RATE,
    blur: int = 1,
    shutters: Iterable[float] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """One clip of every scene. ``shutters``: share of the frame time that each one's shutter is open (default 0.5)."""
    scenes = list(scenes)
    shutters = [0.5] * len(scenes) if shutters is None else list(shutters)
    middle = blur // 2
    moments = (np.arange(blur) - middle) / blur
    parts, poses, intrinsics = [], [], []
    for scene, shutter in zip(scenes, shutters, strict=True):
        time = (np.arange(frames)[:, None] + shutter * moments) / frame_rate
        part, pose, k = describe(scene, time.reshape(-1), height, width)
        parts.append(part)
        poses.append(pose[middle::blur])
        intrinsics.append(k[middle::blur])
    if torch.device(device).type == "cpu":  # clip by clip: only the solids that are in it
        rendered = [torch.stack(x) for x in zip(*(_frames(p, blur, height, width, device) for p in parts), strict=True)]
    else:
        rendered = [x.unflatten(0, (len(scenes), frames)) for x in _frames(join(parts), blur, height, width, device)]
    images, depth, motion = rendered
    cameras = (torch.from_numpy(np.stack(x).astype(np.float32)).to(device) for x in (poses, intrinsics))
    return Batch(images, motion, depth, *cameras)


def _frames(part, blur: int, height: int, width: int, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    color, depth, motion = render(part, height, width, device)
    middle = blur // 2
    if blur > 1:
        color, *others = (color.clamp(0, 1)[i::blur] for i in range(blur))
        for other in others:
            color = color + other
        color = color / blur
    return color.clamp(0, 1).sqrt(), depth[middle::blur], motion[middle::blur]


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")


def _check_time(frame_rate: float, blur: int) -> None:
    if not frame_rate > 0:
        raise ValueError(f"frame_rate must be positive (frames a second), got {frame_rate!r}.")
    if not isinstance(blur, int) or blur < 1 or blur % 2 == 0:
        raise ValueError(f"blur must be an odd int >= 1 (moments a frame), got {blur!r}.")
