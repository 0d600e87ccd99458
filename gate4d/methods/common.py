"""What the methods share: checks of the model's family, and clips in the forms that the families take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.table import AttentionRow


def require_family(method: str, rows: Iterable[AttentionRow], *families: str) -> None:
    """ValueError unless there are rows, all of one of the families."""
    found = sorted({row.family for row in rows})
    if len(found) != 1 or found[0] not in families:
        raise ValueError(f"method {method!r} needs a model of the family {' or '.join(families)}, found {found}.")


def require_parts(method: str, owner: nn.Module, names: Iterable[str]) -> None:
    """ValueError unless the model has the attributes that the method drives."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ValueError(f"method {method!r} drives {type(owner).__name__} through {missing}, which it lacks.")


def recurrent_views(frames: Any, *, device: torch.device) -> Iterator[dict[str, Any]]:
    """Views of the CUT3R family, one by one, from images or from views.

    Args:
        frames: images ``[T, 3, H, W]`` in [0, 1], or an iterable (a generator too) of images ``[3, H, W]`` or
            ``[B, 3, H, W]`` or of the model's own view dicts, which are passed on with missing keys filled in.

    Raises:
        TypeError: something in it is neither.
        ValueError: an image has another shape than those before, or there is no frame.
    """
    size, number = None, -1
    for number, frame in enumerate(frames):
        view = dict(frame) if isinstance(frame, dict) else {"img": frame}
        image = _image(number, view.get("img"), " or a view dict with one")
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
        image = _image(number, frame)
        if not image.numel() or image.shape[2] % patch or image.shape[3] % patch:
            raise ValueError(
                f"frame {number} must have sides that are multiples of {patch} pixels, got {list(image.shape)}."
            )
        size = _same_size(number, image, size) if one_size else size
        yield image.to(device, dtype)
    if number < 0:
        raise ValueError("frames must hold at least 1 frame, got none.")


def _image(number: int, image: Any, more: str = "") -> Tensor:
    """``[3, H, W]`` or ``[B, 3, H, W]`` as the latter."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        what = f"a {image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"frame {number} must be a floating-point image{more}, got {what}.")
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"frame {number} must have shape [3, H, W] or [B, 3, H, W], got {list(image.shape)}.")
    return image


def _same_size(number: int, image: Tensor, size: torch.Size | None) -> torch.Size:
    if size is not None and image.shape != size:
        raise ValueError(f"all frames must have one size; frame {number} is {list(image.shape)}, not {list(size)}.")
    return image.shape


def recurrent_steps(
    model: nn.Module, views: Iterable[dict[str, Any]], *, renew_pose: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """The rollout of a CUT3R model, frame by frame, by the model's own steps; memory does not grow with the frames.

    Args:
        renew_pose: the frame after a reset of all items starts from the pose token, like the first, as TTT3R's loop
            does; CUT3R's loops ask the (reset) pose memory.

    Yields:
        The model's prediction for a frame, and the state ``[B, S, C]`` after it.
    """
    fresh = True
    for number, view in enumerate(views):
        if number == 0:
            (feats, positions, shapes), state = model._forward_encoder([view])
            init_state, init_mem, current, state_pos, mem = state
        else:
            shapes, outputs, positions = model._encode_views([view])
            feats = outputs[-1]
        index = 0 if fresh else 1  # tells the step whether this is a first frame, and which view is the current one
        prediction, (current, mem) = model._forward_decoder_step(
            [view] * (index + 1),
            index,
            feats[0],
            positions[0],
            shapes[0],
            init_state,
            init_mem,
            current,
            state_pos,
            mem,
        )
        yield prediction, current
        fresh = renew_pose and bool(view["reset"].all())


class Rollout:
    """Takes the place of a CUT3R model's ``_recurrent_rollout``, through which all of its loops go.

    An object and no closure, so that a patched model can be copied and pickled.

    Args:
        model: the model.
        rollout: called as ``rollout(call, state, init_state)``, where ``call()`` is the model's own rollout with the
            arguments at hand; returns what that returns, the new state ``[B, S, C]`` first.
    """

    def __init__(self, model: nn.Module, rollout: Callable[[Callable[[], Any], Tensor, Tensor], Any]):
        self.model, self.rollout = model, rollout
        model.__dict__["_recurrent_rollout"] = self

    def __call__(
        self, state_feat: Tensor, state_pos: Any, current_feat: Any, current_pos: Any, pose_feat: Any, pose_pos: Any,
        init_state_feat: Tensor, **masks: Any,
    ) -> Any:  # fmt: skip
        args = (state_feat, state_pos, current_feat, current_pos, pose_feat, pose_pos, init_state_feat)
        original = type(self.model)._recurrent_rollout
        return self.rollout(lambda: original(self.model, *args, **masks), state_feat, init_state_feat)

    def remove(self) -> None:
        """Give the model its own rollout back, unless somebody replaced this one."""
        if self.model.__dict__.get("_recurrent_rollout") is self:
            del self.model.__dict__["_recurrent_rollout"]


RECURRENT_PARTS = ("_forward_encoder", "_encode_views", "_forward_decoder_step", "_recurrent_rollout")


def clip_images(frames: Any, patch: int, *, device: torch.device) -> Tensor:
    """One clip as ``[1, T, 3, H, W]``, as the VGGT family takes it.

    Args:
        frames: ``[T, 3, H, W]`` or ``[1, T, 3, H, W]``, or a sequence of ``[3, H, W]``; floating point in [0, 1].
        patch: the sides are multiples of it.

    Raises:
        TypeError: the images are not floating point.
        ValueError: the images differ in size, are not one clip, or do not divide into patches.
    """
    if not isinstance(frames, Tensor):
        frames = list(frames)
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
    return images.to(device)
