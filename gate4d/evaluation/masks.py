"""Scores of masks; arguments are arrays, or tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class MaskScores(NamedTuple):
    """Motion masks of several clips; each field is how somebody averages their IoU."""

    pixels: float  # of all pixels of all clips together
    frames: float  # of each frame, mean over the frames of all clips: Easi3R's JM
    sequences: float  # of each frame, mean over a clip's frames and then over the clips: VGGT4D's and DAVIS' JM
    recall: float  # share of a clip's frames with an IoU above 0.5, mean over the clips: JR


class VideoScores(NamedTuple):
    """DAVIS' scores of several clips; a frame's J is its IoU, its F that of :func:`frame_boundaries`.

    The first three of each are means over each clip's frames and then over the clips (DAVIS, VGGT4D), the last means
    over the frames of all clips (Easi3R).
    """

    jm: float  # mean J
    jr: float  # share of frames with J above 0.5
    fm: float  # mean F
    fr: float  # share of frames with F above 0.5
    jm_frames: float
    jr_frames: float
    fm_frames: float
    fr_frames: float


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


def frame_boundaries(predicted: ArrayLike, true: ArrayLike, *, tolerance: float = 0.008) -> Array:
    """F of each frame, ``[T]``: how well the outlines of masks ``[T, H, W]`` meet.

    The harmonic mean of precision and recall of the outline's pixels, of which those count that lie in the other
    outline after its dilation by a disk (Perazzi et al., "A benchmark dataset and evaluation methodology for video
    object segmentation", CVPR 2016, with the morphological matching of their code). An outline is where a pixel
    differs from its right, lower or lower right neighbour. 1 where both masks are empty.

    Args:
        tolerance: radius of the disk: pixels if >= 1, else a share of the image's diagonal, rounded up.

    Raises:
        ValueError, TypeError: as :func:`frame_ious`, or the tolerance is not > 0.
        ImportError: scikit-image is missing.
    """
    mask_counts(predicted, true)  # for its errors
    predicted, true = np.asarray(predicted), np.asarray(true)
    if true.ndim != 3:
        raise ValueError(f"predicted and true must be masks [T, H, W], got {true.shape}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}.")
    try:
        from skimage.morphology import dilation, disk
    except ImportError:
        raise ImportError("F of masks needs scikit-image: pip install 'gate4d[methods]'.") from None
    size = true.shape[1:]
    around = disk(math.ceil(tolerance if tolerance >= 1 else tolerance * math.hypot(*size)))
    found = []
    for p, q in zip(predicted, true, strict=True):
        p, q = _outline(p), _outline(q)
        # An outline that is not there has no wrong pixel, and lacks none.
        precision = (p & dilation(q, around)).sum() / p.sum() if p.any() else 1.0
        recall = (q & dilation(p, around)).sum() / q.sum() if q.any() else 1.0
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return np.array(found, np.float64)


def video_scores(
    predicted: Sequence[ArrayLike], true: Sequence[ArrayLike], *, ends: bool = True, tolerance: float = 0.008
) -> VideoScores:
    """JM, JR, FM, FR with both averages; masks of one clip after the other, ``[T, H, W]``.

    Args:
        ends: whether the first and the last frame of a clip count. DAVIS' own code leaves them out.
        tolerance: as of :func:`frame_boundaries`.

    Raises:
        ValueError: not as many clips in both, none, one without a frame that counts; as :func:`frame_boundaries`.
        TypeError, ImportError: as :func:`frame_boundaries`.
    """
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"predicted and true must be as many clips, at least 1, got {len(predicted)} and {len(true)}.")
    js, fs = [], []
    for p, q in zip(predicted, true, strict=True):
        part = slice(None) if ends else slice(1, -1)
        p, q = np.asarray(p)[part], np.asarray(q)[part]
        if not len(q):
            raise ValueError("true must be clips with a frame that counts, got one without.")
        js.append(frame_ious(p, q))
        fs.append(frame_boundaries(p, q, tolerance=tolerance))
    return scores_of_frames(js, fs)


def scores_of_frames(js: Sequence[Array], fs: Sequence[Array]) -> VideoScores:
    """From J and F of each frame, ``[T]`` a clip."""
    by_clip = [float(np.mean([f(x) for x in xs])) for xs in (js, fs) for f in (np.mean, _recall)]
    by_frame = [float(f(np.concatenate(xs))) for xs in (js, fs) for f in (np.mean, _recall)]
    return VideoScores(*by_clip, *by_frame)


def _recall(x: Array) -> float:
    return float((x > 0.5).mean())


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool ``[H, W]``: the pixel differs from its right, lower or lower right neighbour, as far as there are such."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
