"""Reading clips: a video file or a folder of images, resized and cropped to whole patches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, and what is known about them; all that is not known is None.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, sRGB.
        name: where the frames come from, for people.
        masks: bool ``[T, H, W]``, True where the pixel shows something that moves in the world.
        depth: fp32 ``[T, H, W]``, metres along the optical axis.
        poses: fp64 ``[T, 4, 4]``, camera to world, OpenCV axes.
        intrinsics: fp64 ``[3, 3]``, pixels.
        times: fp64 ``[T]``, seconds, increasing: a video's own, or those that the images are named by.
    """

    frames: Tensor
    name: str
    masks: Tensor | None = None
    depth: Tensor | None = None
    poses: Tensor | None = None
    intrinsics: Tensor | None = None
    times: Tensor | None = None


class Batch(NamedTuple):
    """Clips of one size with all that is known about them, as training wants them."""

    images: Tensor  # [B, T, 3, H, W] fp32 in [0, 1]
    masks: Tensor  # [B, T, H, W] bool: the pixel shows something that moves in the world
    depth: Tensor  # [B, T, H, W] fp32, metres along the optical axis
    poses: Tensor  # [B, T, 4, 4] fp32, camera to world, OpenCV axes
    intrinsics: Tensor  # [B, T, 3, 3] fp32, pixels


def read_clip(
    path: str | Path,
    *,
    max_frames: int | None = 24,
    start: int = 0,
    stride: int = 1,
    patch: int = 14,
    max_patches: int = 414,
) -> Clip:
    """Read the first ``max_frames`` frames of a video file, or of a folder of images in natural name order.

    Images of 16 bits are scaled to 8. Where all images of a folder are named by time stamps (seconds with decimals, or
    16 or 19 digits: micro- or nanoseconds), they come in the order of their times.

    Frames are scaled down (up only where a side is shorter than one patch) until they just cover the largest grid of
    whole ``patch x patch`` pixel patches with at most ``max_patches`` of them, and cropped to it around the middle.

    Args:
        path: a video file (needs PyAV) or a folder of images (needs pillow).
        max_frames: at least 2; None for all.
        start: frames to pass over first.
        stride: take every ``stride``-th frame from there.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: a frame cannot be read, the frames differ in size or are smaller than a quarter of a patch (or than
            4 pixels), there are fewer than 2, ``path`` is neither a file nor a folder, or an option is bad.
        ImportError: the reader for this kind of clip is not installed; names the extra to install.
    """
    limits = (("max_frames", max_frames, 2), ("start", start, 0), ("stride", stride, 1), ("patch", patch, 1))
    for name, value, least in limits:
        if name == "max_frames" and value is None:
            continue
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"clip: nothing found at {path}; give a video file or a folder of images.")
    if not path.is_dir() and not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"clip: {path} is neither a file nor a folder.")
    every = slice(start, None, stride)
    source = _folder_frames(path, every) if path.is_dir() else islice(_video_frames(path), start, None, stride)
    frames: list[Tensor] = []
    times: list[float | None] = []
    first_size, size = None, None
    least = max(4, -(-patch // 4))
    for label, image, time in islice(source, max_frames):
        if min(image.shape[:2]) < least:
            raise ValueError(
                f"clip: frames must be at least {least} pixels wide and high to show anything in patches of {patch}, "
                f"{label} is {image.shape[1]}x{image.shape[0]}."
            )
        if size is None:
            first_size, size = image.shape[:2], fitted_size(*image.shape[:2], patch=patch, max_patches=max_patches)
        elif image.shape[:2] != first_size:
            raise ValueError(
                f"clip: all frames must have one size, but {label} is {image.shape[1]}x{image.shape[0]} "
                f"and the first frame is {first_size[1]}x{first_size[0]}."
            )
        frames.append(_fit(image, *size))
        times.append(time)
    if len(frames) < 2:
        where = f"stride={stride}" + (f" and start={start}" if start else "")
        raise ValueError(f"clip: at least 2 frames are needed, got {len(frames)} from {path} with {where}.")
    known = None not in times and all(a < b for a, b in pairwise(times))
    return Clip(torch.stack(frames), path.name, times=torch.tensor(times, dtype=torch.float64) if known else None)


def fitted_size(height: int, width: int, *, patch: int, max_patches: int) -> tuple[int, int]:
    """Size in pixels of the largest whole-patch crop of a frame scaled to at most ``max_patches`` patches."""
    if max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, got {max_patches}.")
    scale = min(1.0, (max_patches * patch**2 / (height * width)) ** 0.5)
    rows, columns = (max(1, round(side * scale / patch)) for side in (height, width))
    if rows * columns > max_patches or scale == 1:
        rows, columns = (max(1, int(side * scale / patch)) for side in (height, width))
    if rows == 1 or columns == 1:  # a very long and thin frame: the scale above does not bound the product
        rows, columns = min(rows, max_patches), min(columns, max_patches)
    return rows * patch, columns * patch


def _fit(image: np.ndarray, height: int, width: int) -> Tensor:
    """Scale ``[h, w, 3]`` until it just covers ``height x width``, then crop around the middle."""
    h, w = image.shape[:2]
    x = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)[None]
    scale = max(height / h, width / w)
    if scale != 1:
        size = max(height, round(h * scale)), max(width, round(w * scale))
        x = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[0, :, top : top + height, left : left + width].permute(1, 2, 0).contiguous()


def _folder_frames(folder: Path, every: slice) -> Iterator[tuple[str, np.ndarray, float | None]]:
    names = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not names:
        raise ValueError(f"clip: the folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("Reading images needs pillow: pip install 'gate4d[demo]'.") from None
    names.sort(key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])
    stamps = {p: _stamp(p.stem) for p in names}
    stamped = None not in stamps.values()
    if stamped:
        names.sort(key=stamps.get)
    for number, name in list(enumerate(names))[every]:
        try:
            if not name.is_file():
                raise ValueError("it is not a file.")
            with Image.open(name) as image:
                pixels = _rgb(ImageOps.exif_transpose(image), image.format)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # pillow raises all of these
            raise ValueError(f"clip: frame {number} cannot be read, {name}: {e}") from None
        yield str(name), pixels, stamps[name] if stamped else None


def _rgb(image: Any, kind: str | None) -> np.ndarray:
    """``[h, w, 3]`` uint8 of a pillow image; pillow itself would clip 16 bits instead of scaling them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        wide = np.asarray(image).astype(np.uint32)
        return np.repeat(((wide + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have no known range (mode {image.mode}, 32 bits): save 8 or 16 bits.")
    return np.asarray(image.convert("RGB"))


def _stamp(name: str) -> float | None:
    """Seconds of a file name that is a time, as in TUM's and EuRoC's data sets."""
    if re.fullmatch(r"\d+\.\d+", name):
        return float(name)
    if re.fullmatch(r"\d{16}|\d{19}", name):
        return int(name) / (1e6 if len(name) == 16 else 1e9)
    return None


def _video_frames(path: Path) -> Iterator[tuple[str, np.ndarray, float | None]]:
    try:
        import av
    except ImportError:
        raise ImportError("Reading a video needs PyAV: pip install 'gate4d[demo]'.") from None
    number = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"clip: {path} has no video stream that can be read.")
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    raise ValueError(f"clip: frame {number} of {path} is corrupt.")
                yield f"frame {number} of {path}", frame.to_ndarray(format="rgb24"), frame.time
                number += 1
    except av.error.FFmpegError as e:
        where = f"frame {number} of {path} cannot be decoded" if number else f"{path} is not a readable video"
        raise ValueError(f"clip: {where}: {e.strerror or e}.") from None
