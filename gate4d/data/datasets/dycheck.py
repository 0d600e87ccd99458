"""DyCheck's iPhone sequences: Gao et al., "Monocular dynamic view synthesis: a reality check", NeurIPS 2022."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = "apple/{rgb/1x/0_00000.png ..., depth/1x/0_00000.npy ..., camera/0_00000.json ...}, further scenes beside it"
PROTOCOL = Protocol(("cameras", "depth"), "every frame of the moving camera (0_*)")


def is_at(root: Path) -> bool:
    return any((x / "camera").is_dir() and (x / "rgb").is_dir() for x in (root, *_scenes(root)))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every scene, in the least reduced of the sizes that are there (``rgb/1x``, ``rgb/2x``, ...)."""
    for folder in [root] if (root / "camera").is_dir() else _scenes(root):
        if not (folder / "camera").is_dir() or (only and folder.name not in only):
            continue
        sizes = sorted((x for x in (folder / "rgb").glob("*x") if x.name[:-1].isdecimal()), key=formats.natural)
        if not sizes:
            raise FileNotFoundError(f"dycheck: nothing found at {folder / 'rgb' / '1x'}.")
        factor = int(sizes[0].name[:-1])
        frames = selection.of(formats.listed(sizes[0], "0_*.png", "images of dycheck"))
        cameras = [_camera(folder / "camera" / f"{x.stem}.json", factor) for x in frames]
        intrinsics, poses = (np.stack(x) for x in zip(*cameras, strict=True))
        depth, place = None, folder / "depth" / sizes[0].name
        if place.is_dir():
            depth = formats.same_names(frames, place.glob("0_*.npy"))
        yield Sequence(folder.name, tuple(frames), poses, intrinsics, None, depth, None, read_depth)


def read_depth(path: Path) -> np.ndarray:
    """``[H, W]`` of an array ``[H, W, 1]``; 0 is unknown."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"{path} cannot be read, it is truncated or no array: {e}") from None
    if depth.ndim not in (2, 3) or (depth.ndim == 3 and depth.shape[2] != 1):
        raise ValueError(f"{path} must hold a depth map [H, W, 1], got {depth.shape}.")
    return depth.reshape(depth.shape[:2]).astype(np.float64)


def _camera(path: Path, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics and camera to world of Nerfies' JSON: ``orientation`` is world to camera, ``position`` the centre."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        turn, center = np.array(data["orientation"], np.float64), np.array(data["position"], np.float64)
        focal, (x, y) = float(data["focal_length"]), data["principal_point"]
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = turn.T, center
    except FileNotFoundError:
        raise FileNotFoundError(f"dycheck: there is no camera {path}.") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} must have orientation, position, focal_length and principal_point: {e}") from None
    k = formats.pinhole(focal, focal * float(data.get("pixel_aspect_ratio", 1.0)), x, y)
    k[:2] /= factor
    return k, pose


def _scenes(root: Path) -> list[Path]:
    return sorted(x for x in root.iterdir() if x.is_dir()) if root.is_dir() else []
