"""Errors of cameras, in float64 numpy; arguments are arrays, or tensors on the CPU.

Poses are camera-to-world ``[T, 4, 4]`` in OpenCV axes. Lengths come out in the unit of the true poses.
"""

from __future__ import annotations

from typing import NamedTuple

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


class PairErrors(NamedTuple):
    """Of the relative poses of all pairs of a clip's frames, degrees."""

    rotation: Array  # [T (T - 1) / 2], the angle between the predicted and the true one
    translation: Array  # the angle between their directions of translation

    def rra(self, degrees: float) -> float:
        """Share of pairs whose rotation is off by less."""
        return float((self.rotation < degrees).mean())

    def rta(self, degrees: float) -> float:
        """Share of pairs whose direction of translation is off by less."""
        return float((self.translation < degrees).mean())

    def auc(self, degrees: int = 30) -> float:
        """Area under the accuracy curve up to ``degrees``: mean of the shares of pairs of which both are off by less
        than 1, 2, ... ``degrees`` degrees (PoseDiffusion's and VGGT's, a histogram of bins of one degree)."""
        worst = np.maximum(self.rotation, self.translation)
        return float(np.mean([(worst < k).mean() for k in range(1, degrees)] + [(worst <= degrees).mean()]))


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


def camera_errors(
    predicted: ArrayLike, true: ArrayLike, *, step: int = 1, skip_degenerate: bool = False
) -> CameraErrors:
    """ATE and relative pose errors after a Sim(3) alignment of the camera centres.

    A true camera that stands still makes every scale as good as 0: then ATE and the translation error are 0 whatever
    was predicted, and say nothing. Leave such clips out of their means.

    Args:
        predicted, true: camera-to-world ``[T, 4, 4]``.
        step: frames between the two poses of a relative one.
        skip_degenerate: NaN where :func:`is_degenerate`, as the field's scripts skip such a clip.

    Raises:
        ValueError: the shapes are not equal and ``[T, 4, 4]`` with T > step, or a pose is not finite.
    """
    predicted, true = _poses(predicted, true, step)
    if skip_degenerate and is_degenerate(predicted, true):
        return CameraErrors(np.nan, np.nan, np.nan)
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
    return np.linalg.norm(error[:, :3, 3], axis=1), _angles(error)


def pair_errors(predicted: ArrayLike, true: ArrayLike, *, signed: bool = False) -> PairErrors:
    """Errors of the poses of each frame relative to each earlier one; neither scale nor world matters.

    Args:
        predicted, true: camera-to-world ``[T, 4, 4]``.
        signed: whether a translation the other way round is off by 180 degrees; by default by 0, as the field has it
            (PoseDiffusion, VGGT). Where one of the two cameras does not move, it is off by 90.

    Raises:
        ValueError: as :func:`camera_errors`.
    """
    predicted, true = _poses(predicted, true, 1)
    first, second = np.triu_indices(len(true), 1)
    p, q = (_inverse(x[first]) @ x[second] for x in (predicted, true))
    a, b = p[:, :3, 3], q[:, :3, 3]
    dot = (a * b).sum(1)
    angle = np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), dot if signed else np.abs(dot)))
    still = (np.linalg.norm(a, axis=1) == 0) | (np.linalg.norm(b, axis=1) == 0)
    return PairErrors(_angles(_inverse(q) @ p), np.where(still, 90.0, angle))


def is_degenerate(predicted: ArrayLike, true: ArrayLike) -> bool:
    """Whether the camera centres do not determine a rotation, by the rule of evo, for which the field leaves clips out.

    So it is where fewer than two singular values of their covariance are above the rounding error of 1.

    Raises:
        ValueError: as :func:`camera_errors`.
    """
    centers = [x[:, :3, 3] - x[:, :3, 3].mean(0) for x in _poses(predicted, true, 1)]
    singular = np.linalg.svd(centers[1].T @ centers[0] / len(centers[0]), compute_uv=False)
    return bool((singular > np.finfo(np.float64).eps).sum() < 2)


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


def _angles(poses: Array) -> Array:
    """Of the rotations, degrees. From sine and cosine: the arc cosine alone loses half of the digits near 0."""
    rotation = poses[:, :3, :3]
    sine = np.stack([rotation[:, i, j] - rotation[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], 1)
    cosine = np.trace(rotation, axis1=1, axis2=2) - 1
    return np.degrees(np.arctan2(np.linalg.norm(sine, axis=1), cosine))
