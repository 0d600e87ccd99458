"""Metrics of one clip, in float64 numpy; arguments are arrays, or tensors on the CPU.

Poses are camera-to-world ``[T, 4, 4]`` in OpenCV axes. Lengths come out in the unit of the true poses.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_FLAT = 1e-9  # a spread below this share of the coordinates is rounding


class Similarity(NamedTuple):
    """``x -> scale * rotation @ x + translation``."""

    scale: float
    rotation: Array  # [3, 3]
    translation: Array  # [3]

    def points(self, x: ArrayLike) -> Array:
        """Points ``[..., 3]`` moved."""
        return self.scale * np.asarray(x, np.float64) @ self.rotation.T + self.translation

    def poses(self, poses: ArrayLike) -> Array:
        """Camera-to-world ``[..., 4, 4]`` moved; they stay rigid."""
        moved = np.array(poses, np.float64)
        moved[..., :3, :3] = self.rotation @ moved[..., :3, :3]
        moved[..., :3, 3] = self.points(moved[..., :3, 3])
        return moved


class CameraErrors(NamedTuple):
    """Root mean squares over a clip, after the alignment of its camera centres."""

    ate: float  # distance of the camera centres, in the unit of the true poses
    rpe_translation: float  # of the relative poses of neighbouring frames, same unit
    rpe_rotation: float  # same, degrees


class DepthErrors(NamedTuple):
    """Means over the valid pixels of a clip."""

    abs_rel: float  # |predicted - true| / true
    delta: float  # share of pixels with max(predicted / true, true / predicted) < 1.25
    scale: float  # that the prediction was multiplied with


def similarity(source: ArrayLike, target: ArrayLike, *, with_scale: bool = True) -> Similarity:
    """The similarity of least squared distance from ``source [N, 3]`` to ``target [N, 3]``.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991, equations
    40 to 42; no reflections. Where the points do not determine it (fewer than three, all on a line) one of the best is
    returned, and a source that is a single point keeps its scale of 1.

    Raises:
        ValueError: the shapes are not equal and ``[N, 3]`` with N >= 1, or a coordinate is not finite.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3 or not len(source):
        raise ValueError(f"source and target must be [N, 3] alike, N >= 1, got {source.shape} and {target.shape}.")
    for name, x in (("source", source), ("target", target)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got {int((~np.isfinite(x)).sum())} coordinates that are not.")
    center_s, center_t = source.mean(0), target.mean(0)
    s, t = source - center_s, target - center_t
    u, d, vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u * sign @ vt
    spread = (s**2).sum(1).mean()
    known = with_scale and spread > (_FLAT * np.abs(source).max()) ** 2
    scale = float((d * sign).sum() / spread) if known else 1.0
    return Similarity(scale, rotation, center_t - scale * rotation @ center_s)


def camera_errors(predicted: ArrayLike, true: ArrayLike, *, step: int = 1) -> CameraErrors:
    """ATE and relative pose errors after a Sim(3) alignment of the camera centres.

    A true camera that stands still makes every scale as good as 0: then ATE and the translation error are 0 whatever
    was predicted, and say nothing. Leave such clips out of their means.

    Args:
        predicted, true: camera-to-world ``[T, 4, 4]``.
        step: frames between the two poses of a relative one.

    Raises:
        ValueError: the shapes are not equal and ``[T, 4, 4]`` with T > step, or a pose is not finite.
    """
    predicted, true = _poses(predicted, true, step)
    aligned = similarity(predicted[:, :3, 3], true[:, :3, 3]).poses(predicted)
    distance = ((aligned[:, :3, 3] - true[:, :3, 3]) ** 2).sum(1)
    translation, rotation = relative_pose_errors(aligned, true, step=step)
    return CameraErrors(_rms(distance), _rms(translation**2), _rms(rotation**2))


def relative_pose_errors(predicted: ArrayLike, true: ArrayLike, *, step: int = 1) -> tuple[Array, Array]:
    """Errors ``[T - step]`` of the poses relative to the one ``step`` frames before: distance and degrees.

    ``E_i = (Q_i^-1 Q_{i+step})^-1 (P_i^-1 P_{i+step})`` for true Q and predicted P (Sturm et al., "A benchmark for the
    evaluation of RGB-D SLAM systems", IROS 2012, equation 1). Nothing is aligned here.

    Raises:
        ValueError: as :func:`camera_errors`.
    """
    predicted, true = _poses(predicted, true, step)
    p, q = (_inverse(x[:-step]) @ x[step:] for x in (predicted, true))
    error = _inverse(q) @ p
    rotation = error[:, :3, :3]
    # The angle from sine and cosine: the arc cosine alone loses half of the digits near 0.
    sine = np.stack([rotation[:, i, j] - rotation[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], 1)
    cosine = np.trace(rotation, axis1=1, axis2=2) - 1
    return np.linalg.norm(error[:, :3, 3], axis=1), np.degrees(np.arctan2(np.linalg.norm(sine, axis=1), cosine))


def depth_errors(
    predicted: ArrayLike,
    true: ArrayLike,
    *,
    valid: ArrayLike | None = None,
    align: Literal["median", "scale", "none"] = "median",
) -> DepthErrors:
    """AbsRel and delta < 1.25 of a clip's depth, after one scaling for the whole clip.

    Args:
        predicted, true: any shape, alike; pixels without a finite true depth > 0 do not count.
        valid: bool, alike: pixels that count.
        align: ``"median"``: times the ratio of the medians; ``"scale"``: times the factor of least squared error;
            ``"none"``.

    Raises:
        ValueError: the shapes differ, no pixel counts, or a prediction that counts is not finite.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    chosen = np.isfinite(true) & (true > 0)
    if valid is not None:
        chosen &= np.asarray(valid, bool)
    if predicted.shape != true.shape:
        raise ValueError(f"predicted and true must be alike, got {predicted.shape} and {true.shape}.")
    if not chosen.any():
        raise ValueError("true must have a valid pixel, got none.")
    predicted, true = predicted[chosen], true[chosen]
    if not np.isfinite(predicted).all():
        raise ValueError(f"predicted must be finite, got {int((~np.isfinite(predicted)).sum())} depths that are not.")
    if align == "median":
        factor = np.median(true) / np.median(predicted)
    elif align == "scale":
        factor = (predicted * true).sum() / (predicted**2).sum()
    elif align == "none":
        factor = 1.0
    else:
        raise ValueError(f"align must be 'median', 'scale' or 'none', got {align!r}.")
    scaled = predicted * factor
    with np.errstate(divide="ignore"):
        ratio = np.where(scaled > 0, np.maximum(scaled / true, true / scaled), np.inf)
    return DepthErrors(float((np.abs(scaled - true) / true).mean()), float((ratio < 1.25).mean()), float(factor))


def mask_counts(predicted: ArrayLike, true: ArrayLike) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks: add them up over clips for the IoU of a set.

    Raises:
        ValueError: the shapes differ.
        TypeError: a mask is not bool.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    for name, mask in (("predicted", predicted), ("true", true)):
        if mask.dtype != np.bool_:
            raise TypeError(f"{name} must be a bool mask, got {mask.dtype}.")
    if predicted.shape != true.shape:
        raise ValueError(f"predicted and true must be alike, got {predicted.shape} and {true.shape}.")
    return int((predicted & true).sum()), int((predicted | true).sum())


def mask_iou(predicted: ArrayLike, true: ArrayLike) -> float:
    """Intersection over union of all pixels; 1 where both masks are empty. Errors as :func:`mask_counts`."""
    inter, union = mask_counts(predicted, true)
    return inter / union if union else 1.0


def _poses(predicted: ArrayLike, true: ArrayLike, step: int) -> tuple[Array, Array]:
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an int >= 1, got {step!r}.")
    if predicted.shape != true.shape or true.ndim != 3 or true.shape[1:] != (4, 4) or len(true) <= step:
        shapes = f"{predicted.shape} and {true.shape}"
        raise ValueError(f"predicted and true must be poses [T, 4, 4] alike, T > {step}, got {shapes}.")
    for name, x in (("predicted", predicted), ("true", true)):
        if not np.isfinite(x).all():
            raise ValueError(
                f"{name} must hold finite poses, frame {int(np.argwhere(~np.isfinite(x))[0, 0])} does not."
            )
    return predicted, true


def _inverse(poses: Array) -> Array:
    inverse = np.zeros_like(poses)
    inverse[..., :3, :3] = np.swapaxes(poses[..., :3, :3], -1, -2)
    inverse[..., :3, 3] = -(inverse[..., :3, :3] * poses[..., None, :3, 3]).sum(-1)
    inverse[..., 3, 3] = 1
    return inverse


def _rms(squares: Array) -> float:
    return float(np.sqrt(squares.mean()))
