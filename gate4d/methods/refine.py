"""VGGT4D's third stage: masks refined by projecting what they call dynamic into the other frames.

A point that stands still is where every other frame sees it. So the points of a mask are projected into the other
frames, and where a frame shows something static there that does not hide the point, its depth and colour must agree
with the point's; what agrees is static after all. In two forms: as the authors' code decides, for clusters of points,
and as their paper writes it, for every point by itself. Frames are taken one by one and the other frames are
streamed: memory is that of a few images, however long the clip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .segmentation import kmeans

FORMS = ("authors", "paper")
_ELLIPSE = np.ones((5, 5), dtype=bool)  # the corners and their neighbours on the short sides are off
_ELLIPSE[[0, -1]] = [False, False, True, False, False]


@torch.no_grad()
def refine_masks(
    masks: Tensor,  # [T, H, W] bool
    images: Tensor,  # [T, 3, H, W]
    depth: Tensor,  # [T, H, W]
    intrinsics: Tensor,  # [T, 3, 3] or [3, 3]
    poses: Tensor,  # [T, 4, 4]
    *,
    form: str = "authors",
    views: int | None = None,
    tolerance: float = 0.01,
    limit: float = 0.1,
    colour: float = 1 / 3,
    share: float = 0.05,
    clusters: int = 30,
    neighbours: int = 20,
    sigma: float = 2.5,
    engine: str = "auto",
    seed: int = 42,
) -> Tensor:
    """Masks without what turns out to be static, closed (5 x 5 ellipse) and dilated (3 x 3).

    For a masked point p and another frame i that sees it at depth z, pixel (u, v), let w = 1 if it is inside the
    image, ``z - tolerance < D_i(u, v)`` (not hidden) and the mask of frame i is off there; r = z - D_i(u, v) and
    c - C_i the residuals of depth and colour.

    ``"authors"``: outliers among the frame's points are left out of the mask (:func:`inliers`), the rest is clustered
    by k-means; a cluster is dynamic if w = 1 for less than ``share`` of its (point, frame) combinations, or if the
    mean of ``|r| + colour * sum |c - C_i|`` over those with w = 1 exceeds ``limit``. As in their code, images are
    sampled half a pixel right and down of the point (depth at the nearest pixel, the rest bilinear).

    ``"paper"``: a point is dynamic if the mean over all other frames of ``w |r| ||grad r|| + colour * w ||c - C_i||``
    exceeds ``limit``, or if w = 0 in all of them; grad r is the gradient with respect to the point's position, D_i
    being interpolated between central differences; images are sampled (bilinear) where the point is. The paper's
    numbers for ``limit`` and the weight of the colour are not known: the defaults are those of the code.

    Args:
        masks: True = dynamic.
        images: in [0, 1].
        depth: along the optical axis, finite. ``tolerance`` and ``limit`` are in its unit; VGGT's is about the
            mean distance of the scene.
        intrinsics: in pixels, pixel centres at integer + 1/2.
        poses: camera to world.
        form: ``"authors"`` or ``"paper"``.
        views: other frames to look at, evenly spaced in the clip; None for all, which takes time in proportion to
            the square of the clip's length.
        tolerance, limit, colour, share: see above.
        clusters, engine, seed: of the k-means.
        neighbours, sigma: of the outliers, see :func:`inliers`.

    Returns:
        bool ``[T, H, W]``, on the device of ``masks``.

    Raises:
        ValueError: a shape does not fit, or depth is not finite.
        ImportError: scipy or scikit-learn is missing; names the extra.
    """
    _check(masks, images, depth, intrinsics, poses, form, views)
    dtype = torch.promote_types(depth.dtype, torch.float32)
    scene = _Scene(masks, images, depth, intrinsics.expand(len(masks), 3, 3).to(dtype), poses.to(dtype))
    refined = []
    for frame in range(len(masks)):
        coarse = masks[frame].flatten()
        if form == "authors":
            points = scene.points(frame)
            chosen = coarse & inliers(points, neighbours, sigma).to(coarse.device)
            points = points[chosen]
        else:
            chosen, points = coarse, scene.points(frame)[coarse]
        dynamic = torch.zeros_like(coarse)
        if len(points):
            others = _others(frame, len(masks), views)
            seen, geometric, photometric = scene.residuals(frame, chosen, points, others, tolerance, form)
            total = geometric + colour * photometric
            if form == "authors":
                labels = kmeans(points, clusters, engine=engine, seed=seed).to(points.device)
                size, seen, total = (torch.bincount(labels, weights=x) for x in (torch.ones_like(seen), seen, total))
                rare = seen < share * (len(others) * size + 1e-6)
                dynamic[chosen] = (rare | (total > limit * seen))[labels]
            else:
                dynamic[chosen] = (seen == 0) | (total > limit * len(others))
        refined.append(_smooth(dynamic.unflatten(0, masks.shape[1:])))
    return torch.stack(refined)


def inliers(points: Tensor, neighbours: int = 20, sigma: float = 2.5) -> Tensor:  # [N, 3] -> [N]
    """Statistical outlier removal as Open3D does it, True = kept.

    A point is kept if its mean distance to its ``neighbours`` nearest points, itself among them, is positive and less
    than the mean of that distance over all points plus ``sigma`` standard deviations.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        raise ImportError("Removing outliers needs scipy: pip install 'gate4d[methods]'.") from None
    x = points.detach().cpu().double().numpy()
    tree, threads = cKDTree(x), torch.get_num_threads()
    near = [
        tree.query(part, min(neighbours, len(x)), workers=threads)[0] for part in np.array_split(x, len(x) // 16384 + 1)
    ]
    distance = np.concatenate([d.reshape(len(d), -1).mean(1) for d in near])
    positive, mean = distance > 0, distance.mean()
    deviation = np.sqrt(((distance - mean)[positive] ** 2).sum() / max(len(x) - 1, 1))
    return torch.from_numpy(positive & (distance < mean + sigma * deviation))


class _Sampled(NamedTuple):
    """What another frame has where points land: each ``[M]``, colour ``[3, M]``, slope (by u, v) ``[2, M]`` or None."""

    depth: Tensor
    colour: Tensor
    dynamic: Tensor
    slope: Tensor | None


class _Scene:
    def __init__(self, masks: Tensor, images: Tensor, depth: Tensor, intrinsics: Tensor, poses: Tensor):
        self.masks, self.images, self.depth = masks, images, depth
        self.intrinsics, self.poses, self.dtype = intrinsics, poses, intrinsics.dtype
        self.to_camera = torch.linalg.inv(poses)

    def points(self, frame: int) -> Tensor:  # -> [H * W, 3]
        """World points of a frame's pixels, row by row."""
        depth = self.depth[frame].to(self.dtype)
        rows, columns = (torch.arange(n, device=depth.device, dtype=self.dtype) + 0.5 for n in depth.shape)
        v, u = torch.meshgrid(rows, columns, indexing="ij")
        local = torch.stack((u, v, torch.ones_like(u)), -1).flatten(0, 1) * depth.flatten()[:, None]
        camera = local @ torch.linalg.inv(self.intrinsics[frame]).T
        return camera @ self.poses[frame, :3, :3].T + self.poses[frame, :3, 3]

    def residuals(
        self, frame: int, chosen: Tensor, points: Tensor, others: list[int], tolerance: float, form: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the other frames of w, and of the residuals of depth and of colour where w = 1; float64 ``[M]``."""
        height, width = self.depth.shape[1:]
        own = self.images[frame].flatten(1)[:, chosen].to(self.dtype)  # [3, M]
        seen, geometric, photometric = torch.zeros(3, len(points), dtype=torch.float64, device=points.device)
        for other in others:
            camera = points @ self.to_camera[other, :3, :3].T + self.to_camera[other, :3, 3]
            u, v, z = (camera @ self.intrinsics[other].T).T
            u, v = u / z, v / z
            there = self.sample(other, u, v, exact=form == "paper")
            residual = z - there.depth
            w = (u > 0) & (u < width) & (v > 0) & (v < height) & (z > 0)
            w &= (z - tolerance < there.depth) & ~there.dynamic
            difference = own - there.colour
            if form == "authors":
                depth_term, colour_term = residual.abs(), difference.abs().sum(0)
            else:
                slope = self.gradient(other, camera, u, v, there.slope)
                depth_term, colour_term = residual.abs() * slope.norm(dim=1), difference.norm(dim=0)
            seen += w
            for total, term in ((geometric, depth_term), (photometric, colour_term)):
                total += torch.where(w, term, 0.0)
        return seen, geometric, photometric

    def sample(self, frame: int, u: Tensor, v: Tensor, *, exact: bool) -> _Sampled:
        """A frame's depth, colour and mask at pixel coordinates ``[M]``; not exact: as the authors' code does."""
        height, width = self.depth.shape[1:]
        if exact:
            grid = torch.stack((2 * u / width - 1, 2 * v / height - 1), -1)[None, None]
        else:
            grid = torch.stack((u / (width - 1) * 2 - 1, v / (height - 1) * 2 - 1), -1)[None, None]

        def look(layers: Tensor, mode: str = "bilinear") -> Tensor:  # [C, H, W] -> [C, M]
            layers = layers.to(self.dtype)[None]
            return F.grid_sample(layers, grid, mode=mode, align_corners=not exact)[0, :, 0]

        *colour, dynamic = look(torch.cat((self.images[frame], self.masks[frame][None])))
        colour, depth = torch.stack(colour), self.depth[frame]
        if not exact:
            return _Sampled(look(depth[None], "nearest")[0], colour, dynamic > 0.5, None)
        layers = [depth]
        for axis in (1, 0):  # by u, by v
            one_sided = depth.shape[axis] > 1
            layers.append(torch.gradient(depth, dim=axis)[0] if one_sided else torch.zeros_like(depth))
        value, *slope = look(torch.stack(layers))
        return _Sampled(value, colour, dynamic > 0.5, torch.stack(slope))

    def gradient(self, frame: int, camera: Tensor, u: Tensor, v: Tensor, slope: Tensor) -> Tensor:  # -> [M, 3]
        """Gradient of z - D(u, v) with respect to a point; by the camera's axes, which does not change its length."""
        k, z = self.intrinsics[frame], camera @ self.intrinsics[frame, 2]
        of_u = (k[0] - u[:, None] * k[2]) / z[:, None]
        of_v = (k[1] - v[:, None] * k[2]) / z[:, None]
        return k[2] - slope[0, :, None] * of_u - slope[1, :, None] * of_v


def _others(frame: int, frames: int, views: int | None) -> list[int]:
    others = [i for i in range(frames) if i != frame]
    if views is None or views >= len(others):
        return others
    return [others[int(n)] for n in np.linspace(0, len(others) - 1, views).round()]


def _smooth(mask: Tensor) -> Tensor:  # [H, W]
    """Closed with a 5 x 5 ellipse, then dilated with a 3 x 3 square; what is outside the image has no say."""
    try:
        from scipy.ndimage import binary_dilation, binary_erosion
    except ImportError:
        raise ImportError("Closing masks needs scipy: pip install 'gate4d[methods]'.") from None
    closed = binary_erosion(binary_dilation(mask.cpu().numpy(), _ELLIPSE), _ELLIPSE, border_value=1)
    return torch.from_numpy(binary_dilation(closed, np.ones((3, 3), dtype=bool))).to(mask.device)


def _check(masks: Tensor, images: Tensor, depth: Tensor, intrinsics: Tensor, poses: Tensor, form: str, views) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {list(FORMS)}, got {form!r}.")
    if views is not None and (not isinstance(views, int) or views < 1):
        raise ValueError(f"views must be None or an int >= 1, got {views!r}.")
    if masks.dim() != 3 or masks.dtype != torch.bool or not masks.numel():
        raise ValueError(f"masks must be bool [T, H, W], got {masks.dtype} {list(masks.shape)}.")
    frames, height, width = masks.shape
    for name, x, wanted in (
        ("images", images, [(frames, 3, height, width)]),
        ("depth", depth, [(frames, height, width)]),
        ("intrinsics", intrinsics, [(frames, 3, 3), (3, 3)]),
        ("poses", poses, [(frames, 4, 4)]),
    ):
        if tuple(x.shape) not in wanted or not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating point {list(wanted[0])} to fit the masks, got {x.dtype} {list(x.shape)}."
            )
        if not all(bool(torch.isfinite(part).all()) for part in x):
            raise ValueError(f"{name} must be finite, got NaN or infinities.")
