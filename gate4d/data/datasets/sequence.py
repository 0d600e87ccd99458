"""A sequence of a data set: frames that are read when they are needed, and the ground truth that exists."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import formats

T = TypeVar("T")
Array = NDArray[np.float64]
Maps = tuple[Path | None, ...]


class Selection(NamedTuple):
    """Which frames of a sequence: every ``stride``-th from ``start`` on, ``frames`` at most (None: all)."""

    start: int = 0
    stride: int = 1
    frames: int | None = None

    def of(self, items: Items[T]) -> list[T]:
        """The chosen ones."""
        return list(items[self.start :: self.stride])[: self.frames]


class Protocol(NamedTuple):
    """What the field measures on a data set, and how.

    Attributes:
        measures: of ``"cameras"``, ``"depth"``, ``"masks"``.
        max_depth, clip_max: as in :func:`gate4d.evaluation.depth_errors`, metres.
        alignments: of the depth, each a column.
        selection: the frames.
        source: whose protocol it is.
    """

    measures: tuple[str, ...]
    source: str
    selection: Selection = Selection()
    max_depth: float | None = None
    clip_max: float | None = None
    alignments: tuple[str, ...] = ("scale", "scale_and_shift", "metric")


@dataclass(frozen=True, eq=False)
class Sequence:
    """Frames and their ground truth; what a data set lacks is None.

    Attributes:
        name: of the sequence.
        frames: paths of the images.
        poses: fp64 ``[T, 4, 4]``, camera to world, OpenCV axes, metres; not finite where a frame has none.
        intrinsics: fp64 ``[T, 3, 3]``, pixels of the image files, with the middle of the first pixel where the data set
            puts it.
        times: fp64 ``[T]``, seconds, where the data set says them.
        depth_files, mask_files: path for each frame, None for a frame without.
        read_depth: a file's depth, fp64 ``[h, w]`` in metres along the optical axis, 0 where it is not known.
        read_mask: a file's mask, bool ``[h, w]``, True = moving, or the annotated object.
    """

    name: str
    frames: tuple[Path, ...]
    poses: Array | None = None
    intrinsics: Array | None = None
    times: Array | None = None
    depth_files: Maps | None = None
    mask_files: Maps | None = None
    read_depth: Callable[[Path], Array] = formats.read_dpt
    read_mask: Callable[[Path], NDArray[np.bool_]] = formats.read_mask

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` sRGB.

        Raises:
            ValueError: the file cannot be read; so for all three readers.
        """
        return formats.read_image(self.frames[index])

    def depth(self, index: int) -> Array | None:
        """``[h, w]`` metres, 0 where it is not known; None for a frame without."""
        path = None if self.depth_files is None else self.depth_files[index]
        return None if path is None else self.read_depth(path)

    def mask(self, index: int) -> NDArray[np.bool_] | None:
        """``[h, w]``; None for a frame without."""
        path = None if self.mask_files is None else self.mask_files[index]
        return None if path is None else self.read_mask(path)

    def has(self, measure: str) -> bool:
        """Whether there is ground truth for ``"cameras"``, ``"depth"`` or ``"masks"``."""
        maps = {"cameras": self.poses, "depth": self.depth_files, "masks": self.mask_files}[measure]
        return maps is not None and any(x is not None for x in maps)
