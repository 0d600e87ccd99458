"""A short clip rendered by ray tracing, with its true motion, depth and cameras.

Three parts: the scene description (:class:`Scene` and what it is made of), the renderer (:func:`render_frame`) and
the random choice of a scene and a camera (:func:`random_scene`, :func:`random_camera`). Only numpy and closed-form
intersections; the same seed gives the same bits.

Axes are those of OpenCV: x right, y down, z forward, in metres; pixel centres lie at integer + 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .clip import Clip

Vector = tuple[float, float, float]
Array = NDArray[np.float32]
_TABLE = 64  # side of a texture's lattice of random numbers; a power of two
_NEAR = 1e-3


# ---- scene description -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """A smooth path: ``center + amplitude * sin(2 pi (frequency t + phase))`` on each axis, t in seconds."""

    center: Vector
    amplitude: Vector = (0.0, 0.0, 0.0)
    frequency: Vector = (0.0, 0.0, 0.0)  # Hz
    phase: Vector = (0.0, 0.0, 0.0)  # turns

    def at(self, time: float) -> Array:
        """Position ``[3]`` at ``time``."""
        angle = 2 * np.pi * (np.asarray(self.frequency) * time + np.asarray(self.phase))
        return (np.asarray(self.center) + np.asarray(self.amplitude) * np.sin(angle)).astype(np.float32)


@dataclass(frozen=True)
class Texture:
    """A two-colour pattern with fractal noise over it.

    ``colors`` are linear RGB in [0, 1], ``cell`` the size of a cell in metres, ``noise`` the noise's contrast.
    """

    pattern: Literal["plain", "checker", "stripes", "tiles"]
    colors: tuple[Vector, Vector]
    cell: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Solid:
    """A sphere (``half[0]`` is the radius) or a box of half extents ``half``, turning about the vertical axis."""

    shape: Literal["sphere", "box"]
    half: Vector
    texture: Texture
    path: Path
    spin: float = 0.0  # turns a second

    @property
    def moving(self) -> bool:
        """True if the solid ever moves or turns."""
        translates = any(a and f for a, f in zip(self.path.amplitude, self.path.frequency, strict=True))
        return translates or self.spin != 0.0


@dataclass(frozen=True)
class Scene:
    """A closed room around the origin, six wall textures (-x, +x, ceiling, floor, -z, +z), solids and one lamp."""

    half: Vector
    walls: tuple[Texture, ...]
    solids: tuple[Solid, ...]
    lamp: Vector


@dataclass(frozen=True)
class Camera:
    """A pinhole camera travelling along ``eye`` and looking at ``target``."""

    eye: Path
    target: Path
    field_of_view: float  # horizontal, radians

    def pose(self, time: float) -> NDArray[np.float64]:
        """Camera-to-world ``[4, 4]``; no roll."""
        eye, target = self.eye.at(time).astype(np.float64), self.target.at(time).astype(np.float64)
        forward = target - eye
        forward /= np.linalg.norm(forward)
        right = np.cross((0.0, 1.0, 0.0), forward)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack((right, np.cross(forward, right), forward, eye), axis=1)
        return pose

    def intrinsics(self, height: int, width: int) -> NDArray[np.float64]:
        """``[3, 3]`` in pixels, square pixels, principal point in the middle."""
        focal = 0.5 * width / np.tan(0.5 * self.field_of_view)
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


# ---- renderer ----------------------------------------------------------------------------------------------------


def render_frame(
    scene: Scene, pose: NDArray[np.float64], intrinsics: NDArray[np.float64], height: int, width: int, time: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], Array]:
    """One frame: sRGB ``[H, W, 3]``, true motion ``[H, W]`` and depth along the optical axis ``[H, W]`` in metres.

    The motion mask marks the moving solids themselves, not the shadows they cast.
    """
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    pixels = np.stack((columns, rows, np.ones_like(rows))).reshape(3, -1)
    local = _apply(np.linalg.inv(intrinsics), pixels)  # [3, H * W], z = 1: the ray parameter is the depth
    direction = _apply(pose[:3, :3], local).astype(np.float32)
    origin = np.broadcast_to(pose[:3, 3:].astype(np.float32), direction.shape)

    depth, surface, uv, normal = _hit_room(scene, origin, direction)
    textures = [*scene.walls, *(s.texture for s in scene.solids)]
    for index, solid in enumerate(scene.solids, start=len(scene.walls)):
        distance, closest_uv, closest_normal = _hit_solid(solid, origin, direction, time)
        closer = distance < depth
        depth[closer], surface[closer] = distance[closer], index
        uv[:, closer], normal[:, closer] = closest_uv[:, closer], closest_normal[:, closer]

    point = origin + depth * direction  # [3, H * W]
    ray = np.linalg.norm(direction, axis=0)
    facing = np.abs((normal * direction).sum(0)) / ray
    footprint = depth * ray / (np.float32(intrinsics[0, 0]) * np.maximum(facing, 0.1))  # metres covered by a pixel
    color = np.empty_like(point)
    for index in np.unique(surface):
        here = surface == index
        color[:, here] = _texture_color(textures[index], uv[:, here], footprint[here])
    color *= _light(scene, point, normal, surface < len(scene.walls), time)
    moving = np.array([False] * len(scene.walls) + [s.moving for s in scene.solids])[surface]
    rgb = np.rint(255 * np.clip(color, 0, 1) ** np.float32(1 / 2.2)).astype(np.uint8)
    return rgb.T.reshape(height, width, 3), moving.reshape(height, width), depth.reshape(height, width)


def _hit_room(scene: Scene, origin: Array, direction: Array) -> tuple[Array, NDArray[np.intp], Array, Array]:
    """Depth ``[n]``, wall index ``[n]``, texture coordinates ``[2, n]`` and normal ``[3, n]`` seen from inside."""
    half = np.asarray(scene.half, np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = (np.copysign(half, direction) - origin) / direction
    distance[~np.isfinite(distance)] = np.inf
    axis = distance.argmin(0)
    depth = np.take_along_axis(distance, axis[None], 0)[0]
    positive = np.take_along_axis(direction, axis[None], 0)[0] > 0
    uv = _planar(origin + depth * direction, axis)
    normal = np.zeros_like(direction)
    np.put_along_axis(normal, axis[None], np.where(positive, -1, 1)[None].astype(np.float32), 0)
    return depth, 2 * axis + positive, uv, normal


def _hit_solid(solid: Solid, origin: Array, direction: Array, time: float) -> tuple[Array, Array, Array]:
    """Depth ``[n]`` (inf where missed), texture coordinates ``[2, n]``, outward normal ``[3, n]``."""
    angle = 2 * np.pi * solid.spin * time
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32)  # world to local
    o = _apply(turn, origin - solid.path.at(time)[:, None])
    d = _apply(turn, direction)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "sphere":
            a, b = (d * d).sum(0), (o * d).sum(0)
            root = b * b - a * ((o * o).sum(0) - np.float32(solid.half[0]) ** 2)
            depth = np.where(root >= 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf).astype(np.float32)
            depth[~(depth > _NEAR)] = np.inf
            normal = np.where(np.isfinite(depth), (o + depth * d) / np.float32(solid.half[0]), 0)
            longitude, latitude = np.arctan2(normal[0], normal[2]), np.arcsin(np.clip(normal[1], -1, 1))
            uv = np.stack((longitude, latitude)) * np.float32(solid.half[0])
        else:
            half = np.asarray(solid.half, np.float32)[:, None]
            near, far = (-half - o) / d, (half - o) / d
            near, far = np.minimum(near, far), np.maximum(near, far)
            axis = near.argmax(0)
            depth = near.max(0)
            depth[~((depth > _NEAR) & (depth < far.min(0)))] = np.inf
            hit = np.where(np.isfinite(depth), o + depth * d, 0)
            uv = _planar(hit, axis)
            normal = np.zeros_like(d)
            outward = -np.sign(np.take_along_axis(d, axis[None], 0))
            np.put_along_axis(normal, axis[None], outward, 0)
    return depth, uv, _apply(turn.T, normal)


def _apply(matrix: NDArray, x: NDArray) -> NDArray:
    """``matrix [3, 3]`` times ``x [3, n]``, element by element: BLAS may round differently with the thread count."""
    return matrix[:, :1] * x[0] + matrix[:, 1:2] * x[1] + matrix[:, 2:] * x[2]


def _planar(point: Array, axis: NDArray[np.intp]) -> Array:
    """The two coordinates of ``point [3, n]`` other than ``axis [n]``, the vertical one last: ``[2, n]``."""
    u = np.where(axis == 0, point[2], point[0])
    v = np.where(axis == 1, point[2], point[1])
    return np.stack((u, v))


def _texture_color(texture: Texture, uv: Array, footprint: Array) -> Array:
    """Linear RGB ``[3, n]`` at texture coordinates ``[2, n]``; edges are softened over a pixel's ``footprint [n]``."""
    cell = np.float32(texture.cell)
    u, v = uv / cell

    def wave(x: Array, threshold: float = 0.0) -> Array:  # a square wave with edges as wide as a pixel
        return np.clip((np.sin(np.float32(np.pi) * x) - threshold) / np.maximum(3 * footprint / cell, 0.03), -1, 1)

    if texture.pattern == "checker":
        blend = 0.5 + 0.5 * wave(u) * wave(v)
    elif texture.pattern == "stripes":
        blend = 0.5 + 0.5 * wave(u)
    elif texture.pattern == "tiles":
        blend = 1 - 0.25 * (1 + wave(2 * u - 0.5, 0.985)) - 0.25 * (1 + wave(2 * v - 0.5, 0.985))
    else:
        blend = np.zeros_like(u)
    first, second = np.asarray(texture.colors, np.float32)[:, :, None]
    noise = _fractal_noise(texture.seed, uv, footprint)
    return (first + (second - first) * blend) * (1 + np.float32(texture.noise) * noise)


def _fractal_noise(seed: int, uv: Array, footprint: Array) -> Array:
    """Value noise in about [-1, 1] from cells of 48, 16 and 5 cm; octaves finer than a pixel fade out."""
    table = np.random.default_rng(seed).random((_TABLE, _TABLE), dtype=np.float32) * 2 - 1
    total = np.zeros(uv.shape[1], np.float32)
    for weight, size in ((0.5, 0.48), (0.3, 0.16), (0.2, 0.05)):
        x = uv / np.float32(size)
        cell = np.floor(x)
        f = x - cell
        f = f * f * (3 - 2 * f)
        (i, j), (i1, j1) = (cell.astype(np.int64) & (_TABLE - 1)), ((cell.astype(np.int64) + 1) & (_TABLE - 1))
        low = table[j, i] + (table[j, i1] - table[j, i]) * f[0]
        high = table[j1, i] + (table[j1, i1] - table[j1, i]) * f[0]
        fade = np.clip(1.5 - 2 * footprint / np.float32(size), 0, 1)
        total += np.float32(weight) * fade * (low + (high - low) * f[1])
    return 1.6 * total


def _light(scene: Scene, point: Array, normal: Array, on_wall: NDArray[np.bool_], time: float) -> Array:
    """Ambient light (less in the room's corners) plus one lamp with hard shadows: ``[n]``."""
    to_lamp = np.asarray(scene.lamp, np.float32)[:, None] - point
    distance = np.linalg.norm(to_lamp, axis=0)
    lambert = np.maximum((normal * to_lamp).sum(0) / distance, 0)
    start = point + 4 * np.float32(_NEAR) * normal
    shadow = np.zeros(point.shape[1], bool)
    for solid in scene.solids:
        shadow |= _hit_solid(solid, start, to_lamp, time)[0] < 1
    lamp = np.where(shadow, 0.12, 1.0) * lambert * 5.5 / (2.0 + distance**2)
    gap = np.asarray(scene.half, np.float32)[:, None] - np.abs(point)  # to the nearest wall of each axis
    gap = np.sort(gap, axis=0)[1]  # the nearest other wall, for points on a wall
    corner = np.where(on_wall, 0.55 + 0.45 * np.clip(gap / 0.6, 0, 1), 1.0)
    return (0.34 * corner + lamp).astype(np.float32)


# ---- random scenes and cameras -----------------------------------------------------------------------------------


def random_scene(seed: int, moving: int = 3, still: int = 3) -> Scene:
    """A room with ``moving`` moving and ``still`` resting solids; the choice depends on ``seed`` alone."""
    rng = np.random.default_rng([seed, 0])
    half = (float(rng.uniform(2.6, 3.2)), 1.5, float(rng.uniform(2.6, 3.2)))

    def texture(pattern: str, light: tuple[float, float], cell: float, noise: float) -> Texture:
        tint = rng.uniform(0.55, 1.0, (2, 3)) * np.asarray(light)[:, None]
        first, second = (tuple(float(x) for x in c) for c in tint)
        return Texture(pattern, (first, second), cell, noise, int(rng.integers(2**31)))

    walls = [texture("plain" if rng.random() < 0.5 else "stripes", (0.75, 0.6), 0.45, 0.35) for _ in range(6)]
    walls[2] = texture("plain", (0.9, 0.9), 1.0, 0.1)
    walls[3] = texture("checker" if rng.random() < 0.5 else "tiles", (0.3, 0.75), 0.5, 0.3)

    def vivid() -> Texture:
        color = np.full(3, 0.12)
        color[rng.integers(3)] = 0.9
        color[rng.integers(3)] += 0.25
        first = tuple(float(x) for x in np.minimum(color, 1))
        pattern = ("checker", "stripes", "tiles")[int(rng.integers(3))]
        return Texture(pattern, (first, (0.85, 0.82, 0.75)), 0.16, 0.3, int(rng.integers(2**31)))

    def solid(slot: int, count: int, moves: bool) -> Solid:
        sphere = bool((slot + int(moves)) % 2)
        size = rng.uniform(0.26, 0.36, 3)
        x = -1.5 + 3.0 * (slot + 0.5) / count + rng.uniform(-0.12, 0.12)
        z = rng.uniform(-0.5, 0.5) if moves else rng.uniform(1.2, 1.7)
        floor = half[1] - float(size[0] if sphere else size[1])
        amplitude = frequency = phase = (0.0, 0.0, 0.0)
        if moves:
            height = float(rng.uniform(0.3, 0.8))
            floor -= height  # it swings between the floor and twice this height
            amplitude = (float(rng.uniform(0.25, 0.45)), height, float(rng.uniform(0.1, 0.3)))
            frequency = tuple(float(f) for f in rng.uniform(0.25, 0.6, 3))
            phase = tuple(float(p) for p in rng.uniform(0, 1, 3))
        shape = "sphere" if sphere else "box"
        spin = float(rng.uniform(0.2, 0.5)) if moves else 0.0
        path = Path((float(x), floor, float(z)), amplitude, frequency, phase)
        return Solid(shape, tuple(float(s) for s in size), vivid(), path, spin)

    solids = [solid(i, moving, True) for i in range(moving)] + [solid(i, still, False) for i in range(still)]
    return Scene(half, tuple(walls), tuple(solids), (0.4, -1.25, -0.6))


def random_camera(seed: int) -> Camera:
    """A handheld-like camera at one end of the room, swaying sideways and looking at its middle."""
    rng = np.random.default_rng([seed, 1])

    def path(center: Vector, amplitude: Vector) -> Path:
        frequency, phase = rng.uniform(0.1, 0.25, 3), rng.uniform(0, 1, 3)
        return Path(center, amplitude, tuple(map(float, frequency)), tuple(map(float, phase)))

    eye = path((0.0, -0.1, -2.1), (0.55, 0.15, 0.2))
    return Camera(eye, path((0.0, 0.55, 0.4), (0.25, 0.08, 0.0)), float(rng.uniform(1.15, 1.25)))


def render_clip(
    frames: int = 12, height: int = 252, width: int = 322, *, seed: int = 0, frame_rate: float = 8.0
) -> Clip:
    """Render a clip of a random scene.

    Args:
        frames: number of frames ``T``.
        height, width: size in pixels.
        seed: chooses the scene and the camera; the same seed gives the same bits.
        frame_rate: frames a second.

    Returns:
        A clip with ``motion``, ``depth``, ``poses`` and ``intrinsics`` filled in.

    Raises:
        ValueError: a size or the frame rate is not positive.
    """
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
    if not frame_rate > 0:
        raise ValueError(f"frame_rate must be positive (frames a second), got {frame_rate!r}.")
    scene, camera = random_scene(seed), random_camera(seed)
    intrinsics = camera.intrinsics(height, width)
    times = [t / frame_rate for t in range(frames)]
    poses = [camera.pose(t) for t in times]
    rendered = [render_frame(scene, p, intrinsics, height, width, t) for p, t in zip(poses, times, strict=True)]
    rgb, motion, depth = (torch.from_numpy(np.stack(x)) for x in zip(*rendered, strict=True))
    cameras = torch.from_numpy(np.stack(poses)), torch.from_numpy(intrinsics)
    return Clip(rgb, f"rendered room, seed {seed}", motion, depth, *cameras)
