"""What a method found on a clip, in one form whatever the method and the model: masks, scores, poses, points.

Results hold predictions in the form of the model. Read are the cameras ``pose_enc`` and ``camera_pose`` (see
:mod:`gate4d.methods.cameras`), ``depth``, ``pts3d_in_self_view``, ``world_points``, ``pts3d_in_other_view``, their
confidences ``depth_conf``, ``conf_self``, ``world_points_conf``, ``conf``, and, where the method has no masks of its
own, ``motion`` (logits, > 0 = moving). What is missing is left out.

**Points.** A method's cameras may be others than those that the model had in mind when it said where points are in the
world. So points are made of what is said in a frame's own camera, depth or ``pts3d_in_self_view``, and of the method's
camera and field of view. Only a model that gives neither has its world points taken, and they are moved where the
method moved the camera.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import decode_pose, invert
from . import export
from .cameras import CAMERAS, camera_poses, moved_points, predicted_camera
from .clips import grid_of
from .method import ClipMethod, ClipResult
from .segmentation import adaptive_threshold

MAX_POINTS = 1_000_000
# Where points are said, in the order of preference: entry, whether it needs a camera, its last axis, its confidence.
_SOURCES = (
    ("depth", True, 1, ("depth_conf",)),
    ("pts3d_in_self_view", True, 3, ("conf_self",)),
    ("world_points", False, 3, ("world_points_conf", "conf")),
    ("pts3d_in_other_view", False, 3, ("conf",)),
)


class Outputs(NamedTuple):
    """Of a clip of T frames; None where the method or the model has no such thing.

    Attributes:
        scores: named tensors, as the method has them.
        heat: fp32 ``[T, H, W]`` in [0, 1], how much a pixel moves.
        masks: bool ``[T, H, W]``, True = moving.
        poses: fp64 ``[T, 4, 4]``, camera to world.
        points: fp32 ``[T, H, W, 3]``, in the world of the poses; ``[T, n, 3]`` where only some pixels were kept.
        confidence: fp32 ``[T, H, W]`` or ``[T, n]``, of the points.
        pixels: int64 ``[T, n]``, which pixels of each frame (row by row) the points are of; None for all.
    """

    scores: dict[str, Tensor]
    heat: Tensor | None = None
    masks: Tensor | None = None
    poses: Tensor | None = None
    points: Tensor | None = None
    confidence: Tensor | None = None
    pixels: Tensor | None = None

    def save(
        self, folder: str | Path, frames: Tensor, *, confident: float = 0.5, times: Sequence[float] | None = None
    ) -> list[Path]:
        """Write all there is: ``masks/``, ``overlays/``, ``scores.npz``, ``poses.txt`` (TUM), ``points.ply``.

        Args:
            folder: exists.
            frames: uint8 ``[T, H, W, 3]``.
            confident: share of the points that is kept, the most confident; pixels that move are left out, and of
                more than a million points a regular sample is kept.
            times: seconds of the frames, for ``poses.txt``; their numbers if None.

        Returns:
            Files and folders written.

        Raises:
            ImportError: pillow is missing.
        """
        folder, written = Path(folder), []
        if self.masks is not None:
            export.save_masks(folder / "masks", self.masks)
            export.save_overlays(folder / "overlays", frames, self.masks.float() if self.heat is None else self.heat)
            written += [folder / "masks", folder / "overlays"]
        if self.scores:
            written.append(export.save_scores(folder / "scores.npz", self.scores))
        if self.poses is not None:
            written.append(export.save_tum(folder / "poses.txt", self.poses, times))
        if self.points is not None:
            keep = self.points.isfinite().all(-1)
            if self.masks is not None and not self.masks.all():
                keep &= ~self._at(self.masks)
            if self.confidence is not None and keep.any():
                order = self.confidence[keep].float().sort().values
                keep &= self.confidence >= order[min(len(order) - 1, int(len(order) * (1 - confident)))]
            points, colours = self.points[keep], self._at(frames)[keep]
            step = -(-len(points) // MAX_POINTS) or 1
            written.append(export.save_ply(folder / "points.ply", points[::step], colours[::step]))
        return written

    def _at(self, x: Tensor) -> Tensor:
        """Of ``[T, H, W, ...]``, what the points are of."""
        return x if self.pixels is None else x.flatten(1, 2)[torch.arange(len(x))[:, None], self.pixels]


@torch.no_grad()
def collect(result: ClipResult, size: tuple[int, int]) -> Outputs:
    """The :class:`Outputs` of what a method's ``run`` returned for a clip of frames of ``size`` (height, width).

    Of a batch, the first item. A method without masks but with motion scores (MUT3R) gets masks by the adaptive
    threshold of :mod:`~gate4d.methods.segmentation`, which is at least 1/2; where all scores are the same there is
    none, and the masks are empty. A warning says so wherever nothing, or everything, moves, and where cameras or points
    are left out because they are not finite.

    Raises:
        ValueError: the frames are not of that size, or not of one.
        ImportError: scikit-image is missing (MUT3R).
    """
    collector = Collector(size, cameras=result.cameras is not None)
    for prediction in result.by_frame():
        collector.add(prediction)
    return collector.finish(result)


def run_and_collect(method: ClipMethod, frames: Any, size: tuple[int, int], count: int) -> Outputs:
    """What :func:`collect` makes of ``method.run(frames)``; of a method that streams, frame by frame.

    Args:
        method: ``handle.method`` of a patched model.
        frames: as the method's ``run`` takes them, ``count`` of ``size``; methods that stream read them one by one.

    Raises:
        ValueError, TypeError, ImportError: as the method's ``run`` and :func:`collect`.
    """
    collector = Collector(size, count if method.streams else None, cameras=method.has_cameras)
    return collector.finish(method.feed(frames, collector.add))


class Collector:
    """Makes the :class:`Outputs` of a stream frame by frame, so that its predictions need not be kept.

    Its memory grows with the frames by a pixel's mask (one byte) and little else: of the points, every n-th pixel is
    kept so that there are at most ``points`` of them.

    Args:
        size: height and width of the frames.
        frames: how many will come; without it every pixel's point is kept.
        points: most points that are kept, of moving and uncertain pixels too.
        cameras: whether the method will bring cameras (``result.cameras``) of its own.
    """

    def __init__(
        self, size: tuple[int, int], frames: int | None = None, *, points: int = 4 * MAX_POINTS, cameras: bool = False
    ):
        self.size, self.cameras = tuple(size), cameras
        height, width = self.size
        self.step = 1 if frames is None else max(1, -(-frames * height * width // points))
        self.names: dict[str, tuple[int, ...]] = {}  # shapes of what was read of the first frame
        self.count = 0
        self.encodings: list[Tensor] = []  # [7 or 9]
        self.kinds: list[str] = []  # where the points of the frames come from
        self.said: list[Tensor] = []  # [n] or [n, 3]
        self.confidence: list[Tensor] = []  # [n]
        self.masks: list[Tensor] = []  # [H, W] bool

    @torch.no_grad()
    def add(self, prediction: Any) -> None:
        """The next frame's prediction: entries ``[B, ...]`` or ``[B, 1, ...]``.

        Raises:
            ValueError: the frame has another size than the first, or than the clip.
        """
        prediction = prediction.ress[0] if hasattr(prediction, "ress") else prediction  # StreamVGGT
        prediction = prediction if isinstance(prediction, dict) else {}
        number, self.count = self.count, self.count + 1
        camera = predicted_camera(prediction)
        if camera is not None:
            self.encodings.append(camera[0].double().cpu())
        if (logits := self._item(prediction, "motion", 2)) is not None:
            if logits.shape != self.size:
                raise ValueError(f"result must be of a clip of frames of the size {self.size}, got {_shape(logits)}.")
            self.masks.append((logits > 0).cpu())
        for name, of_camera, channels, doubts in _SOURCES:
            found = self._item(prediction, name, 3)
            has_camera = camera is not None or self.cameras
            if found is None or found.shape != (*self.size, channels) or (of_camera and not has_camera):
                continue
            if name == "depth" and not self.cameras and camera.shape[-1] != 9:
                continue  # nobody knows the field of view
            self.kinds.append(name)
            self.said.append(self._sampled(found.flatten(0, 1).squeeze(-1), number))
            sure = next((x for n in doubts if (x := self._item(prediction, n, 2)) is not None), None)
            if sure is not None and sure.shape == self.size:
                self.confidence.append(self._sampled(sure.flatten(), number))
            return

    def finish(self, result: ClipResult) -> Outputs:
        """All outputs, with what the method's ``result`` says beside its predictions."""
        scores, heat, masks = {}, None, None
        if result.masks is not None:
            scores = {"motion": result.masks.patch_scores, "heat": result.masks.scores}
            heat = result.masks.scores.float().cpu()
            masks = (result.masks.masks if result.refined_masks is None else result.refined_masks).cpu()
        elif result.motion_scores is not None:
            scores = {"motion": result.motion_scores[:, 0]}
            patches = result.motion_scores[:, :1].float().cpu()
            patches = patches.unflatten(2, grid_of(patches.shape[2], self.size))
            heat = F.interpolate(patches, size=self.size, mode="bilinear")[:, 0]
            masks = _thresholded(heat)
        elif self.masks and len(self.masks) == self.count:
            masks = torch.stack(self.masks)
            if masks.all() or not masks.any():
                what = "every pixel moves: the masks are full" if masks.all() else "nothing moves: the masks are empty"
                warnings.warn(f"by the model's motion output {what}.", stacklevel=2)
        if result.rates is not None:
            scores["rate"] = result.rates[:, 0]
        cameras = result.cameras
        if cameras is not None:
            scores |= {"cameras": cameras[0], "refined": result.refined}
        own = torch.stack(self.encodings) if self.encodings and len(self.encodings) == self.count else None
        encodings = own if cameras is None else cameras[0].double().cpu()
        first = _first_cameras(result)
        poses, points, pixels = self._geometry(encodings, own if first is None else first)
        confidence = None
        if points is not None and len(self.confidence) == self.count:
            confidence = torch.stack(self.confidence)
            confidence = confidence.unflatten(1, self.size) if pixels is None else confidence
        return Outputs(scores, heat, masks, poses, points, confidence, pixels)

    def _geometry(
        self, encodings: Tensor | None, own: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Poses, points, and which pixels these are of; ``own`` are the cameras that world points were said with."""
        poses = None
        if encodings is not None and encodings.shape[-1] in (7, 9):
            poses = camera_poses(encodings)
            if not poses.isfinite().all() or not (poses[:, :3, :3].det() > 0.5).all():
                warnings.warn("the cameras are left out: they are not finite poses.", stacklevel=3)
                return None, None, None
        kind = self.kinds[0] if self.kinds and len(self.kinds) == self.count and len(set(self.kinds)) == 1 else None
        if kind is None:
            return poses, None, None
        pixels = torch.stack([self._pixels(n) for n in range(self.count)])
        if kind == "depth":
            if poses is None or encodings.shape[-1] != 9:
                return poses, None, None
            intrinsics = decode_pose(encodings, *self.size)[1]
            if not intrinsics.isfinite().all():
                warnings.warn("the points are left out: fields of view of 0 make intrinsics infinite.", stacklevel=3)
                return poses, None, None
            rays = [_rays(p, k, self.size[1]) for p, k in zip(pixels, intrinsics, strict=True)]
            inside = [ray * depth[:, None] for ray, depth in zip(rays, self.said, strict=True)]
            points = [moved_points(x[None], pose[None])[0].float() for x, pose in zip(inside, poses, strict=True)]
        elif kind == "pts3d_in_self_view":
            if poses is None:
                return poses, None, None
            points = [moved_points(x[None], pose[None])[0] for x, pose in zip(self.said, poses, strict=True)]
        else:
            points = self.said
            if poses is not None and own is not None and not torch.equal(own, encodings):
                bases = poses @ invert(camera_poses(own))
                points = [moved_points(x[None], base[None])[0] for x, base in zip(points, bases, strict=True)]
        stacked = torch.stack(points)
        return (poses, stacked, pixels) if self.step > 1 else (poses, stacked.unflatten(1, self.size), None)

    def _pixels(self, number: int) -> Tensor:
        """Which pixels of a frame are kept, row by row; the offset changes so that no column is left out always."""
        area = self.size[0] * self.size[1]
        return torch.arange(area // self.step) * self.step + number % self.step

    def _sampled(self, x: Tensor, number: int) -> Tensor:
        """Of ``[H * W, ...]``, the kept pixels, fp32, without the memory of the others."""
        x = x.float() if self.step == 1 else x[self._pixels(number).to(x.device)].float()
        return x.cpu().clone() if x.untyped_storage().nbytes() > x.nbytes else x.cpu()

    def _item(self, prediction: dict[str, Any], name: str, dims: int) -> Tensor | None:
        """The first item's entry with ``dims`` axes, of the shape that it had in the first frame."""
        x = prediction.get(name)
        if not isinstance(x, Tensor):
            return None
        x = x[0, 0] if x.dim() == dims + 2 else x[0]
        if x.dim() != dims:
            return None
        if self.names.setdefault(name, tuple(x.shape)) != tuple(x.shape):
            sizes = sorted({self.names[name], tuple(x.shape)})
            raise ValueError(f"result must be of a clip whose frames all have the size of the first, got {sizes}.")
        return x


def _rays(pixels: Tensor, intrinsics: Tensor, width: int) -> Tensor:
    """Points ``[n, 3]`` at depth 1 of pixels ``[n]``, in the intrinsics' dtype."""
    u, v = pixels % width + 0.5, pixels // width + 0.5
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    return torch.stack((x, y, torch.ones_like(x)), dim=-1)


def _first_cameras(result: ClipResult) -> Tensor | None:
    """Encodings ``[T, 7 or 9]`` of the pass whose depth and points a result holds, where its cameras are of another."""
    first = result.first_cameras or {}
    found = next((first[n] for n in CAMERAS if isinstance(first.get(n), Tensor)), None)
    return None if found is None else found[0].double().cpu()


def _thresholded(heat: Tensor) -> Tensor:
    found = adaptive_threshold(heat)
    if found is None:
        warnings.warn("the motion scores are the same everywhere: the masks are empty.", stacklevel=3)
        return torch.zeros_like(heat, dtype=torch.bool)
    masks = heat > max(found[0], 0.5)
    if not masks.any():
        warnings.warn("no motion score is above 1/2: the masks are empty.", stacklevel=3)
    return masks


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
