"""Files of the data sets: each reader returns arrays, and names the file in every error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_TAG = 202021.25  # of MPI Sintel's binary files
IMAGES = (".png", ".jpg", ".jpeg")


def read_image(path: Path) -> NDArray[np.uint8]:
    """``[H, W, 3]`` sRGB."""
    return np.asarray(_opened(path, "RGB"))


def read_depth_png(path: Path, scale: float, invalid: tuple[int, ...] = ()) -> Array:
    """Depth ``[H, W]`` in metres of a 16-bit PNG with ``scale`` counts a metre; 0 where they are 0 or ``invalid``."""
    image = _opened(path)
    if not image.mode.startswith("I"):
        raise ValueError(f"{path} must be a depth map of 16 bits, got an image of mode {image.mode} (8 bits).")
    counts = np.asarray(image).astype(np.int64)
    return np.where(np.isin(counts, (0, *invalid)), 0.0, counts / scale)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """``[H, W]`` of an annotation: indices into a palette, or grey; everything but 0 is an object (255 too)."""
    pixels = np.asarray(_opened(path))
    return pixels.any(-1) if pixels.ndim == 3 else pixels != 0


def read_dpt(path: Path) -> Array:
    """Depth ``[H, W]`` in metres of MPI Sintel's ``.dpt``: tag, width, height, fp32 row by row, little endian."""
    raw = _bytes(path)
    if len(raw) < 12 or np.frombuffer(raw, "<f4", 1)[0] != np.float32(_TAG):
        raise ValueError(f"{path} must be a depth map of MPI Sintel, which begins with the tag {_TAG}; it does not.")
    width, height = (int(n) for n in np.frombuffer(raw, "<i4", 2, 4))
    if width < 1 or height < 1 or len(raw) != 12 + 4 * width * height:
        raise ValueError(
            f"{path} is truncated or damaged: {width}x{height} pixels need {12 + 4 * max(width * height, 0)} bytes, "
            f"it has {len(raw)}."
        )
    return np.frombuffer(raw, "<f4", width * height, 12).reshape(height, width).astype(np.float64)


def read_cam(path: Path) -> tuple[Array, Array]:
    """Intrinsics ``[3, 3]`` and camera to world ``[4, 4]`` of MPI Sintel's ``.cam``: tag, then fp64 3x3 and 3x4."""
    raw = _bytes(path)
    if len(raw) != 4 + 8 * 21 or np.frombuffer(raw, "<f4", 1)[0] != np.float32(_TAG):
        raise ValueError(f"{path} must be a camera of MPI Sintel, {4 + 8 * 21} bytes with its tag; it has {len(raw)}.")
    numbers = np.frombuffer(raw, "<f8", 21, 4)
    return numbers[:9].reshape(3, 3).copy(), to_world(numbers[9:].reshape(3, 4))


def read_numbers(path: Path, columns: Iterable[int] | None = None, skip: int = 0) -> Array:
    """Rows of numbers ``[N, C]`` of a text file; ``#`` begins a comment, the first ``skip`` lines do not count.

    Raises:
        ValueError: a row holds something else, or the number of columns is not among ``columns``.
    """
    rows = []
    for number, line in enumerate(_text(path).splitlines()):
        words = line.partition("#")[0].replace(",", " ").split()
        if number < skip or not words:
            continue
        try:
            rows.append([float(w) for w in words])
        except ValueError:
            raise ValueError(f"{path}, line {number + 1}: numbers are wanted, got {line.strip()[:60]!r}.") from None
    widths = {len(row) for row in rows}
    wanted = widths if columns is None else set(columns)
    if len(widths) != 1 or not widths <= wanted:
        raise ValueError(f"{path} must hold rows of {sorted(wanted) or 'some'} numbers, got rows of {sorted(widths)}.")
    return np.array(rows)


def read_stamped(path: Path) -> dict[float, list[str]]:
    """Words by time stamp of TUM's text files (``rgb.txt``, ``groundtruth.txt``)."""
    found = {}
    for number, line in enumerate(_text(path).splitlines()):
        words = line.partition("#")[0].replace(",", " ").split()
        if len(words) < 2:
            continue
        try:
            found[float(words[0])] = words[1:]
        except ValueError:
            raise ValueError(f"{path}, line {number + 1}: a time stamp is wanted, got {words[0]!r}.") from None
    if not found:
        raise ValueError(f"{path} holds no line of a time stamp and more.")
    return found


def associate(first: Iterable[float], second: Iterable[float], most: float = 0.02) -> list[tuple[float, float]]:
    """Pairs of stamps less than ``most`` seconds apart, the closest first, none twice; in order of time.

    The rule of TUM's ``associate.py``: of all pairs that are close enough, in order of their distance, each is taken
    whose stamps are both free.
    """
    a, b = np.sort(np.fromiter(first, np.float64)), np.sort(np.fromiter(second, np.float64))
    near = [np.arange(*np.searchsorted(b, (x - most, x + most), side="left")) for x in a]
    pairs = sorted((abs(x - b[j]), x, b[j]) for x, js in zip(a, near, strict=True) for j in js if abs(x - b[j]) < most)
    free_a, free_b, found = set(a), set(b), []
    for _, x, y in pairs:
        if x in free_a and y in free_b:
            free_a.remove(x)
            free_b.remove(y)
            found.append((float(x), float(y)))
    return sorted(found)


def tum_pose(numbers: Iterable[str | float], where: str) -> Array:
    """Camera to world ``[4, 4]`` of TUM's ``tx ty tz qx qy qz qw``."""
    try:
        x = np.array([float(n) for n in numbers])
    except ValueError:
        x = np.zeros(0)
    if x.shape != (7,) or not np.linalg.norm(x[3:]) > 0:
        raise ValueError(f"{where}: a pose must be tx ty tz qx qy qz qw, got {list(numbers)}.")
    i, j, k, w = x[3:] / np.linalg.norm(x[3:])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)],
        [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)],
        [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)],
    ]
    pose[:3, 3] = x[:3]
    return pose


def to_world(extrinsics: Array) -> Array:
    """Camera to world ``[..., 4, 4]`` of rigid world to camera ``[..., 3 or 4, 4]``."""
    turn, shift = extrinsics[..., :3, :3], extrinsics[..., :3, 3]
    pose = np.zeros((*extrinsics.shape[:-2], 4, 4))
    pose[..., :3, :3] = np.swapaxes(turn, -1, -2)
    pose[..., :3, 3] = -(np.swapaxes(turn, -1, -2) @ shift[..., None])[..., 0]
    pose[..., 3, 3] = 1
    return pose


def pinhole(focal: float, other: float, x: float, y: float) -> Array:
    """Intrinsics ``[3, 3]``."""
    return np.array([[focal, 0, x], [0, other, y], [0, 0, 1.0]])


def listed(folder: Path, pattern: str, what: str) -> list[Path]:
    """Files of a folder in natural order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob(pattern), key=natural) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{what}: nothing found at {folder / pattern}.")
    return files


def natural(path: Path) -> list[tuple[int, int | str]]:
    """A key by which 2 comes before 10."""
    return [(0, int(s)) if s.isdigit() else (1, s) for s in re.split(r"(\d+)", path.name) if s]


def same_names(frames: Iterable[Path], maps: Mapping[str, Path] | Iterable[Path]) -> tuple[Path | None, ...]:
    """The file for each frame with the last number of its name, None where there is none."""
    by_number = {last_number(path): path for path in maps}
    return tuple(by_number.get(last_number(path)) for path in frames)


def last_number(path: Path) -> int:
    """The last number in a file's name.

    Raises:
        ValueError: it has none.
    """
    digits = re.findall(r"\d+", path.stem)
    if not digits:
        raise ValueError(f"{path}: a frame's name must hold its number.")
    return int(digits[-1])


def _opened(path: Path, mode: str | None = None):
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("Reading images needs pillow: pip install 'gate4d[demo]'.") from None
    try:
        with Image.open(path) as image:
            image.load()
            return image if mode is None or image.mode == mode else image.convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # pillow raises all of these
        raise ValueError(f"{path} cannot be read, it is truncated or no image: {e}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}.") from None


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a text file; it is not.") from None
