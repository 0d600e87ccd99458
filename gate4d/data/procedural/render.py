"""Pixels of a scene, in torch.

Every ray meets every solid in the solid's own frame, where it is the unit sphere or the unit cube; a ray's direction
there is a linear function of the pixel's column and row, so most of the work is done once per row and column. Texture
and light are evaluated for the nearest surface alone.

Only operations that IEEE 754 rounds exactly (sums, products, quotients, square roots, comparisons, look-ups): a
vectorised sine or power rounds differently in the last elements of a thread's share, and then the bits would depend
on the number of threads. For the same reason the transfer curve is a square root (a gamma of 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .scene import BALLS, ROUND, SOLIDS, SURFACES, WALLS, Array, Scene

_SIDE = 64  # of the lattice of random numbers behind the noise; a power of two
_OCTAVES = ((0.45, 0.9), (0.35, 0.3), (0.2, 0.1))  # weight, cell in metres
_NEAR = 1e-3
_CHUNK = 1 << 16  # pixels rendered at once on a CPU, so that the intermediates stay in its cache
_CASTERS = (*range(BALLS), *range(ROUND, SOLIDS))


@dataclass(frozen=True)
class Frames:
    """What the renderer needs to know of ``F`` frames; "local" is the frame of solid ``s``, the room the last one."""

    rays: Tensor  # [F, S + 1, 3, 3] fp32: (column, row, 1), from the middle of the image, to local direction
    eye: Tensor  # [F, S + 1, 3]: local position of the camera
    lamp: Tensor  # [F, S + 1, 3]: local position of the lamp
    metric: Tensor  # [F, S + 1, 6]: xx yy zz xy xz yz of the squared length in the world of a local normal
    view: Tensor  # [F, 5]: the lamp in camera axes, metres; 1 / focal length; the lamp's reach squared
    surfaces: Tensor  # [22, F, SURFACES]: size 3, colours 2 x 3, pattern 7, ambient light 3, lamp's 3
    present: np.ndarray  # [S] bool: solids that are in any of the frames
    moving: Tensor  # [F, SURFACES] bool


def describe(scene: Scene, time: Array, height: int, width: int) -> tuple[Frames, Array, Array]:
    """The frames of a scene at ``time [F]``, their poses ``[F, 4, 4]`` and intrinsics ``[F, 3, 3]``."""
    poses, intrinsics = scene.camera.poses(time), scene.camera.intrinsics(time, height, width)
    matrix, center = scene.solids.inverse_maps(time)
    frames = len(time)
    room = np.broadcast_to(np.diag(1 / scene.half), (frames, 1, 3, 3))
    matrix = np.concatenate((matrix, room), 1)
    center = np.concatenate((center, np.zeros((frames, 1, 3))), 1)
    focal = intrinsics[:, 0, 0]
    rays = matrix @ (poses[:, :3, :3] * np.stack((1 / focal, 1 / focal, np.ones(frames)), -1)[:, None])[:, None]
    rays[..., 2] += 1e-9  # no ray is exactly parallel to a face

    def local(point: Array) -> Array:
        return (matrix * (point - center)[..., None, :]).sum(-1)

    square = matrix @ np.swapaxes(matrix, -1, -2)
    metric = square[..., (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)]
    lamp, t = scene.light.lamp, scene.textures
    seen = ((lamp - poses[:, :3, 3])[:, :, None] * poses[:, :3, :3]).sum(1)
    reach = np.broadcast_to((scene.half**2).sum(), (frames, 1))
    view = np.concatenate((seen, 1 / focal[:, None], reach), 1)

    still = (*_sizes(scene), *t.colors[0].T, *t.colors[1].T, *t.pattern, t.cell, t.noise, *t.offset)
    gain = scene.light.gain.at(time)[:, None]
    glow = t.glow[:, None] * (1 - scene.light.ambient) + scene.light.ambient
    ambient = glow.T[:, None] * scene.light.color[:, None, None] ** 0.3 * gain
    lit = (1 - t.glow) * gain
    table = np.concatenate((np.broadcast_to(np.array(still)[:, None], (len(still), frames, SURFACES)), ambient))
    table = np.concatenate((table, lit[None] * scene.light.color[:, None, None]))
    moving = np.zeros((frames, SURFACES), bool)
    moving[:, :SOLIDS] = scene.solids.moving

    eye, lamp = local(poses[:, None, :3, 3]), local(lamp)
    absent = np.flatnonzero(~scene.solids.present)  # among the frames of other scenes: hit by no ray, shading nothing
    rays[:, absent], eye[:, absent], lamp[:, absent] = 0, 2, 2

    def tensor(x: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))

    found = Frames(
        tensor(rays), tensor(eye), tensor(lamp), tensor(metric), tensor(view), tensor(table), scene.solids.present,
        torch.from_numpy(moving),
    )  # fmt: skip
    return found, poses, intrinsics


def _sizes(scene: Scene) -> Array:
    """Half axes at rest ``[3, SURFACES]``: in their units a texture sticks to a solid that deforms."""
    return np.concatenate((scene.solids.half, np.repeat(scene.half[None], WALLS, 0))).T


def join(parts: list[Frames]) -> Frames:
    """The frames of several scenes one after the other."""
    names = ("rays", "eye", "lamp", "metric", "view", "moving")
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
    present = np.any([p.present for p in parts], 0)
    return Frames(surfaces=torch.cat([p.surfaces for p in parts], 1), present=present, **joined)


def render(frames: Frames, height: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Linear RGB ``[F, 3, H, W]``, depth ``[F, H, W]`` in metres along the optical axis, motion ``[F, H, W]`` bool."""
    total = len(frames.rays)
    step = max(1, _CHUNK // (height * width)) if torch.device(device).type == "cpu" else total
    done = [_render(_part(frames, i, min(i + step, total), device), height, width) for i in range(0, total, step)]
    return tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*done, strict=True))


def _part(frames: Frames, start: int, stop: int, device: torch.device | str) -> Frames:
    names = ("rays", "eye", "lamp", "metric", "view", "moving")
    cut = {name: getattr(frames, name)[start:stop].to(device) for name in names}
    surfaces = frames.surfaces[:, start:stop].to(device)
    return Frames(surfaces=surfaces, present=frames.present, **cut)


@cache
def _noise_table(device: torch.device) -> Tensor:
    values = np.random.default_rng(4).random(_SIDE * _SIDE, dtype=np.float32) * 2 - 1
    return torch.from_numpy(values).to(device)


class _Rays:
    """Local rays of the frames' pixels and the products that a quadric needs."""

    def __init__(self, frames: Frames, height: int, width: int):
        device = frames.rays.device
        self.column = torch.arange(width, dtype=torch.float32, device=device) + (0.5 - width / 2)  # [W]
        self.row = torch.arange(height, dtype=torch.float32, device=device)[:, None] + (0.5 - height / 2)  # [H, 1]
        self.frames = frames

    def linear(self, rows: Tensor) -> Tensor:
        """``rows [F, 3]`` times (column, row, 1): ``[F, H, W]``."""
        x, y, one = (rows[:, i, None, None] for i in range(3))
        return x * self.column + (y * self.row + one)

    def directions(self, solid: int) -> list[Tensor]:
        return [self.linear(self.frames.rays[:, solid, i]) for i in range(3)]

    def towards(self, solid: int, point: Tensor) -> Tensor:
        """Inner product of the local direction with ``point [F, 3]``."""
        return self.linear((self.frames.rays[:, solid] * point[..., None]).sum(1))

    def eye(self, solid: int) -> list[Tensor]:
        return [self.frames.eye[:, solid, i, None, None] for i in range(3)]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _render(frames: Frames, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    rays = _Rays(frames, height, width)
    depth, surface = _hit_room(rays)
    squares: dict[int, tuple[Tensor, Tensor]] = {}
    for solid in np.flatnonzero(frames.present).tolist():
        near, *squares[solid] = _hit_ball(rays, solid) if solid < ROUND else _hit_box(rays, solid)
        closer = (near < depth) & (near > _NEAR)  # False where near is NaN: a miss
        depth = torch.where(closer, near, depth)
        surface = torch.where(closer, solid, surface)
    count = torch.arange(len(depth), dtype=torch.int32, device=depth.device)[:, None, None]
    index = count * SURFACES + surface
    color = _shade(rays, depth, surface, index, squares)
    return color, depth, frames.moving.flatten().index_select(0, index.flatten()).view(depth.shape)


def _hit_room(rays: _Rays) -> tuple[Tensor, Tensor]:
    """Depth and surface index (int32) of the wall that each ray leaves the room by."""
    exits, sides = [], []
    for d, o in zip(rays.directions(SOLIDS), rays.eye(SOLIDS), strict=True):
        positive = (d > 0).float()
        exits.append((1 - o + (1 - positive) * (2 * o)) / d.abs())  # (1 -+ o) / |d|
        sides.append(positive)
    depth = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
    y, z = (exits[1] == depth).float(), (exits[2] == depth).float() * (exits[1] != depth).float()
    x = 1 - y - z
    wall = x * sides[0] + y * (2 + sides[1]) + z * (4 + sides[2])
    return depth, (wall + SOLIDS).to(torch.int32)


def _hit_ball(rays: _Rays, solid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Depth of the near side (NaN where missed), and d.d and d.o of the local ray ``o + t d``."""
    d, eye = rays.directions(solid), rays.frames.eye[:, solid]
    dd, do = _dot(d, d), rays.towards(solid, eye)
    oo = (eye * eye).sum(-1)[:, None, None]
    return -(do + (do * do - dd * (oo - 1)).sqrt()) / dd, dd, do


def _hit_box(rays: _Rays, solid: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_hit_ball`, for the cube from -1 to 1."""
    d, o = rays.directions(solid), rays.eye(solid)
    inverse = [1 / x for x in d]
    middle, reach = [i * -x for i, x in zip(inverse, o, strict=True)], [i.abs() for i in inverse]
    enter = [m - r for m, r in zip(middle, reach, strict=True)]
    leave = [m + r for m, r in zip(middle, reach, strict=True)]
    near = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    far = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    near = torch.where(near < far, near, torch.inf)
    return near, _dot(d, d), rays.towards(solid, rays.frames.eye[:, solid])


def _shade(
    rays: _Rays, depth: Tensor, surface: Tensor, index: Tensor, squares: dict[int, tuple[Tensor, Tensor]]
) -> Tensor:
    """Linear RGB ``[F, 3, H, W]`` of the visible surfaces."""
    frames, shape = rays.frames, depth.shape
    slot = torch.arange(SURFACES, device=depth.device).clamp(max=SOLIDS)  # surface -> solid
    per_solid = torch.cat((frames.rays.flatten(2), frames.eye, frames.lamp, frames.metric), -1)[:, slot]
    table = torch.cat((frames.surfaces.flatten(1), per_solid.flatten(0, 1).t()))
    values = table.index_select(1, index.flatten()).view(-1, *shape).unbind()
    size, first, second, pattern, ambient, lit, rows, eye, lamp, metric = _split(values, 3, 3, 3, 7, 3, 3, 9, 3, 3, 6)

    ray = [rows[3 * i] * rays.column + (rows[3 * i + 1] * rays.row + rows[3 * i + 2]) for i in range(3)]
    point = [o + depth * d for o, d in zip(eye, ray, strict=True)]  # on the unit sphere or cube
    away = [p.abs() for p in point]
    top = torch.maximum(torch.maximum(away[0], away[1]), away[2])
    face = [a == top for a in away]
    bent = surface < ROUND
    normal = [torch.where(bent | f, p, 0.0) for f, p in zip(face, point, strict=True)]

    xx, yy, zz, xy, xz, yz = metric
    nx, ny, nz = normal
    length = (nx * (nx * xx + 2 * (ny * xy + nz * xz)) + ny * (ny * yy + 2 * (nz * yz)) + nz * (nz * zz)).sqrt()
    per_metre = frames.view[:, 3, None, None]
    x, y = rays.column * per_metre, rays.row * per_metre
    slant = (x * x + y * y + 1).sqrt()
    facing = _dot(normal, ray).abs() / (length * slant)
    footprint = depth * slant * per_metre / facing.clamp(min=0.15)  # metres covered by a pixel

    metres = [p * s for p, s in zip(point, size, strict=True)]
    u, v = torch.where(face[0], metres[2], metres[0]), torch.where(face[1], metres[2], metres[1])
    blend, grain = _pattern(u, v, footprint, pattern)

    to_lamp = [m - p for m, p in zip(lamp, point, strict=True)]
    gap = [frames.view[:, i, None, None] - p * depth for i, p in enumerate((x, y, 1.0))]
    squared = _dot(gap, gap)
    lambert = _dot(normal, to_lamp) / (length * squared.sqrt())
    lambert = torch.where(surface < SOLIDS, lambert, -lambert).clamp(min=0)  # a wall is seen from inside
    falloff = 1.3 / (0.4 + squared / frames.view[:, 4, None, None])
    light = lambert * _shadows(rays, depth, squares) * falloff
    corner = away[0] + away[1] + away[2] - top - torch.minimum(torch.minimum(away[0], away[1]), away[2])
    dim = 1 - (surface >= SOLIDS).float() * (4 * (corner - 0.8)).clamp(min=0) * 0.5
    channels = zip(first, second, ambient, lit, strict=True)
    return torch.stack([(a + (b - a) * blend) * grain * (e * dim + w * light) for a, b, e, w in channels], 1)


def _split(values: tuple[Tensor, ...], *counts: int) -> list[tuple[Tensor, ...]]:
    ends = np.cumsum(counts).tolist()
    return [values[e - n : e] for n, e in zip(counts, ends, strict=True)]


def _pattern(u: Tensor, v: Tensor, footprint: Tensor, pattern: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Blend of the two colours in [0, 1] and the factor of the noise at ``u, v``, metres; edges are softened, and noise
    fades out, over a pixel's ``footprint``."""
    checks, stripes, threshold, cell, contrast, u0, v0 = pattern
    softness = (footprint / cell).clamp(min=0.03) * 2
    waves = []
    for x in (u, v):  # triangle waves, cut off to squares with edges as wide as a pixel
        turn = x / cell
        triangle = 4 * (turn - turn.floor() - 0.5).abs() - 1
        waves.append(((triangle + threshold) / softness).clamp(-1, 1))
    blend = 0.5 + 0.5 * (waves[0] * (checks * waves[1] + stripes))
    total = torch.zeros_like(u)
    for weight, size in _OCTAVES:
        fade = (1.5 - footprint * (1 / size)).clamp(0, 1)
        total = total + (weight * fade) * _noise(u * (1 / size) + u0, v * (1 / size) + v0)
    return blend, 1 + 1.6 * contrast * total


def _noise(u: Tensor, v: Tensor) -> Tensor:
    """Value noise in [-1, 1] on a lattice of period ``_SIDE``."""
    table = _noise_table(u.device)
    left, low = u.floor(), v.floor()
    fu, fv = u - left, v - low
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i, j = left.to(torch.int32), low.to(torch.int32)
    i0, i1 = i & (_SIDE - 1), (i + 1) & (_SIDE - 1)
    j0, j1 = (j & (_SIDE - 1)) * _SIDE, ((j + 1) & (_SIDE - 1)) * _SIDE
    a, b, c, d = (table.index_select(0, k.flatten()).view(u.shape) for k in (j0 + i0, j0 + i1, j1 + i0, j1 + i1))
    near, far = a + (b - a) * fu, c + (d - c) * fu
    return near + (far - near) * fv


def _shadows(rays: _Rays, depth: Tensor, squares: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Share of the lamp's light that arrives; every solid shades as the ball of its local frame, with a soft edge."""
    open_ = torch.ones_like(depth)
    for solid in _CASTERS:
        if solid not in squares:
            continue
        dd, do = squares[solid]
        eye, lamp = rays.frames.eye[:, solid], rays.frames.lamp[:, solid]
        oo, ol, ll = ((a * b).sum(-1)[:, None, None] for a, b in ((eye, eye), (eye, lamp), (lamp, lamp)))
        pp = oo + depth * (2 * do + depth * dd)  # inner products of the surface point p and the lamp l
        pl = ol + depth * rays.towards(solid, lamp)
        along, whole = pp - pl, (ll - 2 * pl + pp).clamp(min=1e-6)  # p.(p - l) and |l - p|^2
        part = (along / whole).clamp(0, 1)  # of the way to the lamp: where it passes nearest to the centre
        nearest = pp - part * (2 * along - part * whole)
        beside = ((nearest - 0.75) * 2).clamp(0, 1)
        beside = beside + (part < 0.02).float()  # the surface faces the lamp
        open_ = open_ * beside.clamp(max=1)
    return open_ * 0.92 + 0.08
