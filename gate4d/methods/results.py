"""What a method found on a clip, in one form whatever the method and the model: masks, scores, poses, points.

Results hold predictions in the form of the model. Read are: ``pose_enc`` (VGGT's encoding, see
:mod:`gate4d.geometry`) and ``camera_pose`` (the same with 9 numbers; with 7 numbers CUT3R's: camera to world,
translation, then a quaternion with the scalar first), ``world_points``, ``pts3d_in_other_view``, ``depth`` and their
confidences ``world_points_conf``, ``conf``, ``depth_conf``, and, where the method has no masks of its own, ``motion``
(logits, > 0 = moving). What is missing is left out.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import export
from .rollout import grid_of
from .segmentation import DynamicMasks, adaptive_threshold

MAX_POINTS = 1_000_000


class Outputs(NamedTuple):
    """Of a clip of T frames; None where the method or the model has no such thing.

    Attributes:
        scores: named tensors, as the method has them.
        heat: fp32 ``[T, H, W]`` in [0, 1], how much a pixel moves.
        masks: bool ``[T, H, W]``, True = moving.
        poses: fp64 ``[T, 4, 4]``, camera to world.
        points: fp32 ``[T, H, W, 3]``, in the world of the poses.
        confidence: fp32 ``[T, H, W]`` of the points.
    """

    scores: dict[str, Tensor]
    heat: Tensor | None = None
    masks: Tensor | None = None
    poses: Tensor | None = None
    points: Tensor | None = None
    confidence: Tensor | None = None

    def save(self, folder: str | Path, frames: Tensor, *, confident: float = 0.5) -> list[Path]:
        """Write all there is: ``masks/``, ``overlays/``, ``scores.npz``, ``poses.txt`` (TUM), ``points.ply``.

        Args:
            folder: exists.
            frames: uint8 ``[T, H, W, 3]``.
            confident: share of the points that is kept, the most confident; pixels that move are left out, and of
                more than a million points a regular sample is kept.

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
            written.append(export.save_tum(folder / "poses.txt", self.poses))
        if self.points is not None:
            keep = self.points.isfinite().all(-1)
            if self.masks is not None and not self.masks.all():
                keep &= ~self.masks
            if self.confidence is not None and keep.any():
                order = self.confidence[keep].float().sort().values
                keep &= self.confidence >= order[min(len(order) - 1, int(len(order) * (1 - confident)))]
            points, colours = self.points[keep], frames[keep]
            step = -(-len(points) // MAX_POINTS) or 1
            written.append(export.save_ply(folder / "points.ply", points[::step], colours[::step]))
        return written


@torch.no_grad()
def collect(result: Any, size: tuple[int, int]) -> Outputs:
    """The :class:`Outputs` of what a method's ``run`` returned for a clip of frames of ``size`` (height, width).

    Of a batch, the first item. A method without masks but with motion scores (MUT3R) gets masks by the adaptive
    threshold of :mod:`~gate4d.methods.segmentation`; where all scores are the same there is none, and the masks are
    empty.
    A warning says so wherever nothing, or everything, moves.

    Raises:
        ValueError: the frames are not of that size, or not of one.
        ImportError: scikit-image is missing (MUT3R).
    """
    masks, motion = getattr(result, "masks", None), getattr(result, "motion", None)
    predictions, scores, heat = _frames(result.predictions), {}, None
    if isinstance(masks, DynamicMasks):
        scores = {"motion": masks.patch_scores, "heat": masks.scores}
        refined, heat = getattr(result, "refined_masks", None), masks.scores.float().cpu()
        masks = (masks.masks if refined is None else refined).cpu()
    elif isinstance(motion, Tensor):  # [T, B, patches]
        scores = {"motion": motion[:, 0]}
        patches = motion[:, :1].float().cpu().unflatten(2, grid_of(motion.shape[2], size))
        heat = F.interpolate(patches, size=size, mode="bilinear")[:, 0]
        masks = _thresholded(heat)
    elif (logits := _stacked(predictions, ("motion",), 2)) is not None:
        if logits.shape[1:] != size:
            raise ValueError(f"result must be of a clip of frames of the size {size}, got {tuple(logits.shape[1:])}.")
        masks = logits > 0
        if masks.all() or not masks.any():
            what = "every pixel moves: the masks are full" if masks.all() else "nothing moves: the masks are empty"
            warnings.warn(f"by the model's motion output {what}.", stacklevel=2)
    if isinstance(getattr(result, "rates", None), Tensor):
        scores["rate"] = result.rates[:, 0]
    cameras = getattr(result, "cameras", None)
    if cameras is not None:
        scores |= {"cameras": cameras[0], "refined": result.refined}
    encoding = cameras[0] if cameras is not None else _stacked(predictions, ("pose_enc", "camera_pose"), 1)
    poses, points, confidence = _geometry(predictions, encoding, size)
    return Outputs(scores, heat, masks, poses, points, confidence)


def _thresholded(heat: Tensor) -> Tensor:
    found = adaptive_threshold(heat)
    if found is None:
        warnings.warn("the motion scores are the same everywhere: the masks are empty.", stacklevel=3)
        return torch.zeros_like(heat, dtype=torch.bool)
    return heat > found[0]


def _frames(predictions: Any) -> list[dict[str, Any]]:
    """One dict a frame; tensors ``[B, ...]`` or ``[B, 1, ...]``."""
    if isinstance(predictions, dict):
        clip = {n: x for n, x in predictions.items() if isinstance(x, Tensor) and x.dim() > 2}
        return [
            {n: x[:, t] for n, x in clip.items()} for t in range(min((x.shape[1] for x in clip.values()), default=0))
        ]
    frames = [p.ress[0] if hasattr(p, "ress") else p for p in predictions]  # StreamVGGT
    return [p if isinstance(p, dict) else {} for p in frames]


def _stacked(predictions: list[dict[str, Any]], names: tuple[str, ...], dims: int) -> Tensor | None:
    """``[T, ...]`` with ``dims`` axes after the first, of the first name that all frames have with so many."""
    for name in names:
        found = [p[name][0] for p in predictions if isinstance(p.get(name), Tensor)]
        found = [x[0] if x.dim() == dims + 1 else x for x in found]
        if len({x.shape for x in found}) > 1:
            sizes = sorted({tuple(x.shape) for x in found})
            raise ValueError(f"result must be of a clip whose frames all have the size of the first, got {sizes}.")
        if found and len(found) == len(predictions) and found[0].dim() == dims:
            return torch.stack(found).float().cpu()
    return None


def _geometry(
    predictions: list[dict[str, Any]], encoding: Tensor | None, size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Poses, points and their confidence."""
    from ..geometry import decode_pose, invert, quaternion_to_matrix, unproject

    poses = cameras = None
    if encoding is not None and encoding.shape[-1] == 9:
        cameras = decode_pose(encoding.double().cpu(), *size)
        poses = invert(cameras[0])
    elif encoding is not None and encoding.shape[-1] == 7:
        pose = encoding.double().cpu()
        poses = torch.eye(4, dtype=torch.float64).repeat(len(pose), 1, 1)
        poses[:, :3, :3] = quaternion_to_matrix(pose[:, [4, 5, 6, 3]])
        poses[:, :3, 3] = pose[:, :3]
    points = _stacked(predictions, ("world_points", "pts3d_in_other_view"), 3)
    names = ("world_points_conf", "conf")
    if points is None and cameras is not None:
        depth, names = _stacked(predictions, ("depth",), 3), ("depth_conf",)
        if depth is not None and depth.shape[1:3] == size:
            points = unproject(depth[..., 0].double(), *cameras).float()
    if points is None or points.shape[1:] != (*size, 3):
        return poses, None, None
    confidence = _stacked(predictions, names, 2)
    return poses, points, confidence if confidence is not None and confidence.shape[1:] == size else None
