"""TTT3R on CUT3R: every state token learns at its own rate, which the state's attention to the image decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.table import AttentionTable
from ..statistics.logits import mean_logits
from .cameras import camera_poses, moved_prediction, predicted_camera
from .method import ClipResult
from .options import Keep
from .rollout import RecurrentMethod, recurrent_steps

# Marks in views: a frame that is fed a second time, and one after which the method itself resets.
_AGAIN, _OURS = "gate4d_again", "gate4d_reset"


class Ttt3rFrame(NamedTuple):
    """One frame of a stream.

    Attributes:
        prediction: what the model returns for the frame; after a reset, its cameras and world points are moved into the
            world of the first frame.
        rate: ``[B, S]``, beta with which the state was updated.
        state: ``[B, S, C]`` after the frame.
        base: fp64 ``[B, 4, 4]``, from the world of the frame's chunk to that of the first frame; None before a reset.
    """

    prediction: Any
    rate: Tensor
    state: Tensor
    base: Tensor | None = None


@dataclass(frozen=True)
class Ttt3rResult(ClipResult):
    """A clip: ``predictions`` (or what ``keep`` made of them), ``rates``, and the last state ``[B, S, C]``."""

    state: Tensor


class Ttt3r(RecurrentMethod):
    """``S_t = beta S_new + (1 - beta) S_{t-1}``, ``beta = sigmoid(mean over image keys, heads, layers of the logits)``.

    The logits are those of the state decoder's cross-attention, pose token included; their mean comes in closed form
    while the layers run. A state that is still the initial one (the first frame, or after a reset) is replaced:
    beta = 1. The update is put into the model's own rollout, so ``model.forward_recurrent(views, ...)`` and the other
    loops of the model follow it too, as long as the model is patched. :meth:`run` and :meth:`stream` also start the
    frame after a reset from the pose token, as the authors' loop does and CUT3R's own loops do not.

    With a batch, every item has its own rates; the authors' code averages them over the batch.

    **Resets.** With ``reset_every=K`` state and pose memory start anew after every K-th frame, and the frames between
    two resets are a chunk. As the authors' demo does, the last frame of a chunk is fed again as the first of the next,
    so that both know one camera, and the poses of a chunk are multiplied with that camera's pose: what comes out is one
    trajectory in the world of the first frame. The second answer for a frame is dropped. No scale is estimated, as
    theirs is not. The model's own loops do not reset by themselves.

    Args:
        reset_every: frames after which state and pose memory start anew; None for never. Adds to the resets that the
            views themselves ask for, whose chunks are left as they come out.
        chain: whether the chunks between the resets of ``reset_every`` are put together; without it each begins at the
            origin, with a frame that no chunk before it has seen.
        keep: what :meth:`run` keeps of each prediction: None for all of it, names of its entries (``"camera_pose"``),
            or a function of the prediction. :meth:`stream` keeps nothing.
    """

    renew_pose = True

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        reset_every: int | None = None,
        chain: bool = True,
        keep: Keep = None,
    ):
        if "ttt3r" in table.families:
            raise ValueError(
                "method 'ttt3r' is for plain CUT3R, found TTT3R's own fork, whose loop updates the state by itself: "
                "patch it without a method."
            )
        super().__init__("ttt3r", model, table, keep)
        if reset_every is not None and (not isinstance(reset_every, int) or reset_every < 1):
            raise ValueError(f"reset_every must be None or an int >= 1 (frames), got {reset_every!r}.")
        if not isinstance(chain, bool):
            raise ValueError(f"chain must be True or False, got {chain!r}.")
        self.reset_every, self.chain = reset_every, chain
        self.rate: Tensor | None = None  # [B, S], of the last update
        self._means: list[Tensor] = []  # one [B, S] a layer, of the frame that runs
        for row in table.select("state cross"):
            row.control.observers.append(self._observe)
        self.install()

    def frame(self, prediction: Any, state: Tensor, base: Tensor | None = None) -> Ttt3rFrame:
        return Ttt3rFrame(prediction, self.rate, state, base)

    def score(self, frame: Ttt3rFrame) -> Tensor:
        return frame.rate

    def result(self, predictions: list[Any], scores: list[Tensor], state: Tensor) -> Ttt3rResult:
        return Ttt3rResult(predictions, state, rates=torch.stack(scores))

    @torch.no_grad()
    def stream(self, frames: Any) -> Iterator[Ttt3rFrame]:
        """Frame by frame, with memory that does not grow; arguments and errors as :meth:`run`."""
        view: dict[str, Any] = {}

        def noted() -> Iterator[dict[str, Any]]:
            nonlocal view
            for current in self.views(frames):
                view = current  # of which the step that follows is
                yield current

        base, camera = None, None
        for prediction, state in recurrent_steps(self.model, noted(), renew_pose=self.renew_pose):
            if view.get(_AGAIN):  # the camera of this frame, as the chunk before saw it, is where the new one begins
                if camera is not None:
                    base = camera if base is None else base @ camera
                continue
            if view.get(_OURS):
                found = predicted_camera(prediction)
                camera = None if found is None else camera_poses(found.double())
            yield self.frame(prediction if base is None else moved_prediction(prediction, base), state, base)

    def rollout(self, call: Callable[[], Any], old: Tensor, init: Tensor) -> Any:
        self._means.clear()
        new, *rest = call()
        if not self._means:  # a copy of the model whose patch was removed
            return (new, *rest)
        rate = torch.stack(self._means).mean(0).sigmoid()
        fresh = (old == init).flatten(1).all(1)
        self.rate = torch.where(fresh[:, None], 1.0, rate).to(new.dtype)
        self._means.clear()
        beta = self.rate[..., None]
        return (beta * new + (1 - beta) * old, *rest)

    def views(self, frames: Any) -> Iterator[dict[str, Any]]:
        again = None
        for number, view in enumerate(super().views(frames)):
            if again is not None:
                yield again
            again = None
            if self.reset_every is not None and (number + 1) % self.reset_every == 0:
                if self.chain:
                    again = {**view, "reset": torch.zeros_like(view["reset"]), _AGAIN: True}
                view = {**view, "reset": torch.ones_like(view["reset"]), _OURS: True}
            yield view

    def _observe(self, q: Tensor, k: Tensor, scale: float) -> None:
        self._means.append(mean_logits(q, k, over=("heads", "keys"), scale=scale))
