"""KITTI: Geiger et al., CVPR 2012 (odometry); Uhrig et al., "Sparsity invariant CNNs", 3DV 2017 (depth)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = """\
val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/*.png with the raw images beside it in
2011_09_26/2011_09_26_drive_0002_sync/image_02/data/*.png; or, already gathered,
depth_selection/val_selection_cropped/{image_gathered,groundtruth_depth_gathered}/NAME/*.png"""
ODOMETRY_LAYOUT = "sequences/00/{image_2/*.png, calib.txt, times.txt}, poses/00.txt"
PROTOCOL = Protocol(("depth",), "MonST3R, CUT3R: first 110 frames with depth of each drive", Selection(0, 1, 110))
ODOMETRY_PROTOCOL = Protocol(("cameras",), "whole sequences 00 to 10")
read_depth = partial(formats.read_depth_png, scale=256)


def _gathered(root: Path) -> Path | None:
    inner = "depth_selection/val_selection_cropped"
    places = (root, root / inner, root / "val_selection_cropped")
    return next((x for x in places if (x / "groundtruth_depth_gathered").is_dir()), None)


def is_at(root: Path) -> bool:
    return _gathered(root) is not None or any(root.glob("val/*_sync/proj_depth"))


def odometry_is_at(root: Path) -> bool:
    return (root / "sequences").is_dir() and (root / "poses").is_dir()


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every drive of the validation set, by its depth maps; an image must exist for each of them."""
    base = _gathered(root)
    if base is not None:
        drives = {x.name: x for x in sorted((base / "groundtruth_depth_gathered").iterdir()) if x.is_dir()}
    else:
        found = sorted(root.glob("val/*_sync/proj_depth/groundtruth/image_02"))
        drives = {f"{x.parents[2].name}_02": x for x in found}
    for name, folder in drives.items():
        if only and name not in only:
            continue
        depth = selection.of(formats.listed(folder, "*.png", "depth maps of kitti"))
        if base is not None:
            images = base / "image_gathered" / name
        else:
            drive = name.removesuffix("_02")
            images = root / drive[:10] / drive / "image_02" / "data"
        frames = tuple(images / x.name for x in depth)
        if missing := [x for x in frames if not x.is_file()]:
            raise FileNotFoundError(
                f"{depth[frames.index(missing[0])]} has no image: {missing[0]} is wanted ({len(missing)} of "
                f"{len(frames)} are missing)."
            )
        yield Sequence(name, frames, depth_files=tuple(depth), read_depth=read_depth)


def read_odometry(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Sequences with poses: those of the left grey camera, as the benchmark has them; images are of camera 2."""
    for file in formats.listed(root / "poses", "*.txt", "poses of kitti odometry"):
        name = file.stem
        folder = root / "sequences" / name
        if (only and name not in only) or not folder.is_dir():
            continue
        frames = formats.listed(folder / "image_2", "*.png", "images of kitti odometry")
        rows = formats.read_numbers(file, (12,))
        if len(rows) != len(frames):
            raise ValueError(f"{file} holds {len(rows)} poses, {folder / 'image_2'} holds {len(frames)} images.")
        poses = np.zeros((len(rows), 4, 4))
        poses[:, :3], poses[:, 3, 3] = rows.reshape(-1, 3, 4), 1
        chosen = selection.of(range(len(frames)))
        camera = np.repeat(_calibration(folder / "calib.txt")[None], len(chosen), 0)
        times = None
        if (folder / "times.txt").is_file():
            times = formats.read_numbers(folder / "times.txt", (1,))[:, 0][chosen]
        yield Sequence(name, tuple(frames[n] for n in chosen), poses[chosen], camera, times)


def _calibration(path: Path) -> np.ndarray:
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("P2:") and len(line.split()) == 13:
            return np.array(line.split()[1:], np.float64).reshape(3, 4)[:, :3]
    raise ValueError(f"{path} must hold a line 'P2:' with 12 numbers.")
