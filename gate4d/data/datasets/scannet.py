"""ScanNet: Dai et al., CVPR 2017, as exported from its ``.sens`` files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = "scene0707_00/{color/0.jpg ..., depth/0.png ..., pose/0.txt ..., intrinsic/intrinsic_color.txt}"
PROTOCOL = Protocol(
    ("cameras",), "MonST3R, CUT3R: every 3rd frame, 90 at most; 50 to 1000 (--frames) in TTT3R's long runs",
    Selection(0, 3, 90),
)  # fmt: skip
read_depth = partial(formats.read_depth_png, scale=1000)


def is_at(root: Path) -> bool:
    return any((x / "color").is_dir() and (x / "pose").is_dir() for x in (root, *_scenes(root)))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every scene. A pose that was lost (``-inf`` in its file) is not finite."""
    for folder in [root] if (root / "color").is_dir() else _scenes(root):
        if not (folder / "color").is_dir() or (only and folder.name not in only):
            continue
        frames = selection.of(formats.listed(folder / "color", "*.[jp][pn]g", "images of scannet"))
        poses = []
        for frame in frames:
            file = folder / "pose" / f"{frame.stem}.txt"
            numbers = formats.read_numbers(file, (4,))
            if numbers.shape != (4, 4):
                raise ValueError(f"{file} must hold 4 rows of 4 numbers, got {len(numbers)}.")
            poses.append(numbers)
        intrinsics, file = None, folder / "intrinsic" / "intrinsic_color.txt"
        if file.is_file():
            intrinsics = np.repeat(formats.read_numbers(file, (3, 4))[None, :3, :3], len(frames), 0)
        depth = None
        if (folder / "depth").is_dir():
            depth = formats.same_names(frames, (folder / "depth").glob("*.png"))
        poses = np.array(poses).reshape(-1, 4, 4)
        yield Sequence(folder.name, tuple(frames), poses, intrinsics, None, depth, None, read_depth)


def _scenes(root: Path) -> list[Path]:
    return sorted(x for x in root.iterdir() if x.is_dir()) if root.is_dir() else []
