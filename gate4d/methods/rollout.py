"""The rollout of CUT3R models: their own steps, frame by frame, and the methods that sit inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.table import AttentionTable, require_family, require_parts
from .clips import patch_size, recurrent_views
from .method import ClipMethod, ClipResult
from .options import Keep, keeper


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


class RecurrentMethod(ClipMethod):
    """A method inside a CUT3R model's ``_recurrent_rollout``, through which all of the model's loops go.

    It takes the place of the rollout as an object and no closure, so that a patched model can be copied and pickled.
    A method has a ``rollout``, and makes its frames and its result.

    Attributes:
        model: the model.
        renew_pose: see :func:`recurrent_steps`.
        keep: what a run keeps of a prediction, see :func:`~gate4d.methods.options.keeper`.
    """

    streams = True
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

    def result(self, predictions: list[Any], scores: list[Tensor], state: Tensor) -> ClipResult:
        """What a run returns, from what was kept of the predictions, :meth:`score` of all frames, the last state."""
        raise NotImplementedError

    def score(self, frame: Any) -> Tensor:
        """What a run needs of a frame of a stream beside its prediction and its state: little."""
        raise NotImplementedError

    @torch.no_grad()
    def stream(self, frames: Any) -> Iterator[Any]:
        """Frame by frame, with memory that does not grow; arguments and errors as :meth:`run`."""
        for prediction, state in recurrent_steps(self.model, self.views(frames), renew_pose=self.renew_pose):
            yield self.frame(prediction, state)

    def run(self, frames: Any) -> ClipResult:
        """The whole clip. What grows with it is what ``keep`` says, and the scores; one state is held at a time.

        Args:
            frames: images ``[T, 3, H, W]`` in [0, 1], sides multiples of the model's patch size, or an iterable of
                images ``[3, H, W]``, ``[B, 3, H, W]`` or of CUT3R's view dicts. One frame is enough.

        Raises:
            ValueError, TypeError: frames differ in size, are no images, or there are none; or ``keep`` names what the
                predictions lack.
        """
        predictions: list[Any] = []
        return replace(self.feed(frames, predictions.append), predictions=predictions)

    def feed(self, frames: Any, take: Callable[[Any], object]) -> ClipResult:
        scores, state = [], None
        for frame in self.stream(frames):
            take(self.keep(frame.prediction))
            scores.append(self.score(frame))
            state = frame.state
            del frame  # else the last frame's prediction lives on while the next one is made
        return self.result([], scores, state)


RECURRENT_PARTS = ("_forward_encoder", "_encode_views", "_forward_decoder_step", "_recurrent_rollout")
