"""The choice of a scene, and where everything in it is at a given time.

A scene is a closed room, or a plain with hills under a far sky, with solids in it: ellipsoids and boxes, each the unit
sphere or the unit cube under an affine map that changes with time. Moving and resting solids are drawn from the same
distributions of shape, size, place and texture, so that only their motion tells them apart.

Axes are those of OpenCV: x right, y down, z forward, in metres and seconds; pixel centres lie at integer + 1/2.
Everything here is a handful of numbers per frame, so it is numpy in float64; the pixels are in :mod:`.render`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BALLS, HILLS, BOXES, WALLS = 4, 3, 4, 6
ROUND = BALLS + HILLS  # the slots before this one hold ellipsoids, those from it on boxes
SOLIDS = ROUND + BOXES
SURFACES = SOLIDS + WALLS  # walls: -x, +x, ceiling or sky, floor, -z, +z
RATE = 8.0  # frames a second for which the speeds below are chosen


@dataclass(frozen=True)
class Waves:
    """Smooth values ``center + sum over k of amplitude[k] sin(2 pi (frequency[k] t + phase[k]))``, any shape."""

    center: Array  # [...]
    amplitude: Array  # [k, ...]
    frequency: Array  # [k, ...], Hz
    phase: Array  # [k, ...], turns

    def at(self, time: Array) -> Array:
        """Values ``[F, ...]`` at ``time [F]``."""
        time = np.reshape(time, (-1, 1) + (1,) * self.center.ndim)
        angle = 2 * np.pi * (self.frequency * time + self.phase)
        return self.center + (self.amplitude * np.sin(angle)).sum(1)

    @property
    def varies(self) -> NDArray[np.bool_]:
        """Which of the values ever change."""
        return ((self.amplitude != 0) & (self.frequency != 0)).any(0)


@dataclass(frozen=True)
class Solids:
    """``SOLIDS`` slots. A solid is scaled by ``half`` and the squash, tilted, turned about the vertical, translated."""

    present: NDArray[np.bool_]  # [S]
    half: Array  # [S, 3]
    place: Waves  # [S, 3]
    squash: Waves  # [S, 3]: logarithm of the factor on each half axis
    yaw: Array  # [S], radians at t = 0
    tilt: Array  # [S], radians
    spin: Array  # [S], radians a second

    @property
    def moving(self) -> NDArray[np.bool_]:
        """Which solids translate, turn or deform at any time ``[S]``."""
        return self.present & (self.place.varies.any(-1) | self.squash.varies.any(-1) | (self.spin != 0))

    def inverse_maps(self, time: Array) -> tuple[Array, Array]:
        """World to unit shape at ``time [F]``: ``matrix [F, S, 3, 3]`` and the centres ``[F, S, 3]`` in the world."""
        angle = self.yaw + self.spin * time[:, None]
        turn = rotation(angle, np.broadcast_to(self.tilt, angle.shape), np.zeros_like(angle))
        half = self.half * np.exp(self.squash.at(time))
        return np.swapaxes(turn, -1, -2) / half[..., None], self.place.at(time)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels and its principal point in the middle of the image."""

    eye: Waves  # [3]
    angles: Waves  # [3]: yaw, pitch, roll in radians
    field_of_view: Waves  # []: horizontal, radians

    def poses(self, time: Array) -> Array:
        """Camera to world ``[F, 4, 4]``."""
        pose = np.broadcast_to(np.eye(4), (len(time), 4, 4)).copy()
        pose[:, :3, :3] = rotation(*np.moveaxis(self.angles.at(time), -1, 0))
        pose[:, :3, 3] = self.eye.at(time)
        return pose

    def intrinsics(self, time: Array, height: int, width: int) -> Array:
        """``[F, 3, 3]`` in pixels."""
        k = np.zeros((len(time), 3, 3))
        k[:, 0, 0] = k[:, 1, 1] = 0.5 * width / np.tan(0.5 * self.field_of_view.at(time))
        k[:, 0, 2], k[:, 1, 2], k[:, 2, 2] = width / 2, height / 2, 1
        return k


@dataclass(frozen=True)
class Textures:
    """One two-colour pattern with noise over it for each of the ``SURFACES``; colours are linear RGB in [0, 1]."""

    colors: Array  # [2, n, 3]
    pattern: Array  # [3, n]: share of checks, share of stripes, threshold of the waves
    cell: Array  # [n], metres
    noise: Array  # [n], contrast
    offset: Array  # [2, n]: where in the noise table
    glow: Array  # [n]: light of its own; the sky's


@dataclass(frozen=True)
class Light:
    """Light from everywhere and one lamp."""

    lamp: Array  # [3], metres
    color: Array  # [3]: of the lamp
    ambient: float
    gain: Waves  # []: exposure


@dataclass(frozen=True)
class Scene:
    """All that is rendered."""

    half: Array  # [3]: the room around the origin, or the box that carries ground and sky
    solids: Solids
    textures: Textures
    light: Light
    camera: Camera


def rotation(yaw: Array, pitch: Array, roll: Array) -> Array:
    """``Ry(yaw) Rx(pitch) Rz(roll)``, ``[..., 3, 3]``."""
    (cy, cp, cr), (sy, sp, sr) = ([f(a) for a in (yaw, pitch, roll)] for f in (np.cos, np.sin))
    rows = (
        (cy * cr + sy * sp * sr, sy * sp * cr - cy * sr, sy * cp),
        (cp * sr, cp * cr, -sp),
        (cy * sp * sr - sy * cr, sy * sr + cy * sp * cr, cy * cp),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def random_scene(
    rng: np.random.Generator, *, dynamic: bool = True, zoom: bool = True, pace: tuple[float, float] = (0.02, 1.0)
) -> Scene:
    """A scene drawn from ``rng``; the same state of it gives the same scene.

    Args:
        dynamic: one to four of the solids move; otherwise all rest.
        zoom: the field of view may change over time.
        pace: between which the camera's speed lies, 1 being fast: some 1 % of the depth of the scene a frame.
    """
    terrain = rng.random() < 0.35
    half = rng.uniform((2.2, 1.3, 2.8), (4.5, 2.0, 5.0))
    if terrain:
        half = half * (4.0, 3.0, 4.0)
    ground = half[1]
    camera = _random_camera(rng, half, terrain, zoom, pace)
    solids = _random_solids(rng, camera, half, ground, dynamic, terrain)
    return Scene(half, solids, _random_textures(rng, terrain), _random_light(rng, half, terrain), camera)


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | tuple = ()) -> Array:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _random_camera(
    rng: np.random.Generator, half: Array, terrain: bool, zoom: bool, pace: tuple[float, float]
) -> Camera:
    """A slow sway with a little shake; one camera in seven stands still."""
    speed = 0.0 if rng.random() < 1 / 7 else _log_uniform(rng, *pace)
    turning = 0.0 if speed == 0 else min(1.0, speed * _log_uniform(rng, 0.3, 3.0))
    low, high = np.array([[0.06], [0.6]]), np.array([[0.25], [1.6]])  # Hz: sway and shake
    frequency, phase = rng.uniform(low, high, (2, 2, 3)), rng.random((2, 2, 3))
    sway = np.array([[0.65, 0.2, 0.5], [0.012, 0.012, 0.008]]) * rng.uniform(0.3, 1.0, (2, 3)) * speed
    nod = np.array([[0.35, 0.15, 0.1], [0.010, 0.010, 0.008]]) * rng.uniform(0.3, 1.0, (2, 3)) * turning
    eye = np.array([rng.uniform(-0.3, 0.3) * half[0], 0.0, rng.uniform(-0.7, -0.5) * half[2]])
    eye[1] = half[1] - (rng.uniform(1.0, 2.2) if terrain else rng.uniform(0.45, 0.8) * 2 * half[1])
    eye[1] = max(eye[1], -half[1] + 0.4)
    angles = np.array([rng.uniform(-0.35, 0.35), rng.uniform(-0.3, 0.02), rng.uniform(-0.05, 0.05)])
    view = rng.uniform(0.85, 1.5)
    swing = np.array([rng.uniform(0.02, 0.08) * view * (zoom and rng.random() < 0.5)])
    return Camera(
        Waves(eye, sway, frequency[0], phase[0]),
        Waves(angles, nod, frequency[1], phase[1]),
        Waves(np.array(view), swing, rng.uniform(0.1, 0.4, 1), rng.random(1)),
    )


def _random_solids(
    rng: np.random.Generator, camera: Camera, half: Array, ground: float, dynamic: bool, terrain: bool
) -> Solids:
    """Solids in the camera's view half a second into the clip; some of them stand on the ground, some hover."""
    count = int(rng.integers(3, 8))
    slots = np.r_[0:BALLS, ROUND:SOLIDS]
    chosen = rng.permutation(slots)[:count]
    present, moves = np.zeros(SOLIDS, bool), np.zeros(SOLIDS, bool)
    present[chosen] = True
    moves[chosen[: int(rng.integers(1, min(4, count - 1) + 1))]] = dynamic

    view, aspect = float(camera.field_of_view.center), 0.75
    slope = np.tan(0.5 * view)
    depth = rng.uniform(1.4, 1.0 + 0.55 * half[2] if not terrain else 4.5, SOLIDS)
    across = np.linspace(-0.7, 0.7, count)[rng.permutation(count)] + rng.uniform(-0.15, 0.15, count)
    x = np.zeros(SOLIDS)
    x[chosen] = across
    local = np.stack((x * slope, rng.uniform(-0.5, 0.6, SOLIDS) * slope * aspect, np.ones(SOLIDS)), -1) * depth[:, None]
    pose = camera.poses(np.array([0.5]))[0]
    center = (pose[:3, :3] * local[:, None]).sum(-1) + pose[:3, 3]
    size = _log_uniform(rng, 0.15, 0.32, SOLIDS) * slope * depth
    extent = np.minimum(size[:, None] * rng.uniform(0.7, 1.3, (SOLIDS, 3)), 0.4 * half)
    low = (ground - extent[:, 1] - pose[1, 3]) / depth  # slope at which a solid on the ground would be seen
    standing = (rng.random(SOLIDS) < 0.6) & (low > -0.2) & (low - pose[1, 2] < 0.85 * slope * aspect)
    center[:, 1] = np.where(standing, ground - extent[:, 1], np.minimum(center[:, 1], ground - extent[:, 1]))
    keep = half[[0, 2]] - extent[:, [0, 2]]
    center[:, [0, 2]] = np.clip(center[:, [0, 2]], -keep, keep)

    # Ways to move: up to 6 pixels a frame of an image 80 wide, squash and stretch, turning; nearly all translate.
    speed = _log_uniform(rng, 1.2, 6.0, SOLIDS) / 80 * RATE * 2 * slope * depth  # metres a second
    frequency, phase = rng.uniform(0.15, 0.8, (1, SOLIDS, 3)), rng.random((1, SOLIDS, 3))
    heading = rng.normal(size=(SOLIDS, 3)) * (1.0, 0.6, 0.8)
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    deforms, spins = rng.random(SOLIDS) < 0.4, rng.random(SOLIDS) < 0.5
    translates = (rng.random(SOLIDS) < 0.85) | ~(deforms | spins)
    travel = np.where((moves & translates)[:, None], speed[:, None] * heading / (2 * np.pi * frequency[0]), 0.0)
    travel = np.clip(travel, -0.8, 0.8)
    travel[:, 1] = np.where(standing, 0.0, np.minimum(np.abs(travel[:, 1]), 0.3))
    strength = rng.uniform(0.15, 0.45, SOLIDS) * (moves & deforms)
    pulses = rng.random(SOLIDS) < 0.5  # all axes together, or the vertical one against the others
    shape = np.where(pulses[:, None], (1.0, 1.0, 1.0), (-0.5, 1.0, -0.5)) * strength[:, None]
    beat, start = rng.uniform(0.3, 1.2, (SOLIDS, 1)), rng.random((SOLIDS, 1))
    squash = Waves(np.zeros((SOLIDS, 3)), shape[None], *(np.repeat(w, 3, 1)[None] for w in (beat, start)))
    spin = rng.uniform(0.8, 3.5, SOLIDS) * rng.choice((-1.0, 1.0), SOLIDS) * (moves & spins)
    yaw, tilt = rng.uniform(-np.pi, np.pi, SOLIDS), np.where(standing, 0.0, rng.uniform(-0.6, 0.6, SOLIDS))

    hills = np.s_[BALLS:ROUND]
    present[hills] = terrain
    extent[hills] = rng.uniform((1.5, 0.4, 1.5), (5.0, 2.2, 4.0), (HILLS, 3))
    away = rng.uniform((-0.6, 1.0, 0.1), (0.6, 1.1, 0.8), (HILLS, 3)) * (half[0], ground, half[2])
    center[hills] = away
    return Solids(present, extent, Waves(center, travel[None], frequency, phase), squash, yaw, tilt, spin)


def _random_textures(rng: np.random.Generator, terrain: bool) -> Textures:
    tint = rng.uniform(0.08, 0.9, (2, SURFACES, 3))
    walls = np.s_[SOLIDS:]
    tint[:, walls] = 0.35 * tint[:, walls] + rng.uniform(0.15, 0.6, (2, WALLS, 1))
    # plain, checks, stripes, lines both ways
    patterns = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 0.8)], float)
    pattern = patterns[rng.choice(4, SURFACES, p=(0.2, 0.3, 0.3, 0.2))]
    cell = np.r_[_log_uniform(rng, 0.12, 0.4, SOLIDS), _log_uniform(rng, 0.4, 1.2, WALLS)]
    noise = rng.uniform(0.2, 0.8, SURFACES)
    glow = np.zeros(SURFACES)
    if terrain:
        sky, floor, hills = SOLIDS + np.array([0, 1, 2, 4, 5]), SOLIDS + 3, np.s_[BALLS:ROUND]
        tint[:, sky] = rng.uniform((0.35, 0.5, 0.6), (0.7, 0.8, 1.0))
        tint[1, sky] *= 0.8
        pattern[sky], cell[sky], noise[sky], glow[sky] = 0, 8.0, 0.25, 1.0
        tint[:, hills] = tint[:, floor, None]
        pattern[hills], cell[hills], noise[hills] = pattern[floor], cell[floor], noise[floor]
    return Textures(tint, pattern.T, cell, noise, rng.uniform(0, 64, (2, SURFACES)), glow)


def _random_light(rng: np.random.Generator, half: Array, terrain: bool) -> Light:
    lamp = rng.uniform((-0.7, -0.9, -0.7), (0.7, -0.6, 0.5)) * half
    gain = rng.uniform(0.6, 1.05)
    flicker = np.array([0.12 * gain * rng.random() * (rng.random() < 0.4)])
    wave = Waves(np.array(gain), flicker, rng.uniform(0.1, 0.8, 1), rng.random(1))
    return Light(lamp, rng.uniform(0.75, 1.0, 3), rng.uniform(0.2, 0.5), wave)
