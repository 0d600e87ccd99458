"""What the methods share: checks of the model's family, and clips in the forms that the families take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.table import AttentionRow, AttentionTable
from .options import Keep, keeper


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


class RecurrentMethod:
    """A method inside a CUT3R model's ``_recurrent_rollout``, through which all of the model's loops go.

    It takes the place of the rollout as an object and no closure, so that a patched model can be copied and pickled.
    A method has a ``rollout``, and makes its frames and its result.

    Attributes:
        model: the model.
        renew_pose: see :func:`recurrent_steps`.
        keep: what a run keeps of a prediction, see :func:`~gate4d.methods.options.keeper`.
    """

    renew_pose = False

    def __init__(self, name: str, model: nn.Module, table: AttentionTable, keep: Keep = None):
        """Raises ValueError if the model is not of the family, TypeError if ``keep`` is none."""
        require_family(name, table.select("state") or table, "cut3r")
        require_parts(name, model, RECURRENT_PARTS)
        self.model = model
        self.patch = patch_size(model, default=1)
        self.keep = keeper(keep)

    def install(self) -> None:
        """Take the place of the model's rollout."""
        self.model.__dict__["_recurrent_rollout"] = self

    def close(self) -> None:
        """Give the model its own rollout back, unless somebody replaced this one."""
        if self.model.__dict__.get("_recurrent_rollout") is self:
            del self.model.__dict__["_recurrent_rollout"]

    def __call__(
        self, state_feat: Tensor, state_pos: Any, current_feat: Any, current_pos: Any, pose_feat: Any, pose_pos: Any,
        init_state_feat: Tensor, **masks: Any,
    ) -> Any:  # fmt: skip
        args = (state_feat, state_pos, current_feat, current_pos, pose_feat, pose_pos, init_state_feat)
        original = type(self.model)._recurrent_rollout
        return self.rollout(lambda: original(self.model, *args, **masks), state_feat, init_state_feat)

    def rollout(self, call: Callable[[], Any], old: Tensor, init: Tensor) -> Any:
        """What the rollout ``call()`` becomes, from the state ``old [B, S, C]``; ``init`` is the initial state.

        Returns what ``call()`` returns, the new state first.
        """
        raise NotImplementedError

    def views(self, frames: Any) -> Iterator[dict[str, Any]]:
        """The views of a clip."""
        return recurrent_views(frames, device=next(self.model.parameters()).device, patch=self.patch)

    def frame(self, prediction: Any, state: Tensor) -> Any:
        """What a stream yields for a frame: its ``prediction`` and ``state``, and a score of its own."""
        raise NotImplementedError

    def result(self, predictions: list[Any], steps: list[Any], state: Tensor) -> Any:
        """What a run returns, from what was kept of the predictions, :meth:`score` of all frames, the last state."""
        raise NotImplementedError

    def score(self, frame: Any) -> Any:
        """What a run needs of a frame of a stream beside its prediction and its state: little."""
        raise NotImplementedError

    @torch.no_grad()
    def stream(self, frames: Any) -> Iterator[Any]:
        """Frame by frame, with memory that does not grow; arguments and errors as :meth:`run`."""
        for prediction, state in recurrent_steps(self.model, self.views(frames), renew_pose=self.renew_pose):
            yield self.frame(prediction, state)

    def run(self, frames: Any) -> Any:
        """The whole clip. What grows with it is what ``keep`` says, and the scores; one state is held at a time.

        Args:
            frames: images ``[T, 3, H, W]`` in [0, 1], sides multiples of the model's patch size, or an iterable of
                images ``[3, H, W]``, ``[B, 3, H, W]`` or of CUT3R's view dicts. One frame is enough.

        Raises:
            ValueError, TypeError: frames differ in size, are no images, or there are none; or ``keep`` names what the
                predictions lack.
        """
        predictions, scores, state = [], [], None
        for frame in self.stream(frames):
            predictions.append(self.keep(frame.prediction))
            scores.append(self.score(frame))
            state = frame.state
            del frame  # else the last frame's prediction lives on while the next one is made
        return self.result(predictions, scores, state)


RECURRENT_PARTS = ("_forward_encoder", "_encode_views", "_forward_decoder_step", "_recurrent_rollout")


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
