"""MPI Sintel: Butler et al., "A naturalistic open source movie for optical flow evaluation", ECCV 2012."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = """\
training/final/alley_2/frame_0001.png ..., training/depth/alley_2/frame_0001.dpt ...,
training/camdata_left/alley_2/frame_0001.cam ...; masks, if wanted: training/dynamic_label_perfect/alley_2/*.png"""
SEQUENCES = (
    "alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6", "shaman_3",
    "sleeping_1", "sleeping_2", "temple_2", "temple_3",
)  # fmt: skip
PROTOCOL = Protocol(("cameras", "depth", "masks"), "MonST3R, CUT3R: 14 sequences", max_depth=70.0, clip_max=70.0)


def is_at(root: Path) -> bool:
    return any((x / "final").is_dir() and (x / "camdata_left").is_dir() for x in (root, root / "training"))


def read(root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """The 14 sequences as far as they are there, or those asked for."""
    base = root / "training" if (root / "training").is_dir() else root
    for name in only or [n for n in SEQUENCES if (base / "final" / n).is_dir()]:
        frames = selection.of(formats.listed(base / "final" / name, "frame_*.png", "images of sintel"))
        depth, masks = None, None
        if (base / "depth" / name).is_dir():
            depth = formats.same_names(frames, (base / "depth" / name).glob("*.dpt"))
        if (base / "dynamic_label_perfect" / name).is_dir():
            masks = formats.same_names(frames, (base / "dynamic_label_perfect" / name).glob("*.png"))
        poses = intrinsics = None
        if (base / "camdata_left" / name).is_dir():
            cameras = [formats.read_cam(base / "camdata_left" / name / f"{f.stem}.cam") for f in frames]
            intrinsics, poses = (np.stack(x) for x in zip(*cameras, strict=True))
        yield Sequence(name, tuple(frames), poses, intrinsics, None, depth, masks)
