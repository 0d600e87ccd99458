"""TUM RGB-D (Sturm et al., IROS 2012) and, in the same files, Bonn (Palazzolo et al., "ReFusion", IROS 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = """\
rgbd_dataset_freiburg3_walking_xyz/ with rgb.txt, groundtruth.txt, rgb/, and if depth is wanted depth.txt, depth/"""
BONN_LAYOUT = "rgbd_bonn_balloon2/ with rgb/*.png, depth/*.png, groundtruth.txt (perhaps in rgbd_bonn_dataset/)"
PROTOCOL = Protocol(
    ("cameras",), "MonST3R, CUT3R: of the frames with ground truth every 3rd, 90 at most", Selection(0, 3, 90)
)
BONN_PROTOCOL = Protocol(
    ("cameras", "depth"), "MonST3R, CUT3R: rows 30 to 139 of images, depth maps and groundtruth.txt, whatever their "
    "stamps; 5 sequences", Selection(30, 1, 110), max_depth=70.0,
)  # fmt: skip
BONN_SEQUENCES = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")
_SCALE = 5000
# fx, fy, cx, cy of the published calibrations.
_CAMERAS = {
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
}
_BONN_CAMERA = (542.822841, 542.576870, 315.593520, 237.756098)
read_depth = partial(formats.read_depth_png, scale=_SCALE)


def is_at(root: Path) -> bool:
    return any((x / "rgb.txt").is_file() and not x.name.startswith("rgbd_bonn") for x in (root, *_folders(root)))


def bonn_is_at(root: Path) -> bool:
    return any(x.name.startswith("rgbd_bonn") for x in (root, *_folders(root)))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every folder with an ``rgb.txt``: images with a pose less than 0.02 s away, then the selection."""
    folders = [root] if (root / "rgb.txt").is_file() else [x for x in _folders(root) if (x / "rgb.txt").is_file()]
    for folder in folders:
        if only and folder.name not in only:
            continue
        images, poses = (formats.read_stamped(folder / n) for n in ("rgb.txt", "groundtruth.txt"))
        pairs = formats.associate(images, poses)
        if not pairs:
            raise ValueError(
                f"{folder / 'rgb.txt'} and {folder / 'groundtruth.txt'} have no stamps less than 0.02 s apart: the "
                f"first goes from {min(images):.2f} to {max(images):.2f} s, the second from {min(poses):.2f} to "
                f"{max(poses):.2f} s."
            )
        chosen = selection.of(pairs)
        depth = None
        if (folder / "depth.txt").is_file():
            maps = formats.read_stamped(folder / "depth.txt")
            near = dict(formats.associate(images, maps))
            depth = tuple(folder / maps[near[a]][0] if a in near else None for a, _ in chosen)
        frames = tuple(folder / images[a][0] for a, _ in chosen)
        found = np.array([formats.tum_pose(poses[b], f"{folder / 'groundtruth.txt'}, {b:.6f}") for _, b in chosen])
        camera = next((formats.pinhole(*k) for n, k in _CAMERAS.items() if n in folder.name), None)
        intrinsics = None if camera is None else np.repeat(camera[None], len(frames), 0)
        times = np.array([a for a, _ in chosen])
        yield Sequence(folder.name, frames, found.reshape(-1, 4, 4), intrinsics, times, depth, None, read_depth)


def read_bonn(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """The five sequences as far as they are there, or those asked for: rows by number, as the protocol has it.

    The poses of ``groundtruth.txt`` are of the markers on the camera, not of its optical centre, and its rows are not
    the images'; the field's figures are of these poses.
    """
    folders = {x.name.removeprefix("rgbd_bonn_"): x for x in (root, *_folders(root)) if x.name.startswith("rgbd_bonn_")}
    folders.pop("dataset", None)
    for name in only or [n for n in BONN_SEQUENCES if n in folders] or sorted(folders):
        folder = folders.get(name, root / f"rgbd_bonn_{name}")
        frames = tuple(selection.of(formats.listed(folder / "rgb", "*.png", "images of bonn")))
        depth = tuple(selection.of(formats.listed(folder / "depth", "*.png", "depth maps of bonn")))
        rows = selection.of(formats.read_numbers(folder / "groundtruth.txt", (8,)))
        if not len(frames) == len(depth) == len(rows):
            raise ValueError(
                f"{folder}: images, depth maps and groundtruth.txt must have as many rows in the selection, got "
                f"{len(frames)}, {len(depth)} and {len(rows)}."
            )
        poses = np.array([formats.tum_pose(row[1:], f"{folder / 'groundtruth.txt'}, {row[0]:.6f}") for row in rows])
        intrinsics = np.repeat(formats.pinhole(*_BONN_CAMERA)[None], len(frames), 0)
        yield Sequence(name, frames, poses.reshape(-1, 4, 4), intrinsics, None, depth, None, read_depth)


def _folders(root: Path) -> list[Path]:
    """Folders inside, and those inside ``rgbd_bonn_dataset``."""
    inner = root / "rgbd_bonn_dataset" if (root / "rgbd_bonn_dataset").is_dir() else root
    return sorted(x for x in inner.iterdir() if x.is_dir()) if inner.is_dir() else []
