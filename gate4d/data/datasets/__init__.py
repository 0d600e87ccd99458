"""Data sets of the field, read from the folders in which they are distributed; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import davis, dycheck, kitti, point_odyssey, scannet, seven_scenes, sintel, tum, vkitti
from .sequence import Protocol, Selection, Sequence

__all__ = ["DATASETS", "DataSet", "Protocol", "Selection", "Sequence", "read_dataset"]


class DataSet(NamedTuple):
    """How a data set is read: what lies in its folder, its protocol, whether a folder is one, its sequences."""

    layout: str
    protocol: Protocol
    is_at: Callable[[Path], bool]
    read: Callable[..., Iterator[Sequence]]


DATASETS = {
    "sintel": DataSet(sintel.LAYOUT, sintel.PROTOCOL, sintel.is_at, sintel.read),
    "tum-dynamics": DataSet(tum.LAYOUT, tum.PROTOCOL, tum.is_at, tum.read),
    "bonn": DataSet(tum.BONN_LAYOUT, tum.BONN_PROTOCOL, tum.bonn_is_at, tum.read_bonn),
    "kitti": DataSet(kitti.LAYOUT, kitti.PROTOCOL, kitti.is_at, kitti.read),
    "kitti-odometry": DataSet(
        kitti.ODOMETRY_LAYOUT, kitti.ODOMETRY_PROTOCOL, kitti.odometry_is_at, kitti.read_odometry
    ),
    "scannet": DataSet(scannet.LAYOUT, scannet.PROTOCOL, scannet.is_at, scannet.read),
    "davis-2016": DataSet(davis.LAYOUT, davis.PROTOCOL, davis.is_at, davis.read_2016),
    "davis-2017": DataSet(davis.LAYOUT, davis.PROTOCOL, davis.is_at, davis.read_2017),
    "dycheck": DataSet(dycheck.LAYOUT, dycheck.PROTOCOL, dycheck.is_at, dycheck.read),
    "7-scenes": DataSet(seven_scenes.LAYOUT, seven_scenes.PROTOCOL, seven_scenes.is_at, seven_scenes.read),
    "point-odyssey": DataSet(point_odyssey.LAYOUT, point_odyssey.PROTOCOL, point_odyssey.is_at, point_odyssey.read),
    "virtual-kitti-2": DataSet(vkitti.LAYOUT, vkitti.PROTOCOL, vkitti.is_at, vkitti.read),
}


def read_dataset(
    name: str, root: str | Path, *, selection: Selection | None = None, only: tuple[str, ...] = ()
) -> Iterator[Sequence]:
    """The sequences of a data set, one after the other.

    Args:
        name: a key of :data:`DATASETS`.
        root: the folder as it is distributed.
        selection: frames of each sequence; by default those of the protocol.
        only: names of sequences; by default those of the protocol.

    Raises:
        ValueError: the name is unknown, the folder is of another data set, a file does not hold what it should, stamps
            do not match, or there is no such sequence, or one with fewer than two frames.
        FileNotFoundError: the folder or a file is missing; says what belongs where.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}.")
    dataset, root = DATASETS[name], Path(root)
    wanted = f"{name} is wanted as it is distributed:\n{dataset.layout}"
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {root}. {wanted}")
    if not dataset.is_at(root):
        others = [n for n, other in DATASETS.items() if n != name and other.is_at(root)]
        looks = f"it looks like {' or '.join(others)}" if others else "it looks like no data set that is known"
        raise ValueError(f"root: {root} does not hold {name}, {looks}. {wanted}")
    return _checked(name, root, dataset.read(root, selection or dataset.protocol.selection, only), only)


def _checked(name: str, root: Path, sequences: Iterator[Sequence], only: tuple[str, ...]) -> Iterator[Sequence]:
    count = 0
    for sequence in sequences:
        count += 1
        if len(sequence) < 2:
            raise ValueError(
                f"{root}: the selection leaves {len(sequence)} frames of {sequence.name}, 2 are needed: another start, "
                "a smaller stride or more frames."
            )
        for file in (*sequence.frames, *(sequence.depth_files or ()), *(sequence.mask_files or ())):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"{name}, sequence {sequence.name}: there is no file {file}.")
        yield sequence
    if not count:
        which = f" named {', '.join(only)}" if only else ""
        raise ValueError(f"root: {root} holds no sequence of {name}{which}. It is wanted as it is distributed:\n"
                         f"{DATASETS[name].layout}")  # fmt: skip
