"""Point Odyssey: Zheng et al., ICCV 2023."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = "{val,test}/SEQUENCE/{rgbs/rgb_00000.jpg ..., depths/depth_00000.png ..., anno.npz}, or a folder of sequences"
PROTOCOL = Protocol(("cameras", "depth"), "every frame; set --frames")
read_depth = partial(formats.read_depth_png, scale=65.535)  # 65535 counts are 1000 m


def is_at(root: Path) -> bool:
    return any((x / "rgbs").is_dir() for x in _folders(root))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every folder with ``rgbs``, of the validation and test splits where there are such."""
    for folder in _folders(root):
        if not (folder / "rgbs").is_dir() or (only and folder.name not in only):
            continue
        frames = formats.listed(folder / "rgbs", "rgb_*.jpg", "images of point-odyssey")
        file = folder / "anno.npz"
        if not file.is_file():
            raise FileNotFoundError(f"point-odyssey: there is no file {file} with the cameras.")
        try:
            with np.load(file, allow_pickle=False) as data:
                intrinsics, extrinsics = (data[n].astype(np.float64) for n in ("intrinsics", "extrinsics"))
        except Exception as e:  # zipfile, zlib and numpy raise what they like
            raise ValueError(f"{file} must hold intrinsics [T, 3, 3] and extrinsics [T, 4, 4]: {e}") from None
        if not len(frames) == len(intrinsics) == len(extrinsics):
            counts = f"{len(frames)}, {len(intrinsics)} and {len(extrinsics)}"
            raise ValueError(f"{file}: images, intrinsics and extrinsics must be as many, got {counts}.")
        chosen = selection.of(range(len(frames)))
        frames = tuple(frames[n] for n in chosen)
        depth = None
        if (folder / "depths").is_dir():
            depth = formats.same_names(frames, (folder / "depths").glob("depth_*.png"))
        poses = formats.to_world(extrinsics[chosen])
        yield Sequence(folder.name, frames, poses, intrinsics[chosen], None, depth, None, read_depth)


def _folders(root: Path) -> list[Path]:
    splits = [x for x in (root / "val", root / "test") if x.is_dir()] or [root]
    inner = [y for x in splits for y in sorted(x.iterdir()) if y.is_dir()] if root.is_dir() else []
    return [root, *inner] if (root / "rgbs").is_dir() else inner
