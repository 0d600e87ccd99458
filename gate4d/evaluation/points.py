"""Errors of point clouds; arguments are arrays, or tensors on the CPU. Needs SciPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cameras import Similarity, similarity

Array = NDArray[np.float64]


class PointErrors(NamedTuple):
    """Distances in the unit of the points; each a mean and a median."""

    accuracy: float  # from a predicted point to the nearest true one
    accuracy_median: float
    completeness: float  # from a true point to the nearest predicted one
    completeness_median: float
    chamfer: float  # mean of accuracy and completeness
    normals_accuracy: float  # |cosine| between the normals of these pairs; NaN without normals
    normals_accuracy_median: float
    normals_completeness: float
    normals_completeness_median: float

    @property
    def normal_consistency(self) -> float:
        """Mean of both directions."""
        return (self.normals_accuracy + self.normals_completeness) / 2


def point_errors(
    predicted: ArrayLike,
    true: ArrayLike,
    *,
    predicted_normals: ArrayLike | None = None,
    true_normals: ArrayLike | None = None,
) -> PointErrors:
    """Accuracy, completeness, Chamfer distance, and with normals their consistency. Nothing is aligned: :func:`icp`.

    Args:
        predicted: ``[N, 3]``. true: ``[M, 3]``.
        predicted_normals, true_normals: ``[N, 3]`` and ``[M, 3]``, both or none; their lengths and signs do not matter.

    Raises:
        ValueError: a shape does not fit, or a number is not finite. ImportError: SciPy is missing.
    """
    predicted, true = _points("predicted", predicted), _points("true", true)
    tree = _tree()
    to_true, nearest_true = tree(true).query(predicted)
    to_predicted, nearest_predicted = tree(predicted).query(true)
    if (predicted_normals is None) != (true_normals is None):
        raise ValueError("predicted_normals and true_normals must be given both or not at all, got one.")
    cosines = np.full(1, np.nan), np.full(1, np.nan)
    if predicted_normals is not None and true_normals is not None:
        p, q = _units("predicted_normals", predicted_normals), _units("true_normals", true_normals)
        for name, normals, points in (("predicted_normals", p, predicted), ("true_normals", q, true)):
            if normals.shape != points.shape:
                raise ValueError(f"{name} must be one a point, {points.shape}, got {normals.shape}.")
        cosines = np.abs((p * q[nearest_true]).sum(1)), np.abs((q * p[nearest_predicted]).sum(1))
    distances = [float(f(x)) for x in (to_true, to_predicted) for f in (np.mean, np.median)]
    angles = [float(f(x)) for x in cosines for f in (np.mean, np.median)]
    return PointErrors(*distances, (distances[0] + distances[2]) / 2, *angles)


def icp(
    source: ArrayLike, target: ArrayLike, *, reach: float = 0.1, steps: int = 30, tolerance: float = 1e-6
) -> Similarity:
    """The rigid motion that brings ``source [N, 3]`` to ``target [M, 3]``, from where it is, point to point.

    Besl and McKay, "A method for registration of 3-D shapes", PAMI 1992; as the field runs it (Open3D's defaults): only
    points with a target nearer than ``reach`` count, until both their share and the root mean square of their distances
    change by less than ``tolerance``, or after ``steps``.

    Returns:
        A :class:`Similarity` of scale 1.

    Raises:
        ValueError: a shape does not fit, or no point is near enough. ImportError: SciPy is missing.
    """
    source, target = _points("source", source), _points("target", target)
    tree, found, before = _tree()(target), Similarity(1.0, np.eye(3), np.zeros(3)), (np.inf, np.inf)
    for _ in range(steps + 1):
        moved = found.points(source)
        distance, nearest = tree.query(moved)
        near = distance < reach
        if not near.any():
            raise ValueError(f"source must have points nearer than {reach:g} to target, nearest: {distance.min():g}.")
        now = float(near.mean()), float(np.sqrt((distance[near] ** 2).mean()))
        if all(abs(a - b) < tolerance for a, b in zip(now, before, strict=True)):
            break
        before = now
        found = similarity(source[near], target[nearest[near]], with_scale=False)
    return found


def normals(points: ArrayLike, neighbours: int = 30) -> Array:
    """Unit normals ``[N, 3]``, of any sign: the direction of least spread among the nearest points, itself included.

    Raises:
        ValueError: ``[N, 3]`` with N >= 3 is wanted. ImportError: SciPy is missing.
    """
    points = _points("points", points)
    if len(points) < 3:
        raise ValueError(f"points must be at least 3, got {len(points)}.")
    _, near = _tree()(points).query(points, min(neighbours, len(points)))
    around = points[near] - points[near].mean(1, keepdims=True)
    return np.linalg.eigh(np.swapaxes(around, 1, 2) @ around)[1][..., 0]


def _points(name: str, x: ArrayLike) -> Array:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != 3 or not len(x):
        raise ValueError(f"{name} must be [N, 3], N >= 1, got {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(x)).sum())} numbers that are not.")
    return x


def _units(name: str, x: ArrayLike) -> Array:
    x = _points(name, x)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _tree() -> Any:
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        raise ImportError("Errors of points need SciPy: pip install 'gate4d[methods]'.") from None
    return cKDTree
