"""Metrics of one clip, in float64 numpy; arguments are arrays, or tensors on the CPU.

Poses are camera-to-world ``[T, 4, 4]`` in OpenCV axes. Lengths come out in the unit of the true poses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Alignment = Literal["median", "scale", "scale_and_shift", "least_squares", "metric", "none"]
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
    shift: float = 0.0  # that was added to it then
    pixels: int = 0  # valid ones


class MaskScores(NamedTuple):
    """Motion masks of several clips; each field is how somebody averages their IoU."""

    pixels: float  # of all pixels of all clips together
    frames: float  # of each frame, mean over the frames of all clips: Easi3R's JM
    sequences: float  # of each frame, mean over a clip's frames and then over the clips: VGGT4D's and DAVIS' JM
    recall: float  # share of a clip's frames with an IoU above 0.5, mean over the clips: JR


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
    align: Alignment = "median",
    max_depth: float | None = None,
    clip_max: float | None = None,
) -> DepthErrors:
    """AbsRel and delta < 1.25 of a clip's depth, after one alignment for the whole clip.

    The protocol of the field for Sintel is ``max_depth=70, clip_max=70``, for Bonn ``max_depth=70``, for KITTI neither,
    each with ``"scale"``, ``"scale_and_shift"`` or ``"metric"`` (CUT3R's evaluation, which is MonST3R's; StreamVGGT's,
    TTT3R's and MoRe's follow it). Averages over clips are weighted by pixels: :func:`mean_depth_errors`.

    Args:
        predicted, true: any shape, alike; pixels without a finite true depth > 0 do not count.
        valid: bool, alike: pixels that count.
        align: ``"median"``: times the ratio of the medians, of the lower one where there are two; ``"scale"``: times a
            factor of small absolute error, by ten reweighted (Weiszfeld) steps from the ratio of the means, at least
            0.001; ``"scale_and_shift"``: a factor and an offset by 1000 steps of Adam for the absolute error, from the
            ratio of the medians and 0. A step moves each by about 0.0001, so that both stay near where they began: the
            field's figures are of that. ``"least_squares"``: times the factor of least squared error; ``"metric"`` or
            ``"none"``: as it is.
        max_depth: pixels with at least this true depth do not count.
        clip_max: what larger predictions are set to, after the alignment.

    Raises:
        ValueError: the shapes differ, no pixel counts, a prediction that counts is not finite, or a limit is not > 0.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    for name, limit in (("max_depth", max_depth), ("clip_max", clip_max)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be None or > 0, got {limit!r}.")
    chosen = np.isfinite(true) & (true > 0)
    if max_depth is not None:
        chosen &= true < max_depth
    if valid is not None:
        chosen &= np.asarray(valid, bool)
    if predicted.shape != true.shape:
        raise ValueError(f"predicted and true must be alike, got {predicted.shape} and {true.shape}.")
    if not chosen.any():
        raise ValueError("true must have a valid pixel, got none.")
    predicted, true = predicted[chosen], true[chosen]
    if not np.isfinite(predicted).all():
        raise ValueError(f"predicted must be finite, got {int((~np.isfinite(predicted)).sum())} depths that are not.")
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be one of {list(_ALIGNMENTS)}, got {align!r}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        factor, shift = _ALIGNMENTS[align](predicted, true)
    if not (np.isfinite(factor) and np.isfinite(shift)):
        raise ValueError(f"predicted can't be aligned by {align!r}: its depths give a factor of {factor}.")
    scaled = predicted * factor + shift
    if clip_max is not None:
        scaled = np.minimum(scaled, clip_max)
    with np.errstate(divide="ignore"):
        ratio = np.where(scaled > 0, np.maximum(scaled / true, true / scaled), np.inf)
    relative = float((np.abs(scaled - true) / true).mean())
    return DepthErrors(relative, float((ratio < 1.25).mean()), float(factor), float(shift), len(true))


def mean_depth_errors(errors: Sequence[DepthErrors]) -> DepthErrors:
    """Mean of AbsRel and delta over clips, weighted by their valid pixels; scale and shift of several are NaN.

    Raises:
        ValueError: there is no clip, or none has a pixel.
    """
    pixels = np.array([e.pixels for e in errors])
    if not pixels.sum():
        raise ValueError(f"errors must be of clips with valid pixels, got {len(errors)} clips without.")
    abs_rel, delta = (float((pixels * [getattr(e, n) for e in errors]).sum() / pixels.sum()) for n in _DEPTH_MEANS)
    scale, shift = errors[0][2:4] if len(errors) == 1 else (np.nan, np.nan)
    return DepthErrors(abs_rel, delta, scale, shift, int(pixels.sum()))


def _median(x: Array) -> float:
    return float(np.partition(x, (len(x) - 1) // 2)[(len(x) - 1) // 2])


def _by_median(predicted: Array, true: Array) -> tuple[float, float]:
    return _median(true) / np.float64(_median(predicted)), 0.0


def _by_weiszfeld(predicted: Array, true: Array) -> tuple[float, float]:
    """Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnes est minimum", 1937: each step is a
    least squares one whose weights are the inverse of the last distances."""
    factor = true.mean() / predicted.mean()
    for _ in range(10):
        weight = 1 / (np.abs(factor * predicted - true) + 1e-8)
        factor = (weight * predicted * true).sum() / (weight * predicted**2).sum()
    return max(float(factor), 1e-3), 0.0


def _by_adam(predicted: Array, true: Array) -> tuple[float, float]:
    """Kingma and Ba, "Adam", 2015, algorithm 1, with a step of 1e-4 and its other settings as published."""
    x = np.array([_by_median(predicted, true)[0], 0.0])
    mean, square, last = np.zeros(2), np.zeros(2), np.inf
    for step in range(1, 1001):
        residual = x[0] * predicted + x[1] - true
        sign = np.sign(residual)
        gradient = np.array([(sign * predicted).sum(), sign.sum()])
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        x = x - 1e-4 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        loss = np.abs(residual).sum()
        if abs(last - loss) < 1e-6:
            break
        last = loss
    return float(x[0]), float(x[1])


def _by_least_squares(predicted: Array, true: Array) -> tuple[float, float]:
    return (predicted * true).sum() / (predicted**2).sum(), 0.0


def _as_it_is(predicted: Array, true: Array) -> tuple[float, float]:
    return 1.0, 0.0


_ALIGNMENTS = {
    "median": _by_median,
    "scale": _by_weiszfeld,
    "scale_and_shift": _by_adam,
    "least_squares": _by_least_squares,
    "metric": _as_it_is,
    "none": _as_it_is,
}
ALIGNMENTS = tuple(_ALIGNMENTS)
_DEPTH_MEANS = ("abs_rel", "delta")


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


def frame_ious(predicted: ArrayLike, true: ArrayLike, *, empty: float = 1.0) -> Array:
    """IoU of each frame, ``[T]``, of masks ``[T, H, W]``.

    Args:
        empty: for a frame in which both masks are: 1 as DAVIS counts it, 0 as VGGT4D's code does, NaN to leave it out.

    Raises:
        ValueError: the shapes differ or are not ``[T, H, W]``.
        TypeError: a mask is not bool.
    """
    mask_counts(predicted, true)  # for its errors
    predicted, true = np.asarray(predicted), np.asarray(true)
    if true.ndim != 3:
        raise ValueError(f"predicted and true must be masks [T, H, W], got {true.shape}.")
    inter, union = (predicted & true).sum((1, 2)), (predicted | true).sum((1, 2))
    return np.where(union > 0, inter / np.maximum(union, 1), empty)


def mask_scores(predicted: Sequence[ArrayLike], true: Sequence[ArrayLike], *, empty: float = 1.0) -> MaskScores:
    """The three means of the IoU that are in use, and the recall; masks of one clip after the other, ``[T, H, W]``.

    Args:
        empty: as of :func:`frame_ious`.

    Raises:
        ValueError: not as many clips in both, or none; and as :func:`frame_ious`.
    """
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"predicted and true must be as many clips, at least 1, got {len(predicted)} and {len(true)}.")
    pairs = list(zip(predicted, true, strict=True))
    inter, union = np.sum([mask_counts(p, t) for p, t in pairs], 0)
    return scores_of([frame_ious(p, t, empty=empty) for p, t in pairs], int(inter), int(union))


def scores_of(ious: Sequence[Array], inter: int, union: int) -> MaskScores:
    """From the IoU of each frame, ``[T]`` a clip, NaN for one that does not count, and the pixels of all of them."""
    clips = [x[np.isfinite(x)] for x in ious]
    known = [x for x in clips if len(x)]
    if not known:
        return MaskScores(inter / union if union else 1.0, np.nan, np.nan, np.nan)
    return MaskScores(
        inter / union if union else 1.0,
        float(np.concatenate(known).mean()),
        float(np.mean([x.mean() for x in known])),
        float(np.mean([(x > 0.5).mean() for x in known])),
    )


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
