"""What is said about a sequence of a data set: by a model, by files, or by the ground truth itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.clip import fitted_size
from ..data.datasets import Sequence, formats
from ..geometry import invert
from ..handle import patch
from ..methods.clips import clip_images, patch_size, recurrent_views
from ..methods.method import ClipResult
from ..methods.results import Collector, Outputs, collect
from ..methods.rollout import recurrent_steps


class Said(NamedTuple):
    """Of T frames, in a world and a unit of its own; None where nothing is said."""

    poses: np.ndarray | None = None  # fp64 [T, 4, 4], camera to world
    depth: list[np.ndarray] | None = None  # T maps [h, w] along the optical axis, of any size
    masks: list[np.ndarray] | None = None  # T bool masks [h, w], of any size


def truth(sequence: Sequence) -> Said:
    """The ground truth as a prediction; where it is not known, 0 and False."""
    said: dict[str, Any] = {}
    if sequence.has("cameras"):
        said["poses"] = sequence.poses
    for name, read in (("depth", sequence.depth), ("masks", sequence.mask)):
        if sequence.has(name):
            maps = [read(n) for n in range(len(sequence))]
            there = next(x for x in maps if x is not None)
            said[name] = [np.zeros_like(there) if x is None else x for x in maps]
    return Said(**said)


def from_files(folder: Path, sequence: Sequence) -> Said:
    """What lies in ``folder``: ``poses.txt`` (TUM), ``depth/*.npy``, ``masks/*.png`` (not 0 = moving), a line or a file
    for each frame in order.

    Raises:
        FileNotFoundError: there is nothing of it.
        ValueError: a file cannot be read, or there are not as many as frames.
    """
    said: dict[str, Any] = {}
    if (folder / "poses.txt").is_file():
        rows = formats.read_numbers(folder / "poses.txt", (8,))
        said["poses"] = np.stack([formats.tum_pose(row[1:], f"{folder / 'poses.txt'}, {row[0]:g}") for row in rows])
    if (folder / "depth").is_dir():
        said["depth"] = [_array(x) for x in formats.listed(folder / "depth", "*.npy", "predicted depth")]
    if (folder / "masks").is_dir():
        said["masks"] = [formats.read_mask(x) for x in formats.listed(folder / "masks", "*.png", "predicted masks")]
    if not said:
        raise FileNotFoundError(
            f"predictions: {folder} must hold poses.txt, depth/*.npy or masks/*.png, it holds none."
        )
    for name, x in said.items():
        if len(x) != len(sequence):
            raise ValueError(f"predictions: {folder / name} says {len(x)} frames, the sequence has {len(sequence)}.")
    return Said(**said)


@torch.no_grad()
def by_model(
    model: nn.Module,
    sequence: Sequence,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    max_patches: int = 414,
) -> Said:
    """What a model says, plain or with a method of :mod:`gate4d.methods`.

    Images are scaled whole, without a crop, to whole patches: at most ``max_patches`` of them. Their sides may change
    their ratio by less than a patch, as they do where the field measures depth. Frames are read one by one where the
    model or the method takes them so.

    Raises:
        ValueError, TypeError, ImportError: as :func:`gate4d.patch`, the method, and the model.
    """
    device = next(model.parameters()).device
    side = patch_size(model)
    size = fitted_size(*sequence.image(0).shape[:2], patch=side, max_patches=max_patches)
    frames: Any = _images(sequence, size, device)
    if method is None:
        return _said(_plain(model, frames, size, side), size)
    with patch(model, method=method, **dict(options or {})) as handle:
        if not handle.method.streams:
            frames = torch.stack(list(frames))
        collector = Collector(size, cameras=handle.method.has_cameras)
        return _said(collector.finish(handle.method.feed(frames, collector.add)), size)


def _plain(model: nn.Module, frames: Iterator[Tensor], size: tuple[int, int], side: int) -> Outputs:
    device = next(model.parameters()).device
    if hasattr(model, "_forward_decoder_step"):
        collector = Collector(size)
        for prediction, _ in recurrent_steps(model, recurrent_views(frames, device=device, patch=side)):
            collector.add(prediction)
        return collector.finish(ClipResult([]))
    return collect(ClipResult(model(clip_images(torch.stack(list(frames)), side, device=device))), size)


def _images(sequence: Sequence, size: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """``[3, H, W]`` in [0, 1], one by one."""
    for n in range(len(sequence)):
        image = torch.from_numpy(sequence.image(n).copy()).permute(2, 0, 1).float()[None]
        if tuple(image.shape[2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
        yield image[0].to(device) / 255


def _said(found: Outputs, size: tuple[int, int]) -> Said:
    depth = None
    if found.points is not None and found.poses is not None:
        extrinsics = invert(found.poses)[:, None, None]
        z = (extrinsics[..., 2, :3] * found.points.double()).sum(-1) + extrinsics[..., 2, 3]
        depth = list(z.reshape(-1, *size).numpy())
    masks = None if found.masks is None else list(found.masks.numpy())
    return Said(None if found.poses is None else found.poses.numpy(), depth, masks)


def _array(path: Path) -> np.ndarray:
    try:
        depth = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"{path} cannot be read, it is truncated or no array: {e}") from None
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold a depth map [H, W] of numbers, got {depth.dtype} {depth.shape}.")
    return depth.astype(np.float64)
