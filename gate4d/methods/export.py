"""Writers of what the methods find: masks and overlays as images, scores as npz, poses as TUM, points as PLY."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..geometry import matrix_to_quaternion


@contextmanager
def written_at_once(out: str | Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A folder to write into, whose content is at ``out`` only when everything went well.

    Whatever ends the block otherwise, Ctrl-C or a full disk, leaves things as they were. A folder ``out`` that is there
    and empty, which may be a mount point, is filled; one that is not empty is replaced by the new one as a whole.

    Args:
        out: in a folder that exists.
        check: called with ``out`` before and after, to raise if it must not be touched; by default one that is not
            empty must not.

    Raises:
        OSError: the folder cannot be written to, which shows at once.
        FileExistsError: by default, ``out`` is there and no empty folder.
    """
    out, check = Path(out), check or _unused
    check(out)
    inside = out.is_dir() and not any(out.iterdir())
    scratch = (out if inside else out.absolute().parent) / f".{out.name}-{secrets.token_hex(8)}"
    try:
        work, old = scratch / "new", scratch / "old"
        scratch.mkdir()
        work.mkdir()
        yield work
        if inside:
            made = sorted(work.iterdir())
            try:
                for path in made:
                    path.rename(out / path.name)
            except BaseException:
                for path in made:
                    if (out / path.name).exists():
                        (out / path.name).rename(path)
                raise
            return
        check(out)  # it may have changed meanwhile
        if out.exists():
            out.rename(old)
        try:
            work.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_text(path: str | Path, text: str) -> Path:
    """A text file, there whole or not at all; what was there before stays when the writing fails."""
    path = Path(path)
    if path.exists() and not path.is_file():  # /dev/stdout
        path.write_text(text)
        return path
    number, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    try:
        with open(number, "w") as file:
            file.write(text)
        Path(scratch).chmod(0o666 & ~_umask())
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unused(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; give another name.")


def save_masks(folder: str | Path, masks: Tensor) -> list[Path]:  # [T, H, W] bool
    """One 8-bit PNG a frame, 255 = dynamic, named by the frame's index.

    Raises:
        ValueError: masks are not bool ``[T, H, W]``.
        ImportError: pillow is missing.
    """
    if masks.dim() != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool [T, H, W], got {masks.dtype} {list(masks.shape)}.")
    return _save_images(folder, (mask.cpu().numpy().astype(np.uint8) * 255 for mask in masks))


def save_overlays(folder: str | Path, frames: Tensor, scores: Tensor, *, alpha: float = 0.5) -> list[Path]:
    """One PNG a frame: red laid over the frame in proportion to the score (a bool mask works as well).

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        scores: ``[T, H, W]`` in [0, 1].
        alpha: share of red at a score of 1.

    Raises:
        ValueError: the shapes do not fit.
        ImportError: pillow is missing.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or frames.shape[:3] != scores.shape:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] and scores [T, H, W], got {frames.dtype} {list(frames.shape)} "
            f"and {list(scores.shape)}."
        )
    red = np.array([255.0, 0.0, 0.0], dtype=np.float32)

    def blend(frame: Tensor, score: Tensor) -> np.ndarray:
        share = alpha * score.float().cpu().numpy()[..., None]
        return np.rint(frame.cpu().numpy() * (1 - share) + red * share).astype(np.uint8)

    return _save_images(folder, (blend(f, s) for f, s in zip(frames, scores, strict=True)))


def _array(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def save_scores(path: str | Path, arrays: Mapping[str, Tensor]) -> Path:
    """Named tensors as one compressed npz."""
    path = Path(path)
    with path.open("wb") as file:  # numpy appends .npz to a name, not to a file
        np.savez_compressed(file, **{name: _array(x) for name, x in arrays.items()})
    return path


def save_tum(path: str | Path, poses: Tensor, timestamps: Sequence[float] | None = None) -> Path:
    """Poses as TUM trajectory: ``timestamp tx ty tz qx qy qz qw`` a line.

    Args:
        poses: camera to world ``[T, 4, 4]``.
        timestamps: seconds, written to the microsecond; the frame's index if None.

    Raises:
        ValueError: poses or timestamps do not fit.
    """
    poses = poses.detach().double().cpu()
    if poses.dim() != 3 or poses.shape[1:] != (4, 4) or not poses.isfinite().all():
        raise ValueError(f"poses must be finite [T, 4, 4] (camera to world), got {list(poses.shape)}.")
    times = range(len(poses)) if timestamps is None else timestamps
    if len(times) != len(poses):
        raise ValueError(f"timestamps must hold one number a pose ({len(poses)}), got {len(times)}.")
    turns = matrix_to_quaternion(poses[:, :3, :3])
    rows = np.column_stack((np.asarray(times, dtype=np.float64), poses[:, :3, 3], turns))
    path = Path(path)
    np.savetxt(path, rows, fmt=["%.6f", *["%.9g"] * 7])  # of a Unix time, nine digits would leave seconds
    return path


def save_ply(path: str | Path, points: Tensor, colours: Tensor | None = None) -> Path:
    """A point cloud as binary little-endian PLY.

    Args:
        points: ``[N, 3]``; those that are not finite are left out.
        colours: uint8 ``[N, 3]`` or None.

    Raises:
        ValueError: the shapes do not fit.
    """
    if points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape [N, 3], got {list(points.shape)}.")
    if colours is not None and (colours.shape != points.shape or colours.dtype != torch.uint8):
        raise ValueError(f"colours must be uint8 {list(points.shape)}, got {colours.dtype} {list(colours.shape)}.")
    keep = torch.isfinite(points).all(1)
    fields = [(axis, "<f4") for axis in "xyz"]
    fields += [] if colours is None else [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(int(keep.sum()), dtype=fields)
    for i, axis in enumerate("xyz"):
        vertices[axis] = points[keep, i].detach().float().cpu().numpy()
    if colours is not None:
        for i, name in enumerate(("red", "green", "blue")):
            vertices[name] = colours[keep, i].cpu().numpy()
    kinds = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in fields] + ["end_header", ""]
    path = Path(path)
    path.write_bytes("\n".join(header).encode() + vertices.tobytes())
    return path


def _save_images(folder: str | Path, images) -> list[Path]:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("Writing images needs pillow: pip install 'gate4d[methods]'.") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pixels in enumerate(images):
        paths.append(folder / f"{number:06d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
