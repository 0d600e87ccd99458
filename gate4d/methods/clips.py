"""Clips in the forms that the families of models take, frame by frame or whole, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def recurrent_views(frames: Any, *, device: torch.device, patch: int = 1) -> Iterator[dict[str, Any]]:
    """Views of the CUT3R family, one by one, from images or from views.

    Args:
        frames: images ``[T, 3, H, W]`` in [0, 1], or an iterable (a generator too) of images ``[3, H, W]`` or
            ``[B, 3, H, W]`` or of the model's own view dicts, which are passed on with missing keys filled in.
        patch: the sides are multiples of it.

    Raises:
        TypeError: something in it is neither.
        ValueError: an image does not fit, has another shape than those before, or there is no frame.
    """
    size, number = None, -1
    for number, frame in enumerate(frames):
        view = dict(frame) if isinstance(frame, dict) else {"img": frame}
        image = _image(number, view.get("img"), patch, " or a view dict with one", unit=not isinstance(frame, dict))
        if not isinstance(frame, dict):
            view["img"] = image = image.to(device) * 2 - 1
        size = _same_size(number, image, size)
        batch, _, height, width = size
        yes, no = (torch.full((batch,), b, dtype=torch.bool, device=image.device) for b in (True, False))
        defaults = {
            "true_shape": torch.tensor([[height, width]] * batch, device=image.device),
            "ray_map": torch.full((batch, height, width, 6), torch.nan, device=image.device),
            "camera_pose": torch.eye(4, device=image.device).expand(batch, 4, 4),
            "img_mask": yes, "ray_mask": no, "update": yes, "reset": no, "idx": number, "instance": str(number),
        }  # fmt: skip
        yield {**defaults, **view}
    if number < 0:
        raise ValueError("frames must hold at least 1 frame, got none.")


def stream_images(
    frames: Any, patch: int, *, device: torch.device, dtype: torch.dtype, one_size: bool = False
) -> Iterator[Tensor]:
    """Images ``[B, 3, H, W]`` of a stream, one by one.

    Args:
        frames: images ``[T, 3, H, W]`` or ``[B, T, 3, H, W]`` in [0, 1], or an iterable (a generator too) of images
            ``[3, H, W]`` or ``[B, 3, H, W]``.
        patch: the sides are multiples of it.
        one_size: whether all must have the size of the first.

    Raises:
        TypeError: something in it is no floating-point image.
        ValueError: an image does not fit, or there is no frame.
    """
    size, number = None, -1
    for number, frame in enumerate(frames.unbind(1) if isinstance(frames, Tensor) and frames.dim() == 5 else frames):
        image = _image(number, frame, patch)
        size = _same_size(number, image, size) if one_size else size
        yield image.to(device, dtype)
    if number < 0:
        raise ValueError("frames must hold at least 1 frame, got none.")


def _image(number: int, image: Any, patch: int, more: str = "", *, unit: bool = True) -> Tensor:
    """``[3, H, W]`` or ``[B, 3, H, W]`` as the latter; ``unit``: in [0, 1] (CUT3R's views without image hold NaN)."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        what = f"a {image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"frame {number} must be a floating-point image{more}, got {what}.")
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"frame {number} must have shape [3, H, W] or [B, 3, H, W], got {list(image.shape)}.")
    if not image.numel() or image.shape[2] % patch or image.shape[3] % patch:
        raise ValueError(
            f"frame {number} must have sides that are multiples of {patch} pixels, got {list(image.shape)}."
        )
    if unit:
        _check_range(f"frame {number}", image)
    return image


def _check_range(name: str, image: Tensor) -> None:
    """ValueError for NaN, and for values that are not those of an image; resizing may overshoot a little."""
    low, high = (float(x) for x in image.aminmax())
    if not (low >= -0.1 and high <= 1.1):
        raise ValueError(f"{name} must hold values in [0, 1], got [{low:.3g}, {high:.3g}].")


def _same_size(number: int, image: Tensor, size: torch.Size | None) -> torch.Size:
    if size is not None and image.shape != size:
        raise ValueError(f"all frames must have one size; frame {number} is {list(image.shape)}, not {list(size)}.")
    return image.shape


def clip_images(frames: Any, patch: int, *, device: torch.device) -> Tensor:
    """One clip as ``[1, T, 3, H, W]``, as the VGGT family takes it.

    Args:
        frames: ``[T, 3, H, W]`` or ``[1, T, 3, H, W]``, or a sequence of ``[3, H, W]``; floating point in [0, 1].
        patch: the sides are multiples of it.

    Raises:
        TypeError: the images are not floating point.
        ValueError: the images differ in size, are not one clip, do not divide into patches, or are not in [0, 1].
    """
    if not isinstance(frames, Tensor):
        frames = list(frames)
        if not all(isinstance(frame, Tensor) for frame in frames):
            raise TypeError(
                f"frames must hold image tensors, got {sorted({type(frame).__name__ for frame in frames})}."
            )
        sizes = {tuple(frame.shape) for frame in frames}
        if len(sizes) != 1:
            raise ValueError(f"frames must hold images of one size, at least one, got sizes {sorted(sizes)}.")
        frames = torch.stack(frames)
    if not frames.is_floating_point():
        raise TypeError(f"frames must be floating-point images in [0, 1], got {frames.dtype}.")
    images = frames[None] if frames.dim() == 4 else frames
    if images.dim() != 5 or images.shape[0] != 1 or images.shape[2] != 3 or not images.numel():
        raise ValueError(f"frames must be one clip [T, 3, H, W] or [1, T, 3, H, W], got {list(frames.shape)}.")
    if images.shape[3] % patch or images.shape[4] % patch:
        raise ValueError(f"frames must have sides that are multiples of {patch} pixels, got {list(frames.shape)}.")
    _check_range("frames", images)
    return images.to(device)


def patch_size(model: nn.Module, default: int | None = None) -> int:
    """Side of a model's square patches in pixels; ``default`` where it does not show.

    Raises:
        ValueError: neither aggregator nor patch embedding nor model nor the first convolution of an image shows it, and
            there is no default.
    """
    for owner in (getattr(model, "aggregator", None), getattr(model, "patch_embed", None), model):
        size = getattr(owner, "patch_size", None)
        if isinstance(size, (tuple, list)) and len(set(size)) == 1:
            size = size[0]
        if isinstance(size, int):
            return size
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            if module.kernel_size == module.stride and len(set(module.stride)) == 1:
                return module.stride[0]
            break
    if default is not None:
        return default
    raise ValueError(f"model must show its patch size (patch_embed.patch_size), {type(model).__name__} does not.")


def grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of ``patches`` square patches that tile an image of ``size`` (height, width).

    Raises:
        ValueError: no square patches do.
    """
    side = round((size[0] * size[1] / patches) ** 0.5)
    grid = size[0] // max(1, side), size[1] // max(1, side)
    if grid[0] * grid[1] != patches:
        raise ValueError(f"patches must tile an image of {size[0]}x{size[1]} pixels with squares, got {patches}.")
    return grid
