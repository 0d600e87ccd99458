"""DAVIS 2016 (Perazzi et al., CVPR 2016) and 2017 (Pont-Tuset et al., 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import formats
from .sequence import Protocol, Selection, Sequence

LAYOUT = """\
JPEGImages/480p/blackswan/00000.jpg ..., Annotations/480p/blackswan/00000.png ..., ImageSets/2016/val.txt or
ImageSets/2017/val.txt (of the release of 2016: ImageSets/480p/val.txt)"""
PROTOCOL = Protocol(("masks",), "validation set, every frame; any object against the background")


def is_at(root: Path) -> bool:
    return (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir()


def _read(year: str, root: Path, selection: Selection, only: tuple[str, ...] = ()) -> Iterator[Sequence]:
    """The sequences of ``val.txt`` (without the file: all), or those asked for."""
    for name in only or _names(root, year):
        frames = selection.of(formats.listed(root / "JPEGImages" / "480p" / name, "*.jpg", "images of davis"))
        masks = tuple(root / "Annotations" / "480p" / name / f"{x.stem}.png" for x in frames)
        if missing := [x for x in masks if not x.is_file()]:
            raise FileNotFoundError(f"davis: the annotation {missing[0]} is missing ({len(missing)} of {len(masks)}).")
        yield Sequence(name, tuple(frames), mask_files=masks)


read_2016 = partial(_read, "2016")
read_2017 = partial(_read, "2017")


def _names(root: Path, year: str) -> list[str]:
    """Lines are names, or in the first release paths of an image and its annotation."""
    for folder in (year, "480p"):
        file = root / "ImageSets" / folder / "val.txt"
        if file.is_file():
            lines = [line.split()[0] for line in file.read_text().splitlines() if line.split()]
            return list(dict.fromkeys(Path(x).parent.name if "/" in x else x for x in lines))
    folder = root / "JPEGImages" / "480p"
    return sorted(x.name for x in folder.iterdir() if x.is_dir()) if folder.is_dir() else []
