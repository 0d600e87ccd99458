"""What a method is, and what it returns for a clip: the same fields whatever the method and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .segmentation import DynamicMasks


@dataclass(frozen=True)
class ClipResult:
    """What :meth:`ClipMethod.run` returns for a clip of T frames. A field is None where the method has no such thing.

    Attributes:
        predictions: of the model, in its own form: one a frame, or a dict of entries ``[B, T, ...]``.
        masks: what the motion scores of the clip were cut into.
        refined_masks: bool ``[T, H, W]``, the masks after a refinement.
        motion_scores: ``[T, B, patches]`` in [0, 1], 1 = dynamic.
        rates: ``[T, B, S]``, with which the state was updated.
        cameras: ``[B, T, 9]``, the method's own.
        refined: bool ``[T]``, whose cameras were looked at again.
        first_cameras: of the pass that depth and points are of, where the predictions hold the cameras of another.
    """

    predictions: Any
    masks: DynamicMasks | None = field(default=None, kw_only=True)
    refined_masks: Tensor | None = field(default=None, kw_only=True)
    motion_scores: Tensor | None = field(default=None, kw_only=True)
    rates: Tensor | None = field(default=None, kw_only=True)
    cameras: Tensor | None = field(default=None, kw_only=True)
    refined: Tensor | None = field(default=None, kw_only=True)
    first_cameras: dict[str, Any] | None = field(default=None, kw_only=True)

    def by_frame(self) -> list[Any]:
        """The prediction of each frame; of a clip's dict, entries ``[B, ...]``."""
        if not isinstance(self.predictions, dict):
            return self.predictions
        clip = {n: x for n, x in self.predictions.items() if isinstance(x, Tensor) and x.dim() > 2}
        frames = min((x.shape[1] for x in clip.values()), default=0)
        return [{n: x[:, t] for n, x in clip.items()} for t in range(frames)]


class ClipMethod:
    """A method on a patched model.

    Attributes:
        takes: options of :func:`gate4d.patch` that are the method's own.
        streams: whether frames are read one by one, and :meth:`feed` gives their predictions away as they are made.
        has_cameras: whether its results bring cameras of its own.
    """

    takes: tuple[str, ...] = ()
    streams = False
    has_cameras = False

    def run(self, frames: Any) -> ClipResult:
        """Run the whole method on a clip."""
        raise NotImplementedError

    def feed(self, frames: Any, take: Callable[[Any], object]) -> ClipResult:
        """As :meth:`run`, and every frame's prediction goes to ``take``; of a method that streams, nowhere else."""
        result = self.run(frames)
        for prediction in result.by_frame():
            take(prediction)
        return result

    def close(self) -> None:
        """Undo what the method changed outside the patched modules; they are restored anyway."""
