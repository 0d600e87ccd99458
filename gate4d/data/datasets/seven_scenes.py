"""7-Scenes: Shotton et al., CVPR 2013."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = "chess/{TestSplit.txt, seq-03/frame-000000.color.png, .depth.png, .pose.txt ...}, further scenes beside it"
PROTOCOL = Protocol(
    ("cameras", "depth"), "CUT3R: sequences of TestSplit.txt, every 200th frame", Selection(0, 200, None),
    alignments=("median", "scale"),
)  # fmt: skip
read_depth = partial(formats.read_depth_png, scale=1000, invalid=(65535,))


def is_at(root: Path) -> bool:
    return any(any(x.glob("seq-*/frame-*.pose.txt")) for x in (root, *_scenes(root)))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """Every sequence of each ``TestSplit.txt`` (without the file: all), named ``scene/seq-03``."""
    for scene in [root] if any(root.glob("seq-*")) else _scenes(root):
        split = scene / "TestSplit.txt"
        names = sorted(x.name for x in scene.glob("seq-*") if x.is_dir())
        if split.is_file():
            names = [f"seq-{int(n):02d}" for n in re.findall(r"sequence\s*(\d+)", split.read_text())]
        for number in names:
            name, folder = f"{scene.name}/{number}", scene / number
            if only and name not in only and scene.name not in only:
                continue
            frames = selection.of(formats.listed(folder, "frame-*.color.png", "images of 7-scenes"))
            stems = [folder / x.name.removesuffix(".color.png") for x in frames]
            poses = [formats.read_numbers(x.with_name(f"{x.name}.pose.txt"), (4,)) for x in stems]
            depth = tuple(x.with_name(f"{x.name}.depth.png") for x in stems)
            intrinsics = np.repeat(formats.pinhole(585.0, 585.0, 320.0, 240.0)[None], len(frames), 0)
            stacked = np.array(poses).reshape(-1, 4, 4)
            yield Sequence(name, tuple(frames), stacked, intrinsics, None, depth, None, read_depth)


def _scenes(root: Path) -> list[Path]:
    return sorted(x for x in root.iterdir() if x.is_dir()) if root.is_dir() else []
