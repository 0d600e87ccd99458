"""Errors of depth, in float64 numpy; arguments are arrays, or tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Alignment = Literal["median", "scale", "scale_and_shift", "least_squares", "metric", "none"]
_LEAST = 1e-5  # what smaller predictions are set to before a logarithm, as the field has it


class DepthErrors(NamedTuple):
    """Means over the valid pixels of a clip."""

    abs_rel: float  # |predicted - true| / true
    delta: float  # share of pixels with max(predicted / true, true / predicted) < 1.25
    scale: float  # that the prediction was multiplied with
    shift: float = 0.0  # that was added to it then
    pixels: int = 0  # valid ones
    sq_rel: float = np.nan  # (predicted - true)^2 / true, in the unit of the true depth
    rmse: float = np.nan  # root of the mean of (predicted - true)^2, in that unit
    log_rmse: float = np.nan  # root of the mean of (log predicted - log true)^2, natural logarithms
    delta2: float = np.nan  # as delta, < 1.25^2
    delta3: float = np.nan  # as delta, < 1.25^3


def depth_errors(
    predicted: ArrayLike,
    true: ArrayLike,
    *,
    valid: ArrayLike | None = None,
    align: Alignment = "median",
    max_depth: float | None = None,
    clip_max: float | None = None,
    per_frame: bool = False,
) -> DepthErrors:
    """The errors of a clip's depth, after one alignment for the whole clip or for each frame.

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
        per_frame: whether each frame of ``[T, ...]`` is aligned alone; the errors are then those of the frames, each
            weighted by its valid pixels (a frame without one does not count), and so are both roots of means.

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
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be one of {list(_ALIGNMENTS)}, got {align!r}.")
    if per_frame:
        frames = [n for n in range(len(true)) if chosen[n].any()]
        options = {"align": align, "clip_max": clip_max}
        return mean_depth_errors([depth_errors(predicted[n], true[n], valid=chosen[n], **options) for n in frames])
    predicted, true = predicted[chosen], true[chosen]
    if not np.isfinite(predicted).all():
        raise ValueError(f"predicted must be finite, got {int((~np.isfinite(predicted)).sum())} depths that are not.")
    with np.errstate(divide="ignore", invalid="ignore"):
        factor, shift = _ALIGNMENTS[align](predicted, true)
    if not (np.isfinite(factor) and np.isfinite(shift)):
        raise ValueError(f"predicted can't be aligned by {align!r}: its depths give a factor of {factor}.")
    scaled = predicted * factor + shift
    if clip_max is not None:
        scaled = np.minimum(scaled, clip_max)
    error = scaled - true
    with np.errstate(divide="ignore"):
        ratio = np.where(scaled > 0, np.maximum(scaled / true, true / scaled), np.inf)
    logs = np.log(np.maximum(scaled, _LEAST)) - np.log(true)
    return DepthErrors(
        float((np.abs(error) / true).mean()), float((ratio < 1.25).mean()), float(factor), float(shift), len(true),
        float((error**2 / true).mean()), float(np.sqrt((error**2).mean())), float(np.sqrt((logs**2).mean())),
        float((ratio < 1.25**2).mean()), float((ratio < 1.25**3).mean()),
    )  # fmt: skip


def mean_depth_errors(errors: Sequence[DepthErrors]) -> DepthErrors:
    """Means of the errors over clips, weighted by their valid pixels; scale and shift of several are NaN.

    Raises:
        ValueError: there is no clip, or none has a pixel.
    """
    pixels = np.array([e.pixels for e in errors])
    if not pixels.sum():
        raise ValueError(f"errors must be of clips with valid pixels, got {len(errors)} clips without.")
    means = {n: float((pixels * [getattr(e, n) for e in errors]).sum() / pixels.sum()) for n in DEPTH_MEANS}
    scale, shift = errors[0][2:4] if len(errors) == 1 else (np.nan, np.nan)
    return DepthErrors(scale=scale, shift=shift, pixels=int(pixels.sum()), **means)


def _median(x: Array) -> float:
    return float(np.partition(x, (len(x) - 1) // 2)[(len(x) - 1) // 2])


def _by_median(predicted: Array, true: Array) -> tuple[float, float]:
    return _median(true) / np.float64(_median(predicted)), 0.0


def _by_weiszfeld(predicted: Array, true: Array) -> tuple[float, float]:
    """Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnes est minimum", 1937: each step is a
    least squares one whose weights are the inverse of the last distances.

    A pixel that is almost met has nearly all the weight, so that the rounding of a sum grows tenfold a step: sums are
    torch's, as in the field's script, for numpy's end as far as 0.3 % away.
    """
    p, t = torch.from_numpy(predicted), torch.from_numpy(true)
    factor = t.mean() / p.mean()
    for _ in range(10):
        weight = 1 / ((factor * p - t).abs() + 1e-8)
        factor = (weight * p * t).sum() / (weight * p**2).sum()
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
DEPTH_MEANS = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta", "delta2", "delta3")
