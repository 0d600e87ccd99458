"""Runs systems over evaluation clips and reduces their errors to the rows of a table.

Lengths are in units of the first frame's mean depth, since the metric scale of a clip cannot be seen in it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..data import Batch
from .cameras import camera_errors
from .depth import Alignment, DepthErrors, depth_errors, mean_depth_errors
from .masks import frame_ious, mask_counts, scores_of
from .systems import System

STILL = 1e-3  # a true camera whose centres spread less than this, in the unit above, has no trajectory to align
METRICS = ("ate", "rpe_translation", "rpe_rotation", "abs_rel", "delta", "iou")


@dataclass
class Row:
    """Figures of one system on clips of one length: means over clips; those of depth are weighted by valid pixels.

    Attributes:
        ate, rpe_translation: in units of the first frame's mean depth, over the clips whose camera moves.
        rpe_rotation: degrees. abs_rel, delta: after the alignment asked for. fps: of the whole system, as it ran.
        iou: of all pixels of all clips; iou_frames, iou_sequences, iou_recall: see
            :class:`~gate4d.evaluation.MaskScores`.
        per_clip: the same for every clip; NaN where the camera stands still or there is no mask.
        skipped: why there are no figures.
    """

    group: str
    system: str
    frames: int
    ate: float = np.nan
    rpe_translation: float = np.nan
    rpe_rotation: float = np.nan
    abs_rel: float = np.nan
    delta: float = np.nan
    iou: float = np.nan
    iou_frames: float = np.nan
    iou_sequences: float = np.nan
    iou_recall: float = np.nan
    fps: float = np.nan
    note: str = ""
    skipped: str | None = None
    per_clip: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """Plain data; NaN becomes None."""
        data = asdict(self)
        data["per_clip"] = {n: [_known(x) for x in values] for n, values in self.per_clip.items()}
        return {name: _known(x) if isinstance(x, float) else x for name, x in data.items()}


def _known(x: float) -> float | None:
    return x if np.isfinite(x) else None


@torch.no_grad()
def measure(
    system: System,
    model: nn.Module,
    clips: Iterable[Batch],
    lengths: Sequence[int],
    progress: Callable[[], None] = lambda: None,
    align: Alignment = "median",
) -> list[Row]:
    """One row for each of the ``lengths``, at most those of the clips.

    A causal system runs once over the whole clip, and its first frames are judged; others run anew for each length.
    ``progress`` is called after every clip; ``align`` is that of :func:`~gate4d.evaluation.depth_errors`.

    Raises:
        ValueError: a prediction does not fit the clip or is not finite; says which system.
    """
    rows = [Row(system.group, system.name, n, note=system.note) for n in lengths]
    found: list[list[_Judged]] = [[] for _ in lengths]
    seconds, frames = [0.0] * len(lengths), [0] * len(lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a mask without a threshold: a result like any other
        for clip in clips:
            longest = None
            for i, n in sorted(enumerate(lengths), key=lambda pair: -pair[1]):
                part = Batch(*(x[:, :n] for x in clip))
                begin = time.perf_counter()
                if longest is None or not system.causal:
                    prediction = system.run(model, part)
                    seconds[i] += time.perf_counter() - begin
                    frames[i] += n
                    longest = prediction if longest is None else longest
                else:
                    prediction = type(longest)(*(None if x is None else x[:n] for x in longest))
                try:
                    found[i].append(_judge(prediction, part, align))
                except ValueError as e:
                    raise ValueError(f"{system.name}: {e}") from None
            progress()
    for row, values, spent, count in zip(rows, found, seconds, frames, strict=True):
        _reduce(row, values)
        row.fps = count / spent if count and model is not None else np.nan
    return rows


class _Judged(NamedTuple):
    """What is known of one clip."""

    cameras: tuple[float, float, float]  # ATE, RPE of translation and rotation; NaN where the camera stands still
    depth: DepthErrors
    ious: np.ndarray | None  # [T], None without a mask
    counts: tuple[int, int]  # intersection and union


def _judge(prediction, clip: Batch, align: Alignment) -> _Judged:
    unit = float(clip.depth[0, 0].mean())
    poses = clip.poses[0].double().cpu().numpy().copy()
    poses[:, :3, 3] /= unit
    cameras = camera_errors(prediction.poses, poses)
    centers = poses[:, :3, 3]
    moves = np.sqrt(((centers - centers.mean(0)) ** 2).sum(1).mean()) >= STILL
    depth = depth_errors(prediction.depth, clip.depth[0].cpu(), align=align)
    ious, counts = None, (0, 0)
    if prediction.masks is not None:
        masks = prediction.masks, clip.masks[0].cpu()
        ious, counts = frame_ious(*masks), mask_counts(*masks)
    ate, translation = (cameras.ate, cameras.rpe_translation) if moves else (np.nan, np.nan)
    return _Judged((ate, translation, cameras.rpe_rotation), depth, ious, counts)


def _reduce(row: Row, clips: list[_Judged]) -> None:
    for i, name in enumerate(("ate", "rpe_translation", "rpe_rotation")):
        values = np.array([c.cameras[i] for c in clips])
        setattr(row, name, float(np.nanmean(values)) if np.isfinite(values).any() else np.nan)
        row.per_clip[name] = values.tolist()
    row.abs_rel, row.delta = mean_depth_errors([c.depth for c in clips])[:2]
    for name in ("abs_rel", "delta"):
        row.per_clip[name] = [getattr(c.depth, name) for c in clips]
    masked = [c for c in clips if c.ious is not None]
    row.per_clip["iou"] = [np.nan if c.ious is None else scores_of([c.ious], *c.counts).pixels for c in clips]
    if len(masked) == len(clips):
        inter, union = (sum(c.counts[i] for c in clips) for i in range(2))
        scores = scores_of([c.ious for c in clips], inter, union)
        row.iou, row.iou_frames, row.iou_sequences, row.iou_recall = scores
