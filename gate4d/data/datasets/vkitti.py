"""Virtual KITTI 2: Cabon et al., 2020; Gaidon et al., CVPR 2016."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = """\
Scene01/clone/{frames/rgb/Camera_0/rgb_00000.jpg ..., frames/depth/Camera_0/depth_00000.png ..., extrinsic.txt,
intrinsic.txt}, further scenes and variations beside it"""
PROTOCOL = Protocol(("cameras", "depth"), "every variation, camera 0; set --frames", max_depth=80.0)
read_depth = partial(formats.read_depth_png, scale=100, invalid=(65535,))  # centimetres; the sky is at the end


def is_at(root: Path) -> bool:
    return any(root.glob("Scene*/*/frames/rgb")) or any(root.glob("Scene*/*/extrinsic.txt"))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Camera 0 of every variation, named ``Scene01/clone``."""
    for folder in sorted(x.parents[1] for x in root.glob("Scene*/*/frames/rgb")):
        name = f"{folder.parent.name}/{folder.name}"
        if only and name not in only and folder.parent.name not in only:
            continue
        images = folder / "frames" / "rgb" / "Camera_0"
        frames = selection.of(formats.listed(images, "rgb_*.jpg", "images of virtual-kitti-2"))
        poses = _by_frame(folder / "extrinsic.txt", 18)
        cameras = _by_frame(folder / "intrinsic.txt", 6)
        numbers = [formats.last_number(x) for x in frames]
        for file, found in (("extrinsic.txt", poses), ("intrinsic.txt", cameras)):
            if missing := [n for n in numbers if n not in found]:
                raise ValueError(f"{folder / file} has no line for frame {missing[0]} of camera 0.")
        depth = None
        if (folder / "frames" / "depth" / "Camera_0").is_dir():
            depth = formats.same_names(frames, (folder / "frames" / "depth" / "Camera_0").glob("depth_*.png"))
        to_world = formats.to_world(np.array([poses[n].reshape(4, 4) for n in numbers]).reshape(-1, 4, 4))
        intrinsics = np.array([formats.pinhole(*cameras[n]) for n in numbers]).reshape(-1, 3, 3)
        yield Sequence(name, tuple(frames), to_world, intrinsics, None, depth, None, read_depth)


def _by_frame(path: Path, columns: int) -> dict[int, np.ndarray]:
    """What follows frame and camera in the rows of camera 0; the first line is a heading."""
    return {int(row[0]): row[2:] for row in formats.read_numbers(path, (columns,), skip=1) if row[1] == 0}
