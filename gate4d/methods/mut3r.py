"""MUT3R on CUT3R: image tokens that move are gated out of the exchange between image and state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gates import MotionGate
from ..integrations.table import AttentionTable
from ..statistics.cues import CUES, raw_cue, standardised
from .rollout import RecurrentMethod

# direction: role of the attention it gates, gate from the image tokens' scores [B, N]
_DIRECTIONS = {
    "self": ("decoder self", MotionGate.pairwise),
    "state": ("state cross", MotionGate.keys),
    "image": ("decoder cross", MotionGate.queries),
}


class Mut3rFrame(NamedTuple):
    """One frame of a stream.

    Attributes:
        prediction: what the model returns for the frame.
        motion: ``[B, patches]``, score of the image's patches in [0, 1], 1 = dynamic.
        state: ``[B, S, C]`` after the frame.
    """

    prediction: Any
    motion: Tensor
    state: Tensor


class Mut3rResult(NamedTuple):
    """A clip: the predictions of every frame, scores ``[T, B, patches]``, and the last state ``[B, S, C]``."""

    predictions: list[Any]
    motion: Tensor
    state: Tensor


class Mut3r(RecurrentMethod):
    """Motion scores from the decoder's self-attention of a frame, then the frame again under three gates.

    The scores need all layers and the gates sit in the first, so the decoders run twice a frame, the encoder once: the
    first run, from the same state, is watched and its result dropped. The cue is averaged over heads and layers,
    standardised over the patches of an item, and goes through a sigmoid (:func:`gate4d.motion_cue`, which says which
    cues there are); the pose token always counts as static. No authors' code is public, so two runs and the
    normalisation are this project's reading of the paper.

    Args:
        directions: any of ``"self"`` (image to image: static queries look away from dynamic keys), ``"state"`` (state
            queries look away from dynamic image tokens), ``"image"`` (dynamic image tokens receive less from the
            state).
        layers: decoder layers that are gated.
        strength: exponent of the gates' weight, >= 0; 0 gates nothing.
        cue: ``"logit_mean"``, ``"received"`` or ``"entropy"``.
        temperature: > 0, of the sigmoid; larger is softer.
    """

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        directions: Collection[str] = ("self", "state", "image"),
        layers: Collection[int] = range(7),
        strength: float = 1.0,
        cue: str = "logit_mean",
        temperature: float = 1.0,
    ):
        super().__init__("mut3r", model, table)
        if isinstance(directions, str) or not set(directions) <= set(_DIRECTIONS):
            raise ValueError(f"directions must be a collection of {list(_DIRECTIONS)}, got {directions!r}.")
        if cue not in CUES:
            raise ValueError(f"cue must be one of {list(CUES)}, got {cue!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}.")
        MotionGate(strength=strength)  # refuses a strength that does not fit
        self.directions, self.layers = tuple(directions), tuple(layers)
        self.strength, self.cue, self.temperature = strength, cue, temperature
        self.motion: Tensor | None = None  # [B, patches], of the last frame
        self._watched = [row.control for row in table.select("decoder self")]
        self._gated = {
            d: [row.control for row in table.select(_DIRECTIONS[d][0]) if row.layer in self.layers]
            for d in self.directions
        }
        self._cues: list[Tensor] = []  # one [B, N] a layer, of the frame that runs
        self.install()

    def frame(self, prediction: Any, state: Tensor) -> Mut3rFrame:
        return Mut3rFrame(prediction, self.motion, state)

    def result(self, steps: list[Mut3rFrame]) -> Mut3rResult:
        return Mut3rResult([s.prediction for s in steps], torch.stack([s.motion for s in steps]), steps[-1].state)

    def rollout(self, call: Callable[[], Any], old: Tensor, init: Tensor) -> Any:
        """The model's rollout ``call()`` twice: watched, then gated."""
        self._cues.clear()
        try:
            for control in self._watched:
                control.observers.append(self._observe)
            watched = call()
        finally:
            for control in self._watched:
                if self._observe in control.observers:
                    control.observers.remove(self._observe)
        if not self._cues:  # a copy of the model whose patch was removed
            return watched
        raw = torch.stack(self._cues).mean(0)[:, 1:]  # the first token is the pose's
        self._cues.clear()
        self.motion = standardised(raw if self.cue == "entropy" else -raw, self.temperature)
        scores = F.pad(self.motion, (1, 0))
        try:
            for direction, controls in self._gated.items():
                gate = _DIRECTIONS[direction][1](scores, strength=self.strength)
                for control in controls:
                    control.gate = gate
            return call()
        finally:
            for controls in self._gated.values():
                for control in controls:
                    control.gate = None

    def _observe(self, q: Tensor, k: Tensor, scale: float) -> None:
        self._cues.append(raw_cue(q, k, self.cue, None, scale))
