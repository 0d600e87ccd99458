"""Predictions beyond what was run: nothing here is a measurement, and everything that shows it says so.

- Time on the same machine: ``a T + b T^2`` or ``c + a T`` through the measured points, relative errors weighted
  alike. Its error is shown: the last point is predicted from the others.
- Memory: :mod:`.counted`.
- A model of VGGT's true size on several GPUs: counted bytes and operations, and an assumed rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..registry import SHAPES
from .counted import memory_model

FRAMES = (1000, 10000)
GPUS = (1, 8)
ASSUMED_TFLOPS = 400.0  # a GPU's sustained bf16 rate: an assumption, about half of an H200's peak
_VGGT = SHAPES["vggt.global"]


@dataclass(frozen=True)
class TimeModel:
    """``seconds(T) = constant + linear T + quadratic T^2``."""

    constant: float
    linear: float
    quadratic: float

    def seconds(self, frames: int) -> float:
        """Predicted seconds for ``frames``."""
        return self.constant + self.linear * frames + self.quadratic * frames**2

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]], growth: str = "quadratic") -> TimeModel | None:
        """Least relative squares through ``(frames, seconds)``; None with fewer than three points.

        ``growth`` is what the model's structure says: "quadratic" (``a T + b T^2``, both at least 0) where frames
        attend to all others, "linear" (``c + a T``) where a frame's work does not depend on their number.
        """
        if len(points) < 3:
            return None
        frames, seconds = (np.array(x, dtype=float) for x in zip(*points, strict=True))
        powers = [0, 1] if growth == "linear" else [1, 2]
        found = _least_squares(frames, seconds, powers)
        if growth == "quadratic" and min(found) < 0:
            powers = [powers[int(found[0] < 0)]]  # the term that is not negative
            found = _least_squares(frames, seconds, powers)
        terms = dict(zip(powers, found, strict=True))
        return cls(*(float(terms.get(p, 0.0)) for p in (0, 1, 2)))


def _least_squares(frames: np.ndarray, seconds: np.ndarray, powers: list[int]) -> np.ndarray:
    columns = np.stack([frames**p for p in powers], axis=1) / seconds[:, None]
    return np.linalg.lstsq(columns, np.ones(len(frames)), rcond=None)[0]


def last_point_error(points: Sequence[tuple[int, float]], growth: str = "quadratic") -> float | None:
    """Predicted / measured - 1 of the last point, predicted from those before it; None with fewer than four."""
    model = TimeModel.fit(points[:-1], growth) if len(points) > 3 else None
    return None if model is None else model.seconds(points[-1][0]) / points[-1][1] - 1


@dataclass(frozen=True)
class Sharded:
    """A prediction for VGGT's size in bf16 with the frames shared out over GPUs.

    Each GPU holds its frames' activations and, one layer at a time, the keys and values of all frames; weights of the
    24 + 24 blocks on each. gate4d has no such runner: its lse would allow one.
    """

    frames: int
    gpus: int
    bytes_per_gpu: int
    operations: float

    @property
    def seconds(self) -> float:
        """At the assumed rate, communication not counted."""
        return self.operations / self.gpus / ASSUMED_TFLOPS / 1e12


def vggt_operations(frames: int) -> float:
    """Multiplications and additions of VGGT's 24 + 24 blocks, each counted."""
    width, tokens = _VGGT.width, _VGGT.keys
    total = tokens * frames
    layers = _VGGT.modules
    projections = 2 * layers * 2 * 12 * width**2 * total  # qkv, proj and the MLP: 12 C^2 weights a block
    return projections + layers * 4 * width * total * (tokens + total)


def vggt_bytes(frames: int, method: str, gpus: int = 1) -> int:
    """Peak bytes on one GPU: activations counted from shapes and halved for bf16, all keys and values, weights."""
    own = -(-frames // gpus)
    activations = memory_model("alternating", method=method, gated=method != "SDPA", scale=1)(own) // 2
    gathered = 0 if gpus == 1 else 2 * 2 * frames * _VGGT.keys * _VGGT.width
    weights = 2 * 2 * _VGGT.modules * 12 * _VGGT.width**2
    return activations + gathered + weights


def sharded(method: str = "gate4d") -> list[Sharded]:
    """The table of :data:`FRAMES` times :data:`GPUS`."""
    return [Sharded(n, g, vggt_bytes(n, method, g), vggt_operations(n)) for n in FRAMES for g in GPUS]
