"""MUT3R on CUT3R: image tokens that move are gated out of the exchange between image and state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gates import MotionGate
from ..integrations.table import AttentionTable
from ..nn.control import gating, observing
from ..statistics.cues import CUES, raw_cue, standardised
from .method import ClipResult
from .options import Keep, Layers, layer_indices
from .rollout import RecurrentMethod

# direction: role of the attention it gates, gate from the image tokens' scores [B, N]
_DIRECTIONS = {
    "self": ("decoder self", MotionGate.pairwise),
    "state": ("state cross", MotionGate.keys),
    "image": ("decoder cross", MotionGate.queries),
}


def outlying(raw: Tensor, temperature: float = 1.0) -> Tensor:  # [B, N] -> [B, N]
    """How far a token stands out above the tokens of its item, in [0, 1): 0 for all that do not.

    ``z`` is the distance above the median in robust standard deviations (1.4826 times the median absolute deviation, at
    least half of the standard deviation, which keeps it from vanishing where most tokens are alike). The score is 0 up
    to ``z = 3``, which 0.13 % of normally distributed tokens exceed, and ``tanh((z - 3) / (2 temperature))`` above.
    """
    centred = raw - raw.median(-1, keepdim=True).values
    robust = 1.4826 * centred.abs().median(-1, keepdim=True).values
    spread = raw.std(-1, correction=0, keepdim=True)
    z = centred / (torch.maximum(robust, spread / 2) + 1e-6)
    return ((z - OUTLYING) / (2 * temperature)).clamp(min=0).tanh()


OUTLYING = 3.0  # robust standard deviations
NORMALISATIONS = {"outliers": outlying, "standardised": standardised}


class Mut3rFrame(NamedTuple):
    """One frame of a stream.

    Attributes:
        prediction: what the model returns for the frame.
        motion_scores: ``[B, patches]``, score of the image's patches in [0, 1], 1 = dynamic.
        state: ``[B, S, C]`` after the frame.
    """

    prediction: Any
    motion_scores: Tensor
    state: Tensor


@dataclass(frozen=True)
class Mut3rResult(ClipResult):
    """A clip: ``predictions`` (or what ``keep`` made of them), ``motion_scores``, and the last state ``[B, S, C]``."""

    state: Tensor


class Mut3r(RecurrentMethod):
    """Motion scores from the decoder's self-attention of a frame, then the frame again under three gates.

    The scores need all layers and the gates sit in the first, so the decoders run twice a frame, the encoder once: the
    first run, from the same state, is watched and its result dropped. The cue is averaged over heads and layers (see
    :func:`gate4d.motion_cue`, which says which cues there are) and normalised over the patches of a frame; the pose
    token always counts as static. No authors' code is public, so two runs and the normalisation are this project's
    reading of the paper.

    **Normalisation.** ``"standardised"`` is the paper's form: less the mean, by the standard deviation, through a
    sigmoid. It is relative: half of every frame counts as moving, also of one in which nothing moves.
    ``"outliers"`` (default) gives 0 to all patches but those that stand apart from the frame, see :func:`outlying`, so
    that a frame without any is left as plain CUT3R has it.

    **Layers.** The paper gates "layers 0-6" of CUT3R's twelve decoder layers. Read here with both ends included and
    counted from 0, as one writes layer ranges in prose: the first seven.

    Args:
        directions: any of ``"self"`` (image to image: static queries look away from dynamic keys), ``"state"`` (state
            queries look away from dynamic image tokens), ``"image"`` (dynamic image tokens receive less from the
            state); None for none.
        layers: decoder layers that are gated, see :func:`~gate4d.methods.options.layer_indices`: ``"0-6"``, ``[0, 1]``,
            ...; ``"auto"`` are the first seven, or all of a model that has fewer; None for none.
        strength: exponent of the gates' weight, >= 0; 0 gates nothing.
        cue: ``"logit_mean"``, ``"received"`` or ``"entropy"``.
        temperature: > 0, of the sigmoid; larger is softer.
        normalise: ``"outliers"`` or ``"standardised"``, see above.
        keep: what :meth:`run` keeps of each prediction: None for all of it, names of its entries (``"camera_pose"``),
            or a function of the prediction. :meth:`stream` keeps nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        directions: Collection[str] | None = ("self", "state", "image"),
        layers: Layers = "auto",
        strength: float = 1.0,
        cue: str = "logit_mean",
        temperature: float = 1.0,
        normalise: str = "outliers",
        keep: Keep = None,
    ):
        super().__init__("mut3r", model, table, keep)
        if directions is not None and (
            isinstance(directions, str) or not directions or not set(directions) <= set(_DIRECTIONS)
        ):
            raise ValueError(
                f"directions must be a collection of {list(_DIRECTIONS)}, at least one, or None, got {directions!r}."
            )
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {list(NORMALISATIONS)}, got {normalise!r}.")
        if cue not in CUES:
            raise ValueError(f"cue must be one of {list(CUES)}, got {cue!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}.")
        MotionGate(strength=strength)  # refuses a strength that does not fit
        self.directions = tuple(directions or ())
        self.strength, self.cue, self.temperature, self.normalise = strength, cue, temperature, normalise
        self.motion_scores: Tensor | None = None  # [B, patches], of the last frame
        self._watched = [row.control for row in table.select("decoder self")]
        # The self-attention of a decoder shows its depth; each direction must have all of the layers.
        self.layers = layer_indices("layers", layers, {r.layer for r in table.select("decoder self")}, auto=range(7))
        self._gated = {}
        for direction in self.directions:
            rows = {r.layer: r.control for r in table.select(_DIRECTIONS[direction][0])}
            found = layer_indices("layers", list(self.layers), rows) if self.layers else ()
            self._gated[direction] = [rows[n] for n in found]
        self._cues: list[Tensor] = []  # one [B, N] a layer, of the frame that runs
        self.install()

    def frame(self, prediction: Any, state: Tensor) -> Mut3rFrame:
        return Mut3rFrame(prediction, self.motion_scores, state)

    def score(self, frame: Mut3rFrame) -> Tensor:
        return frame.motion_scores

    def result(self, predictions: list[Any], scores: list[Tensor], state: Tensor) -> Mut3rResult:
        return Mut3rResult(predictions, state, motion_scores=torch.stack(scores))

    def rollout(self, call: Callable[[], Any], old: Tensor, init: Tensor) -> Any:
        """The model's rollout ``call()`` twice: watched, then gated."""
        self._cues.clear()
        with observing((control, self._observe) for control in self._watched):
            watched = call()
        if not self._cues:  # a copy of the model whose patch was removed
            return watched
        raw = torch.stack(self._cues).mean(0)[:, 1:]  # the first token is the pose's
        self._cues.clear()
        self.motion_scores = NORMALISATIONS[self.normalise](raw if self.cue == "entropy" else -raw, self.temperature)
        scores = F.pad(self.motion_scores, (1, 0))
        gates = {d: _DIRECTIONS[d][1](scores, strength=self.strength) for d in self._gated}
        with gating((control, gates[d]) for d, controls in self._gated.items() for control in controls):
            return call()

    def _observe(self, q: Tensor, k: Tensor, scale: float) -> None:
        self._cues.append(raw_cue(q, k, self.cue, None, scale))
