"""TTT3R on CUT3R: every state token learns at its own rate, which the state's attention to the image decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.table import AttentionTable
from ..statistics.logits import mean_logits
from .rollout import RecurrentMethod


class Ttt3rFrame(NamedTuple):
    """One frame of a stream.

    Attributes:
        prediction: what the model returns for the frame.
        rate: ``[B, S]``, beta with which the state was updated.
        state: ``[B, S, C]`` after the frame.
    """

    prediction: Any
    rate: Tensor
    state: Tensor


class Ttt3rResult(NamedTuple):
    """A clip: the model's prediction of every frame, the rates ``[T, B, S]``, and the last state ``[B, S, C]``."""

    predictions: list[Any]
    rates: Tensor
    state: Tensor


class Ttt3r(RecurrentMethod):
    """``S_t = beta S_new + (1 - beta) S_{t-1}``, ``beta = sigmoid(mean over image keys, heads, layers of the logits)``.

    The logits are those of the state decoder's cross-attention, pose token included; their mean comes in closed form
    while the layers run. A state that is still the initial one (the first frame, or after a reset) is replaced:
    beta = 1. The update is put into the model's own rollout, so ``model.forward_recurrent(views, ...)`` and the other
    loops of the model follow it too, as long as the model is patched. :meth:`run` and :meth:`stream` also start the
    frame after a reset from the pose token, as the authors' loop does and CUT3R's own loops do not.

    With a batch, every item has its own rates; the authors' code averages them over the batch.

    Args:
        reset_every: frames after which state and pose memory start anew; None for never. Adds to the resets that the
            views themselves ask for.
    """

    renew_pose = True

    def __init__(self, model: nn.Module, table: AttentionTable, *, reset_every: int | None = None):
        if "ttt3r" in table.families:
            raise ValueError(
                "method 'ttt3r' is for plain CUT3R, found TTT3R's own fork, whose loop updates the state by itself: "
                "patch it without a method."
            )
        super().__init__("ttt3r", model, table)
        if reset_every is not None and (not isinstance(reset_every, int) or reset_every < 1):
            raise ValueError(f"reset_every must be None or an int >= 1 (frames), got {reset_every!r}.")
        self.reset_every = reset_every
        self.rate: Tensor | None = None  # [B, S], of the last update
        self._means: list[Tensor] = []  # one [B, S] a layer, of the frame that runs
        for row in table.select("state cross"):
            row.control.observers.append(self._observe)
        self.install()

    def frame(self, prediction: Any, state: Tensor) -> Ttt3rFrame:
        return Ttt3rFrame(prediction, self.rate, state)

    def result(self, steps: list[Ttt3rFrame]) -> Ttt3rResult:
        return Ttt3rResult([s.prediction for s in steps], torch.stack([s.rate for s in steps]), steps[-1].state)

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
        for number, view in enumerate(super().views(frames)):
            if self.reset_every is not None and (number + 1) % self.reset_every == 0:
                view["reset"] = torch.ones_like(view["reset"])
            yield view

    def _observe(self, q: Tensor, k: Tensor, scale: float) -> None:
        self._means.append(mean_logits(q, k, over=("heads", "keys"), scale=scale))
